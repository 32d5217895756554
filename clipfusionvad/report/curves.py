"""The curves and tables behind a test's page: ROC, precision and recall, confusion, errors of videos.

S snippets of all test videos, C classes (0 is *normal*). A snippet counts as its frames: ``frames`` (S,) in all, of
which ``positives`` (S,) are abnormal (``metrics.count_frames``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clipfusionvad.data.truth import frames_from_segments
from clipfusionvad.engine.evaluator import VideoDataset, VideoScores
from clipfusionvad.metrics import count_frames


@dataclass(frozen=True)
class PooledScores:
    """The snippets of all test videos, joined: their scores and the frames behind them.

    anomaly (branches, S), classes (S, C) or None, positives (S,), frames (S,), snippets (N,) of each video.
    ``truth`` (S, C) counts the frames of each class; a frame annotated with several classes counts for each.
    """

    anomaly: np.ndarray
    classes: np.ndarray | None
    positives: np.ndarray
    frames: np.ndarray
    truth: np.ndarray
    snippets: np.ndarray


def pool(scores: Sequence[VideoScores], videos: VideoDataset) -> PooledScores:
    """Join the scores of videos whose truth is known."""
    snippets = [video.anomaly.shape[1] for video in scores]
    counted = [_count_truth(videos, index, count) for index, count in enumerate(snippets)]
    anomaly = np.concatenate([video.anomaly for video in scores], axis=1)
    classes = None if scores[0].classes is None else np.concatenate([video.classes for video in scores])
    positives, frames, truth = (np.concatenate(part) for part in zip(*counted, strict=True))
    return PooledScores(anomaly, classes, positives, frames, truth, np.array(snippets))


def _count_truth(videos: VideoDataset, index: int, snippets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count frames behind one video's snippets: abnormal ones (n,), all (n,), those of each class (n, C)."""
    truth, labels, stride = videos.known_truth, videos.dataset.labels, videos.frames_per_snippet
    positives, frames = count_frames(truth.frames[index], snippets, stride)
    table = np.zeros((snippets, len(labels)), dtype=np.int64)
    table[:, 0] = frames - positives
    for label in set(truth.labels[index]) & set(labels[1:]):
        named = zip(truth.segments[index], truth.labels[index], strict=True)
        of_class = frames_from_segments([span for span, name in named if name == label], len(truth.frames[index]))
        table[:, labels.index(label)] = count_frames(of_class, snippets, stride)[0]
    return positives, frames, table


class Curve(NamedTuple):
    """Points of a curve, and for each the lowest score that counts as abnormal, all (n,)."""

    x: np.ndarray
    y: np.ndarray
    thresholds: np.ndarray


def roc(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> Curve | None:
    """Return false and true positive rate over all frames; None where all frames are abnormal or all normal."""
    from sklearn.metrics import roc_curve

    weighted = _by_kind(scores, positives, frames)
    return Curve(*roc_curve(**weighted)) if weighted else None


def precision_recall(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> Curve | None:
    """Return recall and precision over all frames; None where all frames are abnormal or all normal."""
    from sklearn.metrics import precision_recall_curve

    if not (weighted := _by_kind(scores, positives, frames)):
        return None
    precision, recall, thresholds = precision_recall_curve(**weighted)
    # The last point, precision 1 at recall 0, is a convention without a threshold.
    return Curve(recall, precision, np.append(thresholds, np.inf))


def _by_kind(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> dict[str, np.ndarray] | None:
    """Split every snippet into its abnormal and its normal frames, with their numbers as weights."""
    weights = np.concatenate([positives, frames - positives])
    counted = weights > 0
    truth = np.repeat([1, 0], len(scores))[counted]
    scores = np.tile(scores, 2)[counted].astype(np.float64)
    both = truth.any() and not truth.all()
    return {"y_true": truth, "y_score": scores, "sample_weight": weights[counted]} if both else None


def thin(curve: Curve, points: int = 400) -> Curve:
    """Reduce a curve to at most ``points`` points, evenly along its length, both ends included."""
    way = np.concatenate([[0], np.cumsum(np.abs(np.diff(curve.x)) + np.abs(np.diff(curve.y)))])
    kept = np.unique(np.searchsorted(way, np.linspace(0, way[-1], points)))
    return Curve(*(values[np.union1d(kept, [0, len(way) - 1])] for values in curve)) if len(way) > points else curve


def best_threshold(curve: Curve) -> float:
    """Return the score with the greatest Youden's index, true minus false positive rate; infinite if none gains."""
    return float(curve.thresholds[np.argmax(curve.y - curve.x)])


def predicted_classes(anomaly: np.ndarray, classes: np.ndarray | None, threshold: float) -> np.ndarray:
    """anomaly (S,), classes (S, C) → (S,): 0 below the threshold, else the likeliest anomalous class (1 without)."""
    likeliest = 1 if classes is None else 1 + np.argmax(classes[:, 1:], axis=1)
    return np.where(anomaly >= threshold, likeliest, 0)


class Confusion(NamedTuple):
    """How many items of each true class (rows of ``table``) are taken for which (columns: ``labels``).

    An item is taken for anomalous if its score reaches ``threshold``.
    """

    labels: list[str]
    table: np.ndarray
    threshold: float

    @property
    def shares(self) -> np.ndarray:
        """Each row over its sum, 0 where a class does not occur."""
        return self.table / np.maximum(self.table.sum(axis=1, keepdims=True), 1)


def confuse(
    labels: Sequence[str],
    truth: np.ndarray,
    anomaly: np.ndarray,
    classes: np.ndarray | None,
    positives: np.ndarray,
    counts: np.ndarray,
) -> Confusion:
    """Confuse n items, at the threshold that maximises Youden's index on these very items, else at 0.5.

    truth (n, C) counts; anomaly (n,); classes (n, C), or None: two columns; positives (n,) of counts (n,) abnormal.
    """
    curve = roc(anomaly, positives, counts)
    threshold = best_threshold(curve) if curve else 0.5
    columns = list(labels) if classes is not None else [labels[0], "anomalous"]
    table = truth.T @ np.eye(len(columns), dtype=np.int64)[predicted_classes(anomaly, classes, threshold)]
    return Confusion(columns, table, threshold)


def class_confusion(labels: Sequence[str], pooled: PooledScores) -> Confusion | None:
    """Confuse all frames by the main branch; None where all are of one kind.

    Without class probabilities there are two classes, normal and anomalous.
    """
    if not 0 < pooled.positives.sum() < pooled.frames.sum():
        return None
    truth = pooled.truth if pooled.classes is not None else np.stack([pooled.truth[:, 0], pooled.positives], axis=1)
    return confuse(labels, truth, pooled.anomaly[0], pooled.classes, pooled.positives, pooled.frames)


def video_error(anomaly: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> float:
    """Return the mean |score - truth| over one video's frames; NaN for a video without frames."""
    total = frames.sum()
    return float((positives * (1 - anomaly) + (frames - positives) * anomaly).sum() / total) if total else float("nan")
