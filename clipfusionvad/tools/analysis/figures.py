"""What the figures of the analyses share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfusionvad.report.scores import abnormal_spans

# matplotlib is imported by the first figure, so that --help is fast.
if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:
    Axes = Figure = Any

COARSE_COLOUR, FINE_COLOUR, TRUTH_COLOUR, TRUTH_BAR, GREY = "#1f4e79", "#d98200", "#f4b6a6", "#c4452d", "#8a8a8a"
COLOURS = (COARSE_COLOUR, FINE_COLOUR, "#5b8c5a", "#8e5ea2", "#b0413e")


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """Return an empty figure of this size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def hide_spines(*axes: Axes) -> None:
    """Remove the upper and right line of the frames."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)


def legend_above(figure: Figure, axis: Axes, title: str | None = None) -> None:
    """Put the legend of an axis above the whole figure."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9, title=title)


def draw_matrix(axis: Axes, matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str], **settings: Any) -> Any:
    """Draw a matrix (R, C) as an image with named rows and columns; return the image."""
    image = axis.imshow(matrix, **settings)
    axis.set_xticks(range(len(columns)), columns, rotation=90)
    axis.set_yticks(range(len(rows)), rows)
    return image


def shade(axis: Axes, truth: np.ndarray, step: float = 1.0) -> None:
    """Shade the abnormal stretches of snippets (n,), each ``step`` units wide."""
    for start, end in abnormal_spans(truth > 0):
        axis.axvspan(start * step, end * step, color=TRUTH_COLOUR, lw=0, zorder=0)


def mark_truth(axis: Axes, truth: np.ndarray) -> None:
    """Draw bars beside both axes of a matrix of snippets, (n,) along each, where they are abnormal."""
    for along_x in (True, False):
        strip = axis.inset_axes((0, 1.005, 1, 0.025) if along_x else (-0.03, 0, 0.025, 1))
        strip.set(xlim=axis.get_xlim(), ylim=(0, 1)) if along_x else strip.set(ylim=axis.get_ylim(), xlim=(0, 1))
        for start, end in abnormal_spans(truth > 0):
            (strip.axvspan if along_x else strip.axhspan)(start - 0.5, end - 0.5, color=TRUTH_BAR, lw=0)
        strip.axis("off")
    axis.tick_params(axis="y", pad=8)
