"""Scores of the videos of a list, and the metrics of the protocol from scores."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from clipfusionvad.data.config import FRAMES_PER_SNIPPET
from clipfusionvad.data.features import load_entry, read_video_shape
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.sampling import Sampling
from clipfusionvad.data.truth import Truth, frames_from_segments
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.device import autocast
from clipfusionvad.engine.distributed import gather_objects
from clipfusionvad.engine.run_folder import UNDEFINED
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.progress import ProgressBar
from clipfusionvad.io.rank import rank_info
from clipfusionvad.metrics import (
    class_metrics,
    corrected_detection_map,
    count_frames,
    detection_map,
    frame_metrics,
    smooth_scores,
    snippet_metrics,
    video_score,
)
from clipfusionvad.models.base import Method

#: The standard deviations, in snippets, from which a training with ``--smooth auto`` chooses.
SIGMAS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0)
# The detection mAP that a protocol reports: by the released procedure, or as the papers describe it.
HEADLINE_MAP = {"paper": "released", "clean": "anomalous_only"}


@dataclass(frozen=True)
class VideoScores:
    """Probabilities of one video's n snippets: anomaly (branches, n), classes (n, C) or None."""

    anomaly: np.ndarray
    classes: np.ndarray | None


class VideoDataset:
    """The whole videos of a list, whose features are read once; ``truth`` is None for unannotated videos.

    ``frames_per_snippet`` is None if a snippet is an equal part of its video, which needs ``truth``. The scores of a
    video are means over its ``crops``, by default over the one in the list.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        dataset: Dataset,
        width: int,
        truth: Truth | None = None,
        frames_per_snippet: int | None = FRAMES_PER_SNIPPET,
        crops: Sequence[Sequence[Entry]] | None = None,
    ):
        self.entries, self.dataset, self.width, self.truth = entries, dataset, width, truth
        self.crops = crops or [[entry] for entry in entries]
        self.frames_per_snippet = frames_per_snippet
        self._loaded: dict[int, np.ndarray] = {}

    @property
    def known_truth(self) -> Truth:
        """``truth``; raises ``ValueError`` where there is none."""
        if self.truth is None:
            raise ValueError("these videos have no annotation")
        return self.truth

    @property
    def judged(self) -> int:
        """The number of videos whose frames are judged: 0 without ``truth``."""
        return len({entry.video for entry in self.entries}) if self.truth else 0

    def mean_frames(self, index: int, snippets: int) -> float:
        """Return the frames that a snippet of a video covers, in the mean."""
        return self.frames_per_snippet or len(self.known_truth.frames[index]) / snippets

    @property
    def features(self) -> list[np.ndarray]:
        return self.load(range(len(self.entries)))

    def load(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Return the features of some of the videos."""
        for row in ProgressBar(set(rows) - self._loaded.keys(), "reading features", leave=False):
            self._loaded[row] = load_entry(self.entries[row], self.width)
        return [self._loaded[row] for row in rows]

    def split(self, parts: int) -> list[list[int]]:
        """Divide the videos into parts of about as many snippets each; return the rows of each part."""
        sizes = [
            read_video_shape(entry.paths, self.width) if entry.packed is None else len(entry.packed())
            for entry in self.entries
        ]
        longest_first = np.argsort(-np.array(sizes), kind="stable")
        return [longest_first[part::parts].tolist() for part in range(parts)]

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
    bar = ProgressBar(total=len(features), desc="scoring", unit="video", leave=False)
    with torch.inference_mode(), autocast(device, precision), bar:
        fixed = model.fixed_inputs()
        for counts, windows, lengths in _groups(features, model.sampling, model.windows_at_once):
            # A long video is a group without others and is not copied.
            joined = windows[0] if len(windows) == 1 else np.concatenate(windows)
            anomaly, classes = model.score_windows(joined, np.concatenate(lengths), *fixed)
            start = 0
            for count, parts in zip(counts, windows, strict=True):
                rows = slice(start, start := start + parts.shape[0] * parts.shape[1])
                branches = model.sampling.restore(anomaly[:, rows].T, count).T
                known = None if classes is None else model.sampling.restore(classes[rows], count)
                scores.append(VideoScores(branches, known))
            bar.update(len(counts))
    return scores


def mean_scores(scores: Sequence[VideoScores]) -> VideoScores:
    """Return the mean over the crops of a video."""
    classes = [crop.classes for crop in scores if crop.classes is not None]
    return VideoScores(
        np.mean([crop.anomaly for crop in scores], axis=0), np.mean(classes, axis=0) if classes else None
    )


def score_dataset(
    model: Method, videos: VideoDataset, device: torch.device, precision: str = "fp32"
) -> list[VideoScores]:
    """Score a whole set of videos, each process a part of it; all processes get all scores."""

    def score(rows: Sequence[int]) -> list[VideoScores]:
        """Score some of the videos, of which one crop after another is in memory."""
        if all(len(videos.crops[row]) == 1 for row in rows):
            return score_videos(model, videos.load(rows), device, precision)
        scored = []
        for row in ProgressBar(rows, "scoring all crops", leave=False):
            features = [load_entry(crop, videos.width) for crop in videos.crops[row]]
            scored.append(mean_scores(score_videos(model, features, device, precision)))
        return scored

    if rank_info().world_size == 1:
        return score(range(len(videos.entries)))
    parts = videos.split(rank_info().world_size)
    found = gather_objects(score(parts[rank_info().rank]))
    scores = dict(zip(sum(parts, []), sum(found, []), strict=True))
    return [scores[row] for row in range(len(scores))]


