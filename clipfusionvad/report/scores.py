"""A test's scores and truth as a file, from which pages and figures are made without the model.

The file holds plain arrays. Per video: ``videos``, ``labels``, ``snippets`` (their number) and, where the truth is
known, ``frames``. The snippets of all videos joined, to be split by ``snippets``: ``anomaly`` (branches, S) and, where
the method predicts classes, ``classes`` (S, C). Truth as intervals [start, end) in frames: ``abnormal`` (n, 3) of
the frame truth, ``segments`` (m, 3) of the annotated classes ``segment_labels`` (m,), each with its video's number
first. ``about`` is JSON: the options and the environment of the test, and its dataset.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipfusionvad.data.lists import Entry
from clipfusionvad.data.truth import Truth, frames_from_segments
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.evaluator import VideoDataset, VideoScores
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import atomic_write, check_unpacked_size, must_exist, without_nan
from clipfusionvad.io.provenance import environment as current_environment

# Real scores compress a few times, constant ones hundreds of times, a decompression bomb a thousand times.
_LARGEST_SHARE = 500
# Of a video: 38 days at 30 fps.
_MOST_FRAMES = 10**8
# The fields of a dataset that metrics need: a report must not depend on what a dataset's name means later.
_DATASET = ("name", "title", "classes", "fps", "multi_label")


@dataclass(frozen=True)
class TestResult:
    """The scores of a test, its options and environment, and its videos without features."""

    options: dict[str, Any]
    environment: dict[str, Any]
    scores: list[VideoScores]
    videos: VideoDataset

    def only(self, chosen: Sequence[int]) -> TestResult:
        """Return the result of some of the videos."""
        whole, old = self.videos, self.videos.truth
        truth = old and old.only(chosen)
        entries = [whole.entries[index] for index in chosen]
        videos = VideoDataset(entries, whole.dataset, whole.width, truth, whole.frames_per_snippet)
        return replace(self, scores=[self.scores[index] for index in chosen], videos=videos)


def save_scores(
    path: Path,
    scores: Sequence[VideoScores],
    videos: VideoDataset,
    options: Mapping[str, Any],
    environment: Mapping[str, Any] | None = None,
) -> None:
    """Write a test's scores, completely or not at all, with the recorded ``options``.

    ``environment`` as ``provenance.environment`` returns it (None: the current one).
    """
    about = {
        "options": options,
        "environment": environment or current_environment(),
        "dataset": {name: getattr(videos.dataset, name) for name in _DATASET},
        "frames_per_snippet": videos.frames_per_snippet,
    }
    arrays = {
        "about": np.array(json.dumps(without_nan(about))),
        "videos": np.array([entry.video for entry in videos.entries], dtype=np.str_),
        "labels": np.array([entry.label for entry in videos.entries], dtype=np.str_),
        "snippets": np.array([video.anomaly.shape[1] for video in scores]),
        "anomaly": np.concatenate([video.anomaly for video in scores], axis=1),
    }
    if scores[0].classes is not None:
        arrays["classes"] = np.concatenate([video.classes for video in scores])
    if videos.truth is not None:
        arrays |= _truth_arrays(videos.truth)
    with atomic_write(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _truth_arrays(truth: Truth) -> dict[str, np.ndarray]:
    spans = [(index, *span) for index, frames in enumerate(truth.frames) for span in abnormal_spans(frames)]
    segments = [(index, *span) for index, own in enumerate(truth.segments) for span in own]
    return {
        "frames": np.array([len(frames) for frames in truth.frames]),
        "abnormal": np.array(spans, dtype=np.int64).reshape(-1, 3),
        "segments": np.array(segments, dtype=np.int64).reshape(-1, 3),
        "segment_labels": np.array([label for own in truth.labels for label in own], dtype=np.str_),
    }


def abnormal_spans(frames: np.ndarray) -> list[tuple[int, int]]:
    """Return the intervals [start, end) in which frame truth (F,) of 0 and 1 is 1."""
    edges = np.flatnonzero(np.diff(frames.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def read_scores(path: Path) -> TestResult:
    """Read a file of ``save_scores``; ``UserError`` for any other file."""
    must_exist(path, "scores")
    try:
        check_unpacked_size(path, _LARGEST_SHARE)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return _restore(arrays)
    # Zip, its compression, numpy's headers and our own checks raise errors of many kinds.
    except Exception as error:
        raise UserError(f"scores {path} are not readable: the file is damaged, or is not a file of scores") from error


def _check(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raise an error unless the arrays agree with one another."""
    known, snippets, anomaly = Dataset(**about["dataset"]), arrays["snippets"], arrays["anomaly"]
    classes = arrays.get("classes")
    if snippets.dtype.kind != "i":
        raise ValueError("numbers of snippets are not whole")
    for name, array in arrays.items():
        # numpy accepts any four bytes as a letter.
        letters = np.frombuffer(array.tobytes(), np.uint32) if array.dtype.kind == "U" else np.zeros(0, np.uint32)
        if letters.max(initial=0) > sys.maxunicode:
            raise ValueError(f"{name} is not text")
    total = int(snippets.sum())
    checks = [
        isinstance(about["options"], dict) and isinstance(about["environment"], dict),
        isinstance(about["frames_per_snippet"], int) and 0 < about["frames_per_snippet"] <= _MOST_FRAMES,
        isinstance(known.fps, int | float) and 0 < known.fps < math.inf and isinstance(known.title, str),
        len(known.classes) > 1 and all(isinstance(word, str) for pair in known.classes.items() for word in pair),
        all(arrays[name].dtype.kind == "U" and arrays[name].ndim == 1 for name in ("videos", "labels")),
        snippets.ndim == 1 and int(snippets.min(initial=1)) > 0,
        len(arrays["videos"]) > 0 and len(snippets) == len(arrays["labels"]),
        anomaly.dtype.kind == "f" and anomaly.ndim == 2 and len(anomaly) > 0 and anomaly.shape[1] == total,
        classes is None or (classes.dtype.kind == "f" and classes.shape == (total, len(known.classes))),
        np.isfinite(anomaly).all() and (classes is None or np.isfinite(classes).all()),
    ]
    for label in set(arrays["labels"].tolist()):
        known.encode(label)
    if not all(checks) or ("frames" in arrays and not _is_truth(arrays)):
        raise ValueError("the arrays do not come from a test")


