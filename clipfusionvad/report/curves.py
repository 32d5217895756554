"""The curves and tables behind a test's page: ROC, precision and recall, confusion, errors of videos.

S snippets of all test videos, C classes (0 is *normal*). A snippet counts by its frames: ``positives`` (S,) of them
are abnormal, ``frames`` (S,) there are in all (``metrics.count_frames``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clipfusionvad.data.truth import frames_from_segments
from clipfusionvad.engine.evaluator import VideoScores, VideoSet
from clipfusionvad.metrics import count_frames


@dataclass(frozen=True)
class PooledScores:
    """The snippets of all test videos, joined: their scores and the frames behind them.

    anomaly (branches, S), classes (S, C) or None, positives (S,), frames (S,), snippets (N,) of each video.
    ``truth`` (S, C) frames of each class: those that are not abnormal are normal, and a frame that was annotated with
    several classes is in the column of each.
    """

    anomaly: np.ndarray
    classes: np.ndarray | None
    positives: np.ndarray
    frames: np.ndarray
    truth: np.ndarray
    snippets: np.ndarray


def pool(scores: Sequence[VideoScores], videos: VideoSet) -> PooledScores:
    """Join the scores of videos whose truth is known."""
    snippets = [video.anomaly.shape[1] for video in scores]
    judged = [_judge(videos, index, count) for index, count in enumerate(snippets)]
    positives, frames, truth = (np.concatenate(part) for part in zip(*judged, strict=True))
    return PooledScores(
        np.concatenate([video.anomaly for video in scores], axis=1),
        None if scores[0].classes is None else np.concatenate([video.classes for video in scores]),
        positives,
        frames,
        truth,
        np.array(snippets),
    )


def _judge(videos: VideoSet, index: int, snippets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one video's snippets: abnormal frames (n,), all frames (n,), frames of each class (n, C)."""
    truth, labels = videos.known_truth, videos.dataset.labels
    positives, frames = count_frames(truth.frames[index], snippets, videos.frames_per_snippet)
    table = np.zeros((snippets, len(labels)), dtype=np.int64)
    table[:, 0] = frames - positives
    for label in set(truth.labels[index]) & set(labels[1:]):
        named = zip(truth.segments[index], truth.labels[index], strict=True)
        own = frames_from_segments([span for span, name in named if name == label], len(truth.frames[index]))
        table[:, labels.index(label)] = count_frames(own, snippets, videos.frames_per_snippet)[0]
    return positives, frames, table


class Curve(NamedTuple):
    """Points of a curve and the score from which on a frame counts as abnormal at each, all (n,)."""

    x: np.ndarray
    y: np.ndarray
    thresholds: np.ndarray


def roc(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> Curve | None:
    """False positive rate, true positive rate over all frames; None where the frames are of one kind."""
    from sklearn.metrics import roc_curve

    weighted = _by_kind(scores, positives, frames)
    return Curve(*roc_curve(*weighted[:2], sample_weight=weighted[2])) if weighted else None


def precision_recall(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> Curve | None:
    """Recall, precision over all frames, from every frame to none; None where the frames are of one kind."""
    from sklearn.metrics import precision_recall_curve

    weighted = _by_kind(scores, positives, frames)
    if not weighted:
        return None
    precision, recall, thresholds = precision_recall_curve(*weighted[:2], sample_weight=weighted[2])
    # The last point, precision 1 at recall 0, is a convention without a threshold.
    return Curve(recall, precision, np.append(thresholds, np.inf))


def _by_kind(
    scores: np.ndarray, positives: np.ndarray, frames: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Every snippet as its abnormal and its normal frames: truth, scores, weights; without those of no frame."""
    weights = np.concatenate([positives, frames - positives])
    truth, counted = np.repeat([1, 0], len(scores)), weights > 0
    truth = truth[counted]
    if truth.all() or not truth.any():
        return None
    return truth, np.tile(scores, 2)[counted].astype(np.float64), weights[counted]


def thin(curve: Curve, points: int = 400) -> Curve:
    """At most so many points of a curve, evenly along its way, its ends among them."""
    way = np.concatenate([[0], np.cumsum(np.abs(np.diff(curve.x)) + np.abs(np.diff(curve.y)))])
    kept = np.unique(np.searchsorted(way, np.linspace(0, way[-1], points)))
    return Curve(*(values[np.union1d(kept, [0, len(way) - 1])] for values in curve)) if len(way) > points else curve


def best_threshold(curve: Curve) -> float:
    """The score at which true positive rate - false positive rate of a ROC curve is greatest (Youden's index).

    Infinite where no score does better than calling every frame normal.
    """
    return float(curve.thresholds[np.argmax(curve.y - curve.x)])


def predicted_classes(anomaly: np.ndarray, classes: np.ndarray | None, threshold: float) -> np.ndarray:
    """What a snippet is taken for, (S,): 0 below the threshold, else the likeliest of the anomalous classes.

    anomaly (S,), classes (S, C). Without classes an anomalous snippet is 1.
    """
    likeliest = 1 if classes is None else 1 + np.argmax(classes[:, 1:], axis=1)
    return np.where(anomaly >= threshold, likeliest, 0)


class Confusion(NamedTuple):
    """Frames of each true class (rows of ``table``) by the class that they are taken for (columns)."""

    labels: list[str]
    table: np.ndarray
    threshold: float


def class_confusion(labels: Sequence[str], pooled: PooledScores) -> Confusion | None:
    """Which classes are taken for which, at the threshold that suits the main branch best.

    ``labels`` (C,), the normal one first. Without class probabilities there are two, normal and anomalous. None
    where the frames are all of one kind.
    """
    curve = roc(pooled.anomaly[0], pooled.positives, pooled.frames)
    if curve is None:
        return None
    truth, threshold = pooled.truth, best_threshold(curve)
    if pooled.classes is None:
        labels, truth = [labels[0], "anomalous"], np.stack([truth[:, 0], pooled.positives], axis=1)
    table = confusion(truth, predicted_classes(pooled.anomaly[0], pooled.classes, threshold))
    return Confusion(list(labels), table, threshold)


def confusion(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Frames of each true class (rows) by the class that they are taken for (columns): (C, C).

    truth (S, C) frames of each class, predicted (S,) a class.
    """
    table = np.zeros((truth.shape[1], truth.shape[1]), dtype=np.int64)
    np.add.at(table.T, predicted, truth)
    return table


def video_error(anomaly: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> float:
    """Mean |score - truth| over one video's frames; NaN for a video without frames."""
    total = frames.sum()
    return float((positives * (1 - anomaly) + (frames - positives) * anomaly).sum() / total) if total else float("nan")


def bucket_means(steps: np.ndarray, values: np.ndarray, points: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """A long series by means of equal stretches, at most ``points`` of them: the last steps (n,), the means (n, k)."""
    size = -(-len(steps) // points)
    starts = np.arange(0, len(steps), max(size, 1))
    counts = np.diff(starts, append=len(steps))
    return steps[starts + counts - 1], np.add.reduceat(values, starts, axis=0) / counts[:, None]