def _groups(
    features: Sequence[np.ndarray], sampling: Sampling, at_once: int
) -> Iterator[tuple[list[int], list[np.ndarray], list[np.ndarray]]]:
    """Yield consecutive videos that fill a forward pass: their snippets, windows, and the lengths of windows."""
    group: list[tuple[int, np.ndarray, np.ndarray]] = []
    for number, video in enumerate(features, start=1):
        group.append((len(video), *sampling.windows(video)))
        if sum(len(windows) for _, windows, _ in group) >= at_once or number == len(features):
            counts, windows, lengths = map(list, zip(*group, strict=True))
            yield counts, windows, lengths
            group = []


def smooth_videos(scores: Sequence[VideoScores], sigma: float) -> Sequence[VideoScores]:
    """Smooth the scores and class probabilities of each video over time, as ``metrics.smooth_scores`` does.

    Both, so that a second branch stays 1 - P(normal), and each snippet's class probabilities still sum to 1.
    """
    if not sigma:
        return scores
    return [
        VideoScores(
            smooth_scores(video.anomaly.T, sigma).T,
            None if video.classes is None else smooth_scores(video.classes, sigma),
        )
        for video in scores
    ]


def choose_smoothing(scores: Sequence[VideoScores], videos: VideoDataset, branch: int) -> dict[float, float]:
    """Return the video-level AUC of ``branch`` (1, 2, …) of held-out videos by sigma of ``SIGMAS``, the best first.

    Of equal ones, the smaller sigma is first.
    """
    found = {sigma: evaluate_videos(smooth_videos(scores, sigma), videos)[f"auc{branch}"] for sigma in SIGMAS}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def evaluate(scores: Sequence[VideoScores], videos: VideoDataset, protocol: str = "paper") -> dict[str, Any]:
    """The metrics of a test: those of ``snippet_metrics`` in 0..1 for each branch, detection mAP in percent.

    Keys: ``auc1``, ``ap1`` (step), ``ap_trapezoid1``, ``ano_auc1``, ``far1`` and ``video_auc1`` (each video ranked by
    its ``metrics.video_score``) of the first branch, ``auc2`` … of the second. Detection mAP comes in
    the variants ``map_released``, ``map_normal_matched`` and ``map_anomalous_only`` (per IoU and "average"; see
    ``metrics.detection``), of which the protocol's own is also ``map`` (per IoU) and ``map_average``. For
    videos without annotation, the metrics are those of ``evaluate_videos``.
    """
    for entry, video in zip(videos.entries, scores, strict=True):
        if not all(np.isfinite(found).all() for found in (video.anomaly, video.classes) if found is not None):
            raise UserError(f"the scores of {entry.video} are not finite: the model cannot use its features")
    if videos.truth is None:
        return evaluate_videos(scores, videos)
    counts = _count_frames(videos, videos.truth, scores)
    positives, frames = map(np.concatenate, zip(*counts, strict=True))
    anomalous = np.repeat(videos.anomalous, [len(total) for _, total in counts])
    metrics: dict[str, Any] = {}
    for branch, curve in enumerate(np.concatenate([video.anomaly for video in scores], axis=1), start=1):
        found = snippet_metrics(curve, positives, frames, anomalous)
        pooled = [video_score(video.anomaly[branch - 1]) for video in scores]
        found["video_auc"] = frame_metrics(pooled, videos.anomalous)["auc"]
        metrics |= {f"{name}{branch}": value for name, value in found.items()}
    if scores[0].classes is not None:
        classes, totals = [v.classes for v in scores if v.classes is not None], [total for _, total in counts]
        inputs = classes, videos.truth.segments, videos.truth.labels, videos.dataset.labels
        unknown, headline = videos.dataset.unknown_truth_label, HEADLINE_MAP[protocol]
        variants = {"released": detection_map(*inputs, frames=totals, unknown_labels=unknown)}
        variants |= corrected_detection_map(*inputs, frames=totals)
        by_iou = {name: {str(iou): value for iou, value in found["map"].items()} for name, found in variants.items()}
        metrics |= {"map": by_iou[headline], "map_average": variants[headline]["average"]}
        metrics |= {f"map_{name}": by_iou[name] | {"average": found["average"]} for name, found in variants.items()}
    return metrics


