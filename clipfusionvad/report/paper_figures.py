"""A test's figures for a paper: ROC, precision over recall, confusion, score curves."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from clipfusionvad.io.errors import UserError, nearest
from clipfusionvad.metrics import snippet_metrics
from clipfusionvad.report.curves import Curve, PooledScores, class_confusion, pool, precision_recall, roc, thin
from clipfusionvad.report.plots import COARSE_COLOUR, FINE_COLOUR, draw_score_curves, save_figure
from clipfusionvad.report.results import Run
from clipfusionvad.report.scores import TestResult
from clipfusionvad.report.table import BRANCHES

_COLOURS = (COARSE_COLOUR, FINE_COLOUR)
_COLUMN = 3.4  # inches: one column of a two-column paper


def draw_figures(run: Run, folder: Path, formats: Sequence[str], names: Sequence[str] | None = None) -> list[Path]:
    """Draw all figures that the scores of a run allow into ``folder``, in each format; return the files.

    ``names`` are the videos whose curves are drawn. ``UserError`` without scores or truth, and for unknown names.
    """
    tested = run.tested
    if tested is None or tested.videos.truth is None:
        raise UserError(f"{run.folder} holds no scores with truth, which the figures need")
    chosen = _chosen(tested, names) if names else tested
    paths = []
    # Text stays text, in a font that publishers accept.
    with matplotlib.rc_context({"pdf.fonttype": 42, "font.size": 8}):
        figures = _draw_all(tested)
        for suffix in formats:
            for name, figure in figures.items():
                paths.append(folder / f"{name}.{suffix}")
                save_figure(figure, paths[-1], dpi=300)
            paths.append(folder / f"curves.{suffix}")
            draw_score_curves(paths[-1], chosen.scores, chosen.videos)
    return paths


def _draw_all(tested: TestResult) -> dict[str, Figure]:
    """Return the figures by name; none where all frames are abnormal or all normal."""
    pooled = pool(tested.scores, tested.videos)
    figures = {"confusion": _draw_confusion(tested.videos.dataset.labels, pooled)}
    for name, curve_of, key, axes in (
        ("roc", roc, "auc", ("false positive rate", "true positive rate")),
        ("precision_recall", precision_recall, "ap", ("recall", "precision")),
    ):
        curves = [curve_of(curve, pooled.positives, pooled.frames) for curve in pooled.anomaly]
        areas = [snippet_metrics(curve, pooled.positives, pooled.frames)[key] for curve in pooled.anomaly]
        figures[name] = _draw_ranking(curves, areas, axes)
    return {name: figure for name, figure in figures.items() if figure is not None}


def _chosen(tested: TestResult, names: Sequence[str]) -> TestResult:
    known = {entry.video: index for index, entry in enumerate(tested.videos.entries)}
    for name in names:
        if name not in known:
            raise UserError(f"there is no test video {name!r}{nearest(name, known)}")
    return tested.only([known[name] for name in names])


def _draw_ranking(curves: Sequence[Curve | None], areas: Sequence[float], names: tuple[str, str]) -> Figure | None:
    known = [curve for curve in curves if curve]
    if len(known) < len(curves):
        return None
    figure = Figure(figsize=(_COLUMN, _COLUMN), layout="constrained")
    axis = figure.subplots()
    for number, (curve, area) in enumerate(zip(known, areas, strict=True)):
        points, branch = thin(curve), BRANCHES.get(str(number + 1), f"branch {number + 1}")
        colour = _COLOURS[number % len(_COLOURS)]
        axis.plot(points.x, points.y, color=colour, lw=1.4, label=f"{branch} ({100 * area:.2f})")
    axis.set(xlabel=names[0], ylabel=names[1], xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_confusion(labels: Sequence[str], pooled: PooledScores) -> Figure | None:
    """Draw the percentage of each true class's frames by predicted class."""
    found = class_confusion(labels, pooled)
    if found is None:
        return None
    shares = 100 * found.table / np.maximum(found.table.sum(axis=1, keepdims=True), 1)
    size = max(_COLUMN, 0.34 * len(found.labels) + 1.4)
    figure = Figure(figsize=(size, size), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    places = range(len(found.labels))
    axis.set_xticks(places, found.labels, rotation=90)
    axis.set_yticks(places, found.labels)
    axis.set(xlabel=f"predicted at threshold {found.threshold:.3g}", ylabel="true class, percent of its frames")
    for row, column in zip(*np.nonzero(shares >= 0.5), strict=True):
        dark = shares[row, column] > 55
        axis.text(
            column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color="white" if dark else "black"
        )
    return figure
