"""The charts of a run's page, drawn by matplotlib as inline SVG in the colours of the page."""

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from clipfusionvad.metrics import snippet_metrics
from clipfusionvad.report.curves import PooledScores, bucket_means, precision_recall, roc, thin
from clipfusionvad.report.table import BRANCHES, RANKING

# matplotlib draws in these stand-in colours, which the page's own variables replace: they follow light and dark.
_VARIABLES = {f"#fe00{number:02x}": f"var(--curve-{number})" for number in range(1, 9)}
_VARIABLES |= {"#fe0010": "var(--text)", "#fe0011": "var(--muted)", "#fe0012": "var(--line)"}
_CURVES, (_TEXT, _MUTED, _LINE) = list(_VARIABLES)[:8], list(_VARIABLES)[8:]
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "page", "font.size": 11, "text.color": _TEXT, "axes.labelcolor": _TEXT,
    "axes.edgecolor": _MUTED, "xtick.color": _MUTED, "ytick.color": _MUTED, "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT, "grid.color": _LINE, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "text.parse_math": False,
}  # fmt: skip
# Points of a curve whose values are shown under the pointer.
_HINTS = 40


def ranking_figures(pooled: PooledScores) -> list[Markup]:
    """Draw ROC and precision over recall of every branch, over all frames; none where all frames are of one kind."""
    curves = [
        (roc(branch, pooled.positives, pooled.frames), precision_recall(branch, pooled.positives, pooled.frames))
        for branch in pooled.anomaly
    ]
    chance = float(pooled.positives.sum() / pooled.frames.sum())
    areas = [snippet_metrics(branch, pooled.positives, pooled.frames) for branch in pooled.anomaly]
    figures = []
    for column, title, key, names, guide in (
        (0, "ROC", "auc", ("false positive rate", "true positive rate"), ([0, 1], [0, 1])),
        (1, "Precision and recall", "ap", ("recall", "precision"), ([0, 1], [chance, chance])),
    ):
        lines = []
        for number, both in enumerate(curves, start=1):
            if (curve := both[column]) is None:
                return []
            points, name = thin(curve), _short_branch(str(number))
            label = f"{name}, {key.upper()} {100 * areas[number - 1][key]:.2f}"
            hints = [f"{name}: threshold {threshold:.3g}" for threshold in points.thresholds]
            lines.append((label, points.x, points.y, hints))
        figures.append(_draw(title, *names, lines, guide=guide))
    return figures


def training_figures(losses: pd.DataFrame | None, evaluations: pd.DataFrame | None) -> list[Markup]:
    """Draw loss terms and learning rate over steps, and metrics over evaluations, as far as the logs hold them."""
    figures = []
    if losses is not None and len(losses):
        terms = losses.drop(columns=["epoch", "lr"], errors="ignore")
        figures.append(_draw_series("Training loss", terms, "loss"))
        if "lr" in losses:
            figures.append(_draw_series("Learning rate", losses[["lr"]], ""))
    if evaluations is not None and len(evaluations):
        ranking = [name for name in evaluations if "auc" in name or name.startswith("ap")]
        if ranking:
            figures.append(
                _draw_series("Evaluations", evaluations[ranking].rename(columns=_short_name), "AUC, AP", "o")
            )
        if "map_average" in evaluations:
            figures.append(_draw_series("Detection mAP, average", evaluations[["map_average"]], "percent", "o"))
    return figures


def _short_name(metric: str) -> str:
    """Return a metric of a branch as short as a legend needs it: AUC coarse."""
    kind = RANKING.get(metric[:-1])
    return f"{kind} {_short_branch(metric[-1])}" if kind else metric


def _short_branch(number: str) -> str:
    return BRANCHES.get(number, f"branch {number}").removesuffix(" branch")


_Lines = Sequence[tuple[str, np.ndarray, np.ndarray, Sequence[str]]]


def _draw_series(title: str, table: pd.DataFrame, unit: str, marker: str = "") -> Markup:
    steps, values = bucket_means(table.index.to_numpy(), table.to_numpy(np.float64))
    names = [str(name) for name in table.columns]
    lines = [(name, steps, column, [name] * len(steps)) for name, column in zip(names, values.T, strict=True)]
    return _draw(title, "step", unit, lines, marker=marker)


def _draw(
    title: str,
    x: str,
    y: str,
    lines: _Lines,
    marker: str = "",
    guide: tuple[list[Any], list[Any]] | None = None,
) -> Markup:
    """Draw lines (label, x, y, a hint for each point); with a ``guide``, what chance gives, both axes are 0..1."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.2, 4.6), layout="constrained")
        axis = figure.subplots()
        for number, (label, xs, ys, _) in enumerate(lines):
            style = ":" if number >= len(_CURVES) else "-"
            colour = _CURVES[number % len(_CURVES)]
            axis.plot(xs, ys, color=colour, lw=1.8, ls=style, label=label, marker=marker, ms=4)
        if guide:
            axis.plot(*guide, color=_MUTED, lw=1, ls="--", label="chance", zorder=1)
            axis.set(xlim=(0, 1), ylim=(0, 1.005))
        axis.set(title=title, xlabel=x, ylabel=y)
        if len(lines) > 1 or guide:
            figure.legend(loc="outside lower left", ncols=3)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        width, height = 72 * figure.get_size_inches()

    def place(xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
        return axis.transData.transform(np.column_stack([xs, ys])) * 72 / figure.dpi * [1, -1] + [0, height]

    return _inline(buffer.getvalue(), title, f"{width:g} {height:g}", _hints(lines, (x, y or title), place))


def _hints(lines: _Lines, names: tuple[str, str], place: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> str:
    """Return invisible circles over some points of each line that show their values under the pointer."""
    circles = []
    for _, xs, ys, hints in lines:
        finite = np.flatnonzero(np.isfinite(ys))
        chosen = finite[np.unique(np.linspace(0, len(finite) - 1, _HINTS).astype(int))] if len(finite) else finite
        for index, (left, top) in zip(chosen, place(xs[chosen], ys[chosen]), strict=True):
            text = html.escape(f"{hints[index]}, {names[0]} {xs[index]:.6g}, {names[1]} {ys[index]:.4g}")
            circles.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="6"><title>{text}</title></circle>')
    return f'<g class="hints">{"".join(circles)}</g>'


def _inline(svg: str, title: str, box: str, more: str) -> Markup:
    """Return matplotlib's SVG as an element of a page: its variables, its font, its size."""
    body = svg[svg.index("<defs>") : svg.rindex("</svg>")]
    for stand_in, variable in _VARIABLES.items():
        body = body.replace(stand_in, variable)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"font: (?:bold|700) ([\d.]+)px [^;\"]*", r"font-size: \1px; font-weight: 600", body)
    # Coordinates to a hundredth of a point are enough.
    body = re.sub(r' d="[^"]+"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)
    return Markup(
        f'<svg class="plot" role="img" aria-label="{html.escape(title)}" viewBox="0 0 {box}">{body}{more}</svg>'
    )
