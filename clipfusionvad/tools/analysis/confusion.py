"""Which classes are taken for which: frames, and whole videos.

C classes, of which 0 is *normal*; K columns: C, or two for a method without class probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clipfusionvad.io.errors import UserError
from clipfusionvad.report.scores import Tested
from clipfusionvad.tools.analysis.figures import draw_matrix, new_figure
from clipfusionvad.tools.analysis.result import AnalysisResult, table_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ANOMALOUS = "anomalous"


@dataclass(frozen=True)
class Confusion:
    """``table`` (C, K): how many frames or videos of each true class (rows) are taken for which (columns).

    A frame or video of several classes counts in the row of each. It is taken for anomalous if its score reaches
    ``threshold``, which maximises Youden's index on this very test.
    """

    table: np.ndarray
    threshold: float

    @property
    def shares(self) -> np.ndarray:
        """Each row over its sum, (C, K); 0 where a class does not occur."""
        return self.table / np.maximum(self.table.sum(axis=1, keepdims=True), 1)


def confuse_frames(test: Tested) -> Confusion:
    """Count all frames of all test videos, by the main branch and the class probabilities."""
    from clipfusionvad.report.curves import pool

    pooled = pool(test.scores, test.videos)
    return _confuse(pooled.truth, pooled.anomaly[0], pooled.classes, pooled.positives, pooled.frames)


def confuse_videos(test: Tested) -> Confusion:
    """Count whole videos, by the top-k means of their scores that training uses too."""
    videos = test.videos
    anomaly = np.array([float(_top(video.anomaly[0])) for video in test.scores])
    classes = [_top(video.classes.T) for video in test.scores if video.classes is not None]
    truth = np.stack([videos.dataset.encode(entry.label) for entry in videos.entries]).astype(np.int64)
    abnormal = videos.anomalous.astype(np.int64)
    return _confuse(truth, anomaly, np.stack(classes) if classes else None, abnormal, np.ones_like(abnormal))


def _confuse(
    truth: np.ndarray, anomaly: np.ndarray, classes: np.ndarray | None, positives: np.ndarray, counts: np.ndarray
) -> Confusion:
    """Confuse n items: truth (n, C) counts, anomaly (n,), classes (n, C) or None, positives (n,) of counts (n,)."""
    from clipfusionvad.report.curves import best_threshold, predicted_classes, roc

    curve = roc(anomaly, positives, counts)
    threshold = best_threshold(curve) if curve else 0.5
    columns = truth.shape[1] if classes is not None else 2
    predicted = np.eye(columns, dtype=np.int64)[predicted_classes(anomaly, classes, threshold)]
    return Confusion(truth.T @ predicted, threshold)


def _top(curves: np.ndarray) -> np.ndarray:
    """Return the top-k means of curves (…, n): (…,)."""
    import torch

    from clipfusionvad.losses import topk_mean

    rows = torch.from_numpy(np.atleast_2d(curves).astype(np.float32))
    means = topk_mean(rows, torch.full((len(rows),), rows.shape[1])).numpy()
    return means.reshape(curves.shape[:-1])


def draw_confusion(labels: Sequence[str], columns: Sequence[str], frames: Confusion, videos: Confusion) -> Figure:
    """Draw both tables: the shares of each row as colours, the numbers in the cells."""
    figure = new_figure(2 * (0.42 * len(columns) + 2.6), 0.36 * len(labels) + 2.4)
    left, right = figure.subplots(1, 2)
    _draw(left, labels, columns, frames, np.round(100 * frames.shares), "frames")
    left.set_title("frames, percent of each row", fontsize=10, loc="left")
    _draw(right, labels, columns, videos, videos.table, "videos")
    right.set_title("videos, counted", fontsize=10, loc="left")
    return figure


def _draw(
    axis: Axes, labels: Sequence[str], columns: Sequence[str], found: Confusion, numbers: np.ndarray, unit: str
) -> None:
    totals = found.table.sum(axis=1)
    present = np.flatnonzero(totals)
    shares = found.shares[present]
    rows = [f"{labels[row]} ({totals[row]:,})" for row in present]
    draw_matrix(axis, shares, rows, columns, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xlabel(f"taken for (anomalous from a score of {found.threshold:.3g} on)")
    axis.set_ylabel(f"true class ({unit})")
    for row, column in zip(*np.nonzero(numbers[present] > 0), strict=True):
        colour = "white" if shares[row, column] > 0.55 else "black"
        text = str(int(numbers[present[row], column]))
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)


def confusion(test: Tested) -> AnalysisResult:
    """Which classes are taken for which, by frames and videos."""
    import pandas as pd

    labels = test.videos.dataset.labels
    frames, videos = confuse_frames(test), confuse_videos(test)
    if not frames.table[1:].any():
        raise UserError("no frame of these videos is annotated as anomalous")
    columns = labels if frames.table.shape[1] == len(labels) else [labels[0], ANOMALOUS]
    rows = [
        (unit, labels[row], columns[column], int(count), float(found.shares[row, column]))
        for unit, found in (("frames", frames), ("videos", videos))
        for (row, column), count in np.ndenumerate(found.table)
    ]
    numbers = pd.DataFrame(rows, columns=["unit", "true_class", "taken_for", "count", "share"])
    short = pd.DataFrame(_summary(labels, columns, frames, videos))
    return AnalysisResult(numbers, draw_confusion(labels, columns, frames, videos), [table_text(short)])


def _summary(
    labels: Sequence[str], columns: Sequence[str], frames: Confusion, videos: Confusion
) -> list[dict[str, object]]:
    """Return by class the share found, and the class that most of the rest is taken for."""
    rows: list[dict[str, object]] = []
    for row in np.flatnonzero(frames.table.sum(axis=1)):
        right = min(int(row), len(columns) - 1)
        others = np.where(np.arange(len(columns)) == right, -1, frames.table[row])
        wrong = int(others.argmax())
        rows.append(
            {
                "class": labels[row],
                "frames right": float(frames.shares[row, right]),
                "else mostly": f"{columns[wrong]} ({100 * frames.shares[row, wrong]:.0f} %)"
                if others[wrong] > 0
                else "-",
                "videos right": int(videos.table[row, right]),
                "of": int(videos.table[row].sum()),
            }
        )
    return rows