def evaluate_classes(scores: Sequence[VideoScores], videos: VideoDataset) -> dict[str, Any]:
    """Return the metrics of each class, for a finished model.

    ``per_class`` holds for each anomalous label the AUC and AP of the main anomaly score over the frames of that
    label's videos (``video_auc``, ``video_ap``; IEF-VAD) and, where the method tells classes apart, of the class
    probability over all frames (``auc``, ``ap``; their means ``mauc``, ``mean_ap``; AnomalyCLIP). {} without truth.
    """
    if videos.truth is None:
        return {}
    counts = _count_frames(videos, videos.truth, scores)
    metrics: dict[str, Any] = {}
    per_class: dict[str, dict[str, float]] = {}
    for label in videos.dataset.labels[1:]:
        chosen = [index for index, entry in enumerate(videos.entries) if label in videos.dataset.codes(entry.label)]
        if chosen:
            curve = np.concatenate([scores[index].anomaly[0] for index in chosen])
            positives, frames = (np.concatenate(part) for part in zip(*(counts[i] for i in chosen), strict=True))
            found = snippet_metrics(curve, positives, frames)
            per_class[label] = {f"video_{name}": found[name] for name in ("auc", "ap")}
    if scores[0].classes is not None:
        classes = np.concatenate([video.classes for video in scores if video.classes is not None])
        totals = np.concatenate([frames for _, frames in counts])
        positives = np.concatenate([_class_frames(videos, index, len(f)) for index, (_, f) in enumerate(counts)])
        by_class = class_metrics(classes, positives, totals, videos.dataset.labels)
        metrics |= {"mauc": by_class["mauc"], "mean_ap": by_class["mean_ap"]}
        for label, values in by_class["per_class"].items():
            per_class.setdefault(label, {}).update(values)
    return metrics | {"per_class": per_class}


def with_reasons(metrics: dict[str, Any], videos: VideoDataset) -> dict[str, Any]:
    """Return the metrics and, where some are NaN, why, by name (that of a class is ``per_class@LABEL@NAME``)."""
    everything = range(len(videos.entries))
    reasons = {}
    for name, value in metrics.items():
        if name == "per_class":
            for label, found in value.items():
                own = [row for row in everything if label in videos.dataset.codes(videos.entries[row].label)]
                inside = _lacking(videos, own, f"the videos of {label}")
                for key in (key for key, number in found.items() if np.isnan(number)):
                    why = inside if key.startswith("video_") else f"no frame outside {label} in the test set"
                    reasons[f"{name}@{label}@{key}"] = why
        elif not np.isnan(list(value.values()) if isinstance(value, dict) else value).any():
            continue
        elif name.startswith("map"):
            reasons[name] = "no segment of an anomalous class in the test set"
        elif name in ("mauc", "mean_ap"):
            reasons[name] = "no class with frames inside and outside it in the test set"
        elif name.startswith("ano_auc"):
            reasons[name] = _lacking(videos, np.flatnonzero(videos.anomalous), "anomalous test videos")
        elif name.startswith(("far", "video_auc")):
            reasons[name] = f"no {'normal' if videos.anomalous.any() else 'anomalous'} video in the test set"
        else:
            reasons[name] = _lacking(videos, everything, "the test set")
    return metrics | ({UNDEFINED: reasons} if reasons else {})


def _lacking(videos: VideoDataset, rows: Iterable[int], where: str) -> str:
    """Say which kind of frames some videos lack, or of videos where frames have no truth."""
    if videos.truth is None:
        return f"no {'normal' if videos.anomalous.any() else 'anomalous'} video in {where}"
    abnormal = any(videos.truth.frames[row].any() for row in rows)
    return f"no {'normal' if abnormal else 'abnormal'} frame in {where}"


def _class_frames(videos: VideoDataset, index: int, snippets: int) -> np.ndarray:
    """Return the number of frames of each class in each snippet of a video, (n, C)."""
    truth, labels = videos.known_truth, videos.dataset.labels
    table = np.zeros((snippets, len(labels)), dtype=np.int64)
    for label in set(truth.labels[index]) & set(labels[1:]):
        spans = [span for span, name in zip(truth.segments[index], truth.labels[index], strict=True) if name == label]
        frames = frames_from_segments(spans, len(truth.frames[index]))
        table[:, labels.index(label)], _ = count_frames(frames, snippets, videos.frames_per_snippet)
    return table


def _count_frames(
    videos: VideoDataset, truth: Truth, scores: Sequence[VideoScores]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each video the abnormal frames and all frames of each snippet."""
    pairs = zip(truth.frames, scores, strict=True)
    return [count_frames(frames, video.anomaly.shape[1], videos.frames_per_snippet) for frames, video in pairs]


def evaluate_videos(scores: Sequence[VideoScores], videos: VideoDataset) -> dict[str, float]:
    """Video-level AUC and AP of each branch, for test sets without frame-level truth.

    Keys: ``auc1`` (also as ``video_auc1``), ``ap1``, ``ap_trapezoid1``, … A video's score is ``metrics.video_score``.
    """
    metrics: dict[str, float] = {}
    for branch, curves in enumerate(zip(*(video.anomaly for video in scores), strict=True), start=1):
        found = frame_metrics(list(map(video_score, curves)), videos.anomalous)
        found["video_auc"] = found["auc"]
        metrics |= {f"{name}{branch}": value for name, value in found.items()}
    return metrics
