"""The figures of a run: charts of its page as inline SVG in the page's colours, and files for a paper."""

import html
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from clipfusionvad.io.errors import UserError, nearest
from clipfusionvad.metrics import snippet_metrics
from clipfusionvad.report.curves import Confusion, PooledScores, class_confusion, pool, precision_recall, roc, thin
from clipfusionvad.report.fonts import drawing
from clipfusionvad.report.plots import (
    COARSE_COLOUR,
    FINE_COLOUR,
    draw_score_curves,
    fit_steps,
    save_figure,
    short_branch,
    training_series,
)
from clipfusionvad.report.results import Run
from clipfusionvad.report.table import RANKING

# matplotlib draws in these stand-in colours, which the page's own variables replace: they follow light and dark.
_VARIABLES = {f"#fe00{number:02x}": f"var(--curve-{number})" for number in range(1, 9)}
_VARIABLES |= {"#fe0010": "var(--text)", "#fe0011": "var(--muted)", "#fe0012": "var(--line)"}
_CURVES, (_TEXT, _MUTED, _LINE) = list(_VARIABLES)[:8], list(_VARIABLES)[8:]
_PAGE_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "page", "font.size": 11, "text.color": _TEXT, "axes.labelcolor": _TEXT,
    "axes.edgecolor": _MUTED, "xtick.color": _MUTED, "ytick.color": _MUTED, "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT, "grid.color": _LINE, "axes.grid": True, "axes.axisbelow": True,
    "axes.titleweight": "bold", "axes.titlelocation": "left",
}  # fmt: skip
# Text stays text, in a font that publishers accept.
_PAPER_STYLE = {"pdf.fonttype": 42, "font.size": 8}
_COLUMN = 3.4  # inches: one column of a two-column paper

#: A line of a figure: its label, x, y, and a hint for each point.
_Line = tuple[str, np.ndarray, np.ndarray, list[str]]


def ranking_figures(pooled: PooledScores) -> list[Markup]:
    """Draw ROC and precision over recall of every branch, over all frames; none where all frames are of one kind."""
    return [_draw_for_page(title, axes, lines, chance=chance) for _, title, axes, lines, chance in _rankings(pooled)]


