"""From a model and a list of videos to scores, and from scores to the metrics of the protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from clipfusionvad.data.features import load_features
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.sampling import split_windows, window_lengths
from clipfusionvad.data.truth import Truth
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.device import autocast
from clipfusionvad.losses import topk_mean
from clipfusionvad.metrics import (
    corrected_detection_map,
    count_frames,
    detection_map,
    frame_metrics,
    snippet_metrics,
)
from clipfusionvad.models.method import WINDOWS_AT_ONCE, Method

# The detection mAP that a protocol reports first: the released procedure, or what the papers say of it.
HEADLINE_MAP = {"paper": "released", "clean": "anomalous_only"}


@dataclass(frozen=True)
class VideoScores:
    """Probabilities of one video's n snippets: anomaly (branches, n), classes (n, C) or None."""

    anomaly: np.ndarray
    classes: np.ndarray | None


class VideoSet:
    """Whole videos of a list, their features read once and kept; ``truth`` where it is known."""

    def __init__(self, entries: Sequence[Entry], dataset: Dataset, width: int, truth: Truth | None = None):
        self.entries, self.dataset, self.width, self.truth = entries, dataset, width, truth

    @cached_property
    def features(self) -> list[np.ndarray]:
        return [load_features(entry.path, self.width) for entry in self.entries]

    @cached_property
    def anomalous(self) -> np.ndarray:
        """Whether each video is anomalous, (N,) bool."""
        return np.array([self.dataset.encode(entry.label)[0] == 0 for entry in self.entries])


def score_videos(
    model: Method, features: Sequence[np.ndarray], device: torch.device, precision: str = "fp32"
) -> list[VideoScores]:
    """Score whole videos, (n, D) each. The model is left in eval mode."""
    model.eval()
    scores: list[VideoScores] = []
    with torch.inference_mode(), autocast(device, precision):
        text = model.encode_text()
        for group in _groups(features, model.visual_length):
            windows = [split_windows(video, model.visual_length)[0] for video in group]
            lengths = [window_lengths(len(video), model.visual_length) for video in group]
            anomaly, classes = model.score_windows(np.concatenate(windows), np.concatenate(lengths), text)
            start = 0
            for video, parts in zip(group, windows, strict=True):
                chosen = slice(start, start + len(video))
                scores.append(VideoScores(anomaly[:, chosen], None if classes is None else classes[chosen]))
                start += parts.shape[0] * parts.shape[1]
    return scores


def _groups(features: Sequence[np.ndarray], length: int) -> Iterator[list[np.ndarray]]:
    """Consecutive videos that fill one forward pass."""
    group: list[np.ndarray] = []
    windows = 0
    for video in features:
        group.append(video)
        windows += len(video) // length + 1
        if windows >= WINDOWS_AT_ONCE:
            yield group
            group, windows = [], 0
    if group:
        yield group


def evaluate(scores: Sequence[VideoScores], videos: VideoSet, protocol: str = "paper") -> dict[str, Any]:
    """The metrics of a test: AUC, AP and Ano-AUC in 0..1 of each branch, detection mAP in percent.

    Keys: ``auc1``, ``ap1``, ``ano_auc1`` of the first branch, ``auc2`` … of the second. Detection mAP comes in
    the variants ``map_released``, ``map_normal_matched`` and ``map_anomalous_only`` (per IoU and "average"; see
    ``metrics.detection``), of which the protocol's own is also ``map`` (per IoU) and ``map_average``.
    """
    truth = videos.truth
    counts = [count_frames(frames, video.anomaly.shape[1]) for frames, video in zip(truth.frames, scores, strict=True)]
    positives = np.concatenate([positive for positive, _ in counts])
    frames = np.concatenate([total for _, total in counts])
    anomalous = np.repeat(videos.anomalous, [len(total) for _, total in counts])
    metrics: dict[str, Any] = {}
    for branch, curve in enumerate(np.concatenate([video.anomaly for video in scores], axis=1), start=1):
        found = snippet_metrics(curve, positives, frames, anomalous)
        metrics |= {f"{name}{branch}": value for name, value in found.items()}
    if scores[0].classes is not None:
        metrics |= _detection_metrics(scores, videos, [total for _, total in counts], HEADLINE_MAP[protocol])
    return metrics


def _detection_metrics(
    scores: Sequence[VideoScores], videos: VideoSet, frames: list[np.ndarray], headline: str
) -> dict[str, Any]:
    classes = [video.classes for video in scores]
    truth, labels = videos.truth, videos.dataset.labels
    variants = {"released": detection_map(classes, truth.segments, truth.labels, labels, frames=frames)}
    variants |= corrected_detection_map(classes, truth.segments, truth.labels, labels, frames=frames)
    by_iou = {name: {str(iou): value for iou, value in found["map"].items()} for name, found in variants.items()}
    metrics = {"map": by_iou[headline], "map_average": variants[headline]["average"]}
    for name, found in variants.items():
        metrics[f"map_{name}"] = by_iou[name] | {"average": found["average"]}
    return metrics


def evaluate_videos(scores: Sequence[VideoScores], videos: VideoSet) -> dict[str, float]:
    """Video-level AUC and AP of each branch (``auc1``, ``ap1``, …), where there is no frame-level truth.

    A video's score is the top-k mean of its snippets, as in training.
    """
    metrics: dict[str, float] = {}
    for branch in range(len(scores[0].anomaly)):
        means = [
            topk_mean(torch.from_numpy(video.anomaly[branch])[None], torch.tensor([video.anomaly.shape[1]])).item()
            for video in scores
        ]
        found = frame_metrics(means, videos.anomalous)
        metrics |= {f"{name}{branch + 1}": value for name, value in found.items()}
    return metrics
