"""What the papers report: frame-level AUC and AP, of all frames and of each class, and fine-grained detection mAP.

Scores are those of frames, or of snippets weighted by their frames.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from clipfusionvad.metrics.detection import IOUS as IOUS
from clipfusionvad.metrics.detection import DetectionResult as DetectionResult
from clipfusionvad.metrics.detection import corrected_detection_map as corrected_detection_map
from clipfusionvad.metrics.detection import detection_map as detection_map

#: The score above which a frame of a normal video is a false alarm (section "false alarm rate" of UCF-Crime's paper).
FALSE_ALARM = 0.5


def frame_metrics(scores: ArrayLike, gt: ArrayLike, anomalous: ArrayLike | None = None) -> dict[str, float]:
    """Return the ranking metrics of one score per frame, the frames of all test videos joined.

    scores (N,) finite, higher is more anomalous; gt (N,) 0 or 1; anomalous (N,) bool marks frames of anomalous
    videos. Returns in 0..1 ``"auc"``; ``"ap"``, the step-wise average precision (scikit-learn's); ``"ap_trapezoid"``,
    the area under the linearly joined precision-recall curve, which is larger where scores tie; and, with
    ``anomalous``, ``"ano_auc"``, the AUC over those frames only, and ``"far"``, the false alarm rate: the share of the
    other frames with a score above 0.5. A metric without the frames that it needs is NaN. Raises ``ValueError`` for
    other input.
    """
    gt = _truth(gt)
    return snippet_metrics(scores, gt, np.ones_like(gt), anomalous)


def snippet_metrics(
    scores: ArrayLike, positives: ArrayLike, frames: ArrayLike, anomalous: ArrayLike | None = None
) -> dict[str, float]:
    """Return what ``frame_metrics`` gives for scores repeated ``frames`` times, without repeating them.

    scores (n,), one per snippet; positives (n,), abnormal frames of the snippet; frames (n,), all its frames (see
    ``count_frames``); anomalous (n,) bool, whether its video is. Raises ``ValueError`` as ``frame_metrics`` does.
    """
    scores, positives, frames = (np.asarray(values, dtype=np.float64) for values in (scores, positives, frames))
    named = {"scores": scores, "truth": positives, "frames": frames}
    if anomalous is not None:
        named["anomalous"] = anomalous = np.asarray(anomalous, dtype=bool)
    if scores.ndim != 1 or any(values.shape != scores.shape for values in named.values()):
        shapes = ", ".join(f"{name} {values.shape}" for name, values in named.items())
        raise ValueError(f"scores and truth must be vectors of one length, not {shapes}")
    if not np.isfinite(scores).all():
        raise ValueError(f"score {np.flatnonzero(~np.isfinite(scores))[0]} is not finite")
    if not ((positives >= 0) & (positives <= frames)).all():
        raise ValueError("a snippet cannot hold fewer than 0 abnormal frames, nor more than it has frames")
    metrics = dict(zip(("auc", "ap", "ap_trapezoid"), _ranking(scores, positives, frames), strict=True))
    if anomalous is not None:
        metrics["ano_auc"], *_ = _ranking(scores[anomalous], positives[anomalous], frames[anomalous])
        normal = frames[~anomalous]
        metrics["far"] = float(normal @ (scores[~anomalous] > FALSE_ALARM) / normal.sum()) if normal.any() else math.nan
    return metrics


def snippet_edges(snippets: int, frames: int, stride: int | None = 16) -> np.ndarray:
    """Return the edges (snippets + 1,) of a video's snippets: snippet i covers the frames edges[i] … edges[i + 1] - 1.

    A snippet has ``stride`` frames, the last one all that remain, those past the end none. With ``stride`` None,
    snippet i of n covers an equal part: floor(i · frames / n) … floor((i + 1) · frames / n) - 1.
    """
    if stride is None:
        return np.arange(snippets + 1) * frames // max(snippets, 1)
    edges = np.minimum(np.arange(snippets + 1) * stride, frames)
    edges[-1] = frames
    return edges


def count_frames(gt_frames: ArrayLike, snippets: int, stride: int | None = 16) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of abnormal and of all frames of one video's snippets: two (snippets,) int64 vectors.

    gt_frames (F,) 0 or 1; the snippets are those of ``snippet_edges``. Raises ``ValueError`` for truth that is not 0/1
    and for frames without a snippet.
    """
    gt_frames = _truth(gt_frames)
    if snippets < 1 and len(gt_frames):
        raise ValueError(f"no snippet for {len(gt_frames)} frames")
    edges = snippet_edges(snippets, len(gt_frames), stride)
    abnormal_before = np.concatenate([[0], np.cumsum(gt_frames)])
    return np.diff(abnormal_before[edges]), np.diff(edges)


def _truth(gt: ArrayLike) -> np.ndarray:
    gt = np.asarray(gt)
    if gt.ndim != 1 or not ((gt == 0) | (gt == 1)).all():
        raise ValueError("frame truth must be a vector of 0 and 1")
    return gt.astype(np.int64)


def _ranking(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> tuple[float, float, float]:
    """Return AUC, AP (step) and AP (trapezoid) of snippets weighted by their abnormal and normal frames.

    scikit-learn with sample weights gives the same numbers in six times the time (``benchmarks/ranking.py``).
    """
    order = np.argsort(-scores)
    order = order[frames[order] > 0]
    ranked = scores[order]
    threshold = np.append(ranked[1:] != ranked[:-1], True)[: len(ranked)]
    found, seen = (np.cumsum(counts[order])[threshold] for counts in (positives, frames))
    wrong = seen - found
    if not len(order) or not found[-1] or not wrong[-1]:
        return math.nan, math.nan, math.nan
    gained, precision = np.diff(found, prepend=0), found / seen
    area = np.sum(np.diff(wrong, prepend=0) * (found - gained / 2))
    # The curve begins at recall 0 with precision 1.
    joined = (precision + np.append(1, precision[:-1])) / 2
    steps, trapezoids = (float(np.sum(gained * height) / found[-1]) for height in (precision, joined))
    return float(area / (found[-1] * wrong[-1])), steps, trapezoids


def class_metrics(
    class_probs: ArrayLike, positives: ArrayLike, frames: ArrayLike, class_labels: Sequence[str]
) -> dict[str, Any]:
    """Return one-vs-rest AUC and AP of each anomalous class, and their means (AnomalyCLIP's mAUC and mAP).

    class_probs (n, C) of each snippet, class 0 normal; positives (n, C), frames of the snippet in each class; frames
    (n,), all its frames. A class's negatives are all frames outside it, normal ones included. Returns ``{"mauc",
    "mean_ap", "per_class": {label: {"auc", "ap"}}}`` in 0..1, without classes that do not occur; the means also leave
    out those without negatives. Source: AnomalyCLIP, section 4.1, and its released code.
    """
    class_probs, positives = np.asarray(class_probs), np.asarray(positives)
    per_class = {}
    for column, label in enumerate(class_labels[1:], start=1):
        if positives[:, column].any():
            found = snippet_metrics(class_probs[:, column], positives[:, column], frames)
            per_class[label] = {name: found[name] for name in ("auc", "ap")}
    means = {}
    for name, key in (("mauc", "auc"), ("mean_ap", "ap")):
        values = [found[key] for found in per_class.values()]
        means[name] = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
    return means | {"per_class": per_class}


def video_score(scores: np.ndarray) -> float:
    """Pool a video's snippet scores (L,) into one, by which video-level AUC and AP rank videos.

    It is the mean of the floor(L / 16) + 1 largest, however training pools.
    """
    count = len(scores) // 16 + 1
    return float(np.partition(scores, len(scores) - count)[-count:].mean(dtype=np.float64))


def smooth_scores(scores: ArrayLike, sigma: float) -> np.ndarray:
    """Smooth one video's scores (n,) or class probabilities (n, C) over time with a Gaussian, rows still sum to 1.

    ``sigma``, its standard deviation in snippets, is at least 0, which leaves the scores as they are. The scores are
    mirrored at both ends (the default of ``scipy.ndimage.gaussian_filter1d``). Returns float32 or float64.
    """
    scores = np.asarray(scores)
    if not sigma:
        return scores
    from scipy.ndimage import gaussian_filter1d

    return gaussian_filter1d(scores.astype(np.result_type(scores, np.float32)), sigma, axis=0)