def _is_truth(arrays: Mapping[str, np.ndarray]) -> bool:
    frames, spans = arrays["frames"], [arrays["abnormal"], arrays["segments"]]
    if frames.dtype.kind != "i" or frames.shape != arrays["snippets"].shape or frames.min() < 0:
        return False
    if int(frames.max()) > _MOST_FRAMES or int(frames.sum()) > 10 * _MOST_FRAMES:
        return False
    for rows in spans:
        if rows.dtype.kind != "i" or rows.ndim != 2 or rows.shape[1] != 3 or (rows < 0).any():
            return False
        if (rows[:, 0] >= len(frames)).any() or (rows[:, 2] < rows[:, 1]).any():
            return False
    return arrays["segment_labels"].dtype.kind == "U"


def _restore(arrays: Mapping[str, np.ndarray]) -> TestResult:
    about = json.loads(arrays["about"].item())
    _check(about, arrays)
    names, labels = arrays["videos"].tolist(), arrays["labels"].tolist()
    # The path that a list would hold, so that any name is restored.
    listed = zip(names, labels, strict=True)
    entries = [Entry(Path(f"{name}__0.npy"), label, row) for row, (name, label) in enumerate(listed, start=2)]
    ends = np.cumsum(arrays["snippets"])[:-1]
    anomaly = np.split(arrays["anomaly"], ends, axis=1)
    classes = np.split(arrays["classes"], ends) if "classes" in arrays else [None] * len(anomaly)
    scores = [VideoScores(*pair) for pair in zip(anomaly, classes, strict=True)]
    truth = _restore_truth(arrays) if "frames" in arrays else None
    videos = VideoDataset(entries, Dataset(**about["dataset"]), 0, truth, about["frames_per_snippet"])
    if not len(entries) == len(scores) == len(truth.frames if truth else scores):
        raise ValueError("the arrays belong to different videos")
    return TestResult(about["options"], about["environment"], scores, videos)


def _restore_truth(arrays: Mapping[str, np.ndarray]) -> Truth:
    count = len(arrays["frames"])
    abnormal = _by_video(arrays["abnormal"], count)
    segments = _by_video(arrays["segments"], count)
    frames = [frames_from_segments(*pair) for pair in zip(abnormal, arrays["frames"].tolist(), strict=True)]
    labels: list[list[str]] = [[] for _ in range(count)]
    for video, label in zip(arrays["segments"][:, 0].tolist(), arrays["segment_labels"].tolist(), strict=True):
        labels[video].append(label)
    return Truth(frames, segments, labels)


def _by_video(rows: np.ndarray, count: int) -> list[list[tuple[int, int]]]:
    spans: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for video, start, end in rows.tolist():
        spans[video].append((start, end))
    return spans