def training_figures(losses: pd.DataFrame | None, evaluations: pd.DataFrame | None) -> list[Markup]:
    """Draw loss terms and learning rate over steps, and metrics over evaluations, as far as the logs hold them."""
    figures = []
    for title, table, unit, marker in training_series(losses, evaluations):
        # Means over at most 400 equal stretches, each at its last step.
        stretches = table.groupby(np.arange(len(table)) // -(-len(table) // 400))
        steps = table.index.to_numpy()[stretches.size().cumsum() - 1]
        lines = [(str(name), steps, y.to_numpy(), [str(name)] * len(y)) for name, y in stretches.mean().items()]
        figures.append(_draw_for_page(title, ("step", unit), lines, marker))
    return figures


def _rankings(pooled: PooledScores) -> Iterator[tuple[str, str, tuple[str, str], list[_Line], list[float]]]:
    """Yield name, title, axes, a line per branch, and what chance gives at x = 0 and 1: of ROC, then of precision."""
    share = float(pooled.positives.sum() / max(pooled.frames.sum(), 1))
    for name, title, metric, curve_of, axes, chance in (
        ("roc", "ROC", "auc", roc, ("false positive rate", "true positive rate"), [0.0, 1.0]),
        ("precision_recall", "Precision and recall", "ap", precision_recall, ("recall", "precision"), [share, share]),
    ):
        lines = []
        for number, scores in enumerate(pooled.anomaly, start=1):
            if (curve := curve_of(scores, pooled.positives, pooled.frames)) is None:
                return
            x, y, thresholds = thin(curve)
            area, branch = snippet_metrics(scores, pooled.positives, pooled.frames)[metric], short_branch(str(number))
            hints = [f"{branch}: threshold {threshold:.3g}" for threshold in thresholds]
            lines.append((f"{branch}, {RANKING[metric]} {100 * area:.2f}", x, y, hints))
        yield name, title, axes, lines, chance


def _draw(
    axes: tuple[str, str],
    lines: Sequence[_Line],
    size: tuple[float, float],
    colours: Sequence[str],
    marker: str = "",
    chance: list[float] | None = None,
) -> Figure:
    """Draw lines; with ``chance``, the height of its line at x = 0 and 1, both axes are 0..1."""
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    for number, (label, x, y, _) in enumerate(lines):
        style, colour = ":" if number >= len(colours) else "-", colours[number % len(colours)]
        axis.plot(x, y, color=colour, lw=1.6, ls=style, label=label, marker=marker, ms=4)
    if chance:
        axis.plot([0, 1], chance, color=matplotlib.rcParams["axes.edgecolor"], lw=1, ls="--", label="chance", zorder=1)
        axis.set(xlim=(0, 1), ylim=(0, 1.005))
    axis.set(xlabel=axes[0], ylabel=axes[1])
    axis.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1 or chance:
        figure.legend(loc="outside lower left", ncols=int(size[0] / 1.7), frameon=False)
    return figure


def _draw_for_page(
    title: str, axes: tuple[str, str], lines: Sequence[_Line], marker: str = "", chance: list[float] | None = None
) -> Markup:
    hints = []
    for _, x, y, texts in lines:
        finite = np.flatnonzero(np.isfinite(y))
        for at in finite[np.linspace(0, len(finite) - 1, min(len(finite), 40)).astype(int)]:
            hints.append((x[at], y[at], f"{texts[at]}, {axes[0]} {x[at]:.6g}, {axes[1] or title} {y[at]:.4g}"))
    with matplotlib.rc_context(_PAGE_STYLE):
        figure = _draw(axes, lines, (6.2, 4.6), _CURVES, marker, chance)
        if not chance:
            fit_steps(figure.axes[0], title)
        return _embed(figure, title, hints)


def _embed(figure: Figure, title: str, hints: Sequence[tuple[float, float, str]]) -> Markup:
    """Return a figure as an element of a page, with invisible circles (x, y, text) that speak under the pointer."""
    axis, buffer = figure.axes[0], io.StringIO()
    axis.set_title(title)
    with drawing(figure):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    width, height = 72 * figure.get_size_inches()
    places = 72 / figure.dpi * axis.transData.transform(np.array([hint[:2] for hint in hints]).reshape(-1, 2))
    circles = [
        f'<circle cx="{left:.1f}" cy="{height - bottom:.1f}" r="6"><title>{html.escape(text)}</title></circle>'
        for (left, bottom), (_, _, text) in zip(places, hints, strict=True)
    ]
    svg = buffer.getvalue()
    body = svg[svg.index("<defs>") : svg.rindex("</svg>")]
    for stand_in, variable in _VARIABLES.items():
        body = body.replace(stand_in, variable)
    # The page's font, and coordinates to a hundredth of a point.
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"font: (?:bold|700) ([\d.]+)px [^;\"]*", r"font-size: \1px; font-weight: 600", body)
    body = re.sub(r' d="[^"]+"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)
    head = f'<svg class="plot" role="img" aria-label="{html.escape(title)}" viewBox="0 0 {width:g} {height:g}"'
    return Markup(f'{head} style="max-width: {1.5 * width:g}pt">{body}<g class="hints">{"".join(circles)}</g></svg>')


def confusion_figure(labels: Sequence[str], pooled: PooledScores) -> Markup | None:
    """Draw the confusion of classes; None where all frames are of one kind."""
    if (found := class_confusion(labels, pooled)) is None:
        return None
    hints = []
    for (row, column), count in np.ndenumerate(found.table):
        if count:
            share, names = 100 * count / found.table[row].sum(), (found.labels[row], found.labels[column])
            hints.append((column, row, f"{names[0]} predicted as {names[1]}: {count:,} frames, {share:.1f} %"))
    with matplotlib.rc_context(_PAGE_STYLE):
        return _embed(_draw_confusion(found, _CURVES[0]), "Confusion of classes", hints)


def _draw_confusion(found: Confusion, colour: str) -> Figure:
    """Draw the percentage of each true class's frames by predicted class."""
    shares, places = 100 * found.shares, range(len(found.labels))
    size = max(_COLUMN, 0.3 * len(found.labels) + 1.6)
    figure = Figure(figsize=(size, size), layout="constrained")
    axis = figure.subplots()
    fade = LinearSegmentedColormap.from_list("fade", [to_rgba(colour, 0.0), to_rgba(colour, 0.7)])
    axis.pcolormesh(places, places, shares, cmap=fade, vmin=0, vmax=100)
    axis.set_xticks(places, found.labels, rotation=90)
    axis.set_yticks(places, found.labels)
    axis.set(xlabel=f"predicted at threshold {found.threshold:.3g}", ylabel="true class, percent of its frames")
    axis.invert_yaxis()
    axis.grid(visible=False)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.5:
            axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8)
    return figure


def draw_figures(run: Run, folder: Path, formats: Sequence[str], names: Sequence[str] | None = None) -> list[Path]:
    """Draw all figures that the scores of a run allow into ``folder``, in each format; return the files.

    ``names`` are the videos whose curves are drawn. ``UserError`` without scores or truth, and for unknown names.
    """
    tested = run.tested
    if tested is None or tested.videos.truth is None:
        raise UserError(f"{run.folder} holds no scores with truth, which the figures need")
    known = {entry.video: index for index, entry in enumerate(tested.videos.entries)}
    for name in names or ():
        if name not in known:
            raise UserError(f"no test video is called {name!r}{nearest(name, known)}")
    chosen = tested.only([known[name] for name in names]) if names else tested
    pooled, paths = pool(tested.scores, tested.videos), []
    with matplotlib.rc_context(_PAPER_STYLE):
        figures = {}
        if confusion := class_confusion(tested.videos.dataset.labels, pooled):
            figures["confusion"] = _draw_confusion(confusion, COARSE_COLOUR)
        for name, _, axes, lines, chance in _rankings(pooled):
            figures[name] = _draw(axes, lines, (_COLUMN, _COLUMN), (COARSE_COLOUR, FINE_COLOUR), chance=chance)
        for suffix in formats:
            for name, figure in figures.items():
                paths.append(folder / f"{name}.{suffix}")
                save_figure(figure, paths[-1], dpi=300)
            paths.append(folder / f"curves.{suffix}")
            draw_score_curves(paths[-1], chosen.scores, chosen.videos)
    return paths
