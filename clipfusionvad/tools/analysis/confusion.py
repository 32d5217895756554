"""Which classes are taken for which: frames, and whole videos.

C classes, of which 0 is *normal*; K columns: C, or two where the method does not tell classes apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from clipfusionvad.io.errors import UserError
from clipfusionvad.losses import topk_mean
from clipfusionvad.report.curves import best_threshold, pool, predicted_classes, roc
from clipfusionvad.report.scores import TestResult
from clipfusionvad.tools.analysis.result import Insight, Table

ANOMALOUS = "anomalous"


@dataclass(frozen=True)
class Confusion:
    """``table`` (C, K): how many frames or videos of each true class are taken for what.

    A frame or video of several classes is in the row of each. Taken for anomalous is what reaches ``threshold``, the
    one that suits this very test best (Youden's index).
    """

    table: np.ndarray
    threshold: float

    @property
    def shares(self) -> np.ndarray:
        """Each row over its sum, (C, K); 0 where a class does not occur."""
        return self.table / np.maximum(self.table.sum(axis=1, keepdims=True), 1)


def confuse_frames(tested: TestResult) -> Confusion:
    """All frames of all test videos, by the main branch and the class probabilities."""
    pooled = pool(tested.scores, tested.videos)
    curve = roc(pooled.anomaly[0], pooled.positives, pooled.frames)
    threshold = best_threshold(curve) if curve else 0.5
    return Confusion(_count(pooled.truth, pooled.anomaly[0], pooled.classes, threshold), threshold)


def confuse_videos(tested: TestResult) -> Confusion:
    """Whole videos, by the top-k means of their scores that training uses too."""
    videos = tested.videos
    anomaly = np.array([float(_top(video.anomaly[0])) for video in tested.scores])
    known = [video.classes for video in tested.scores if video.classes is not None]
    classes = np.stack([_top(found.T) for found in known]) if known else None
    truth = np.stack([videos.dataset.encode(entry.label) for entry in videos.entries]).astype(np.int64)
    abnormal = videos.anomalous.astype(np.int64)
    curve = roc(anomaly, abnormal, np.ones_like(abnormal))
    threshold = best_threshold(curve) if curve else 0.5
    return Confusion(_count(truth, anomaly, classes, threshold), threshold)


def _count(truth: np.ndarray, anomaly: np.ndarray, classes: np.ndarray | None, threshold: float) -> np.ndarray:
    """truth (n, C) counts, anomaly (n,), classes (n, C) or None → (C, K)."""
    columns = truth.shape[1] if classes is not None else 2
    return truth.T @ np.eye(columns, dtype=np.int64)[predicted_classes(anomaly, classes, threshold)]


def _top(curves: np.ndarray) -> np.ndarray:
    """Top-k means of curves (…, n): (…,)."""
    rows = torch.from_numpy(np.atleast_2d(curves).astype(np.float32))
    means = topk_mean(rows, torch.full((len(rows),), rows.shape[1])).numpy()
    return means.reshape(curves.shape[:-1])


def draw_confusion(labels: list[str], columns: list[str], frames: Confusion, videos: Confusion) -> Figure:
    """Both tables, the shares of each row as colours, the numbers in the cells."""
    height = 0.36 * len(labels) + 2.4
    figure = Figure(figsize=(2 * (0.42 * len(columns) + 2.6), height), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, labels, columns, frames, np.round(100 * frames.shares), "frames")
    left.set_title("frames, percent of each row", fontsize=10, loc="left")
    _draw(right, labels, columns, videos, videos.table, "videos")
    right.set_title("videos, counted", fontsize=10, loc="left")
    return figure


def _draw(
    axis: matplotlib.axes.Axes, labels: list[str], columns: list[str], found: Confusion, numbers: np.ndarray, unit: str
) -> None:
    present = np.flatnonzero(found.table.sum(axis=1))
    shares = found.shares[present]
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    totals = found.table.sum(axis=1)[present]
    rows = [f"{labels[row]} ({total:,})" for row, total in zip(present, totals, strict=True)]
    axis.set_xticks(range(len(columns)), columns, rotation=90)
    axis.set_yticks(range(len(present)), rows)
    axis.set_xlabel(f"taken for (anomalous from a score of {found.threshold:.3g} on)")
    axis.set_ylabel(f"true class ({unit})")
    for row, column in zip(*np.nonzero(numbers[present] > 0), strict=True):
        colour = "white" if shares[row, column] > 0.55 else "black"
        number = int(numbers[present[row], column])
        axis.text(column, row, str(number), ha="center", va="center", fontsize=8, color=colour)


def confusion_insight(tested: TestResult) -> Insight:
    """Both confusions as one table and one picture; ``UserError`` without an anomalous frame."""
    labels = tested.videos.dataset.labels
    frames, videos = confuse_frames(tested), confuse_videos(tested)
    if not frames.table[1:].any():
        raise UserError("no frame of these videos is annotated as anomalous")
    columns = labels if frames.table.shape[1] == len(labels) else [labels[0], ANOMALOUS]
    rows = [
        (unit, labels[row], columns[column], int(count), float(found.shares[row, column]))
        for unit, found in (("frames", frames), ("videos", videos))
        for (row, column), count in np.ndenumerate(found.table)
    ]
    table = Table(("unit", "true_class", "taken_for", "count", "share"), rows)
    return Insight(table, draw_confusion(labels, columns, frames, videos), [_summary(labels, columns, frames, videos)])


def _summary(labels: list[str], columns: list[str], frames: Confusion, videos: Confusion) -> str:
    """By class: the share found, and what it is mostly taken for otherwise."""
    rows = []
    for row in np.flatnonzero(frames.table.sum(axis=1)):
        right = min(int(row), len(columns) - 1)
        others = np.where(np.arange(len(columns)) == right, -1, frames.table[row])
        wrong = int(others.argmax())
        most = f"{columns[wrong]} ({100 * frames.shares[row, wrong]:.0f} %)" if others[wrong] > 0 else "-"
        share = float(frames.shares[row, right])
        rows.append((labels[row], share, most, int(videos.table[row, right]), int(videos.table[row].sum())))
    return Table(("class", "frames right", "else mostly", "videos right", "of"), rows).text()
