"""A test's scores and truth as a file, from which pages and figures are made without the model.

The file holds plain arrays; docs/runs.md names them.
"""

import json
import math
import zipfile
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
from clipfusionvad.metrics import snippet_edges

# Real scores compress a few times, constant ones hundreds of times, a decompression bomb a thousand times.
_LARGEST_SHARE = 500
# Type and dimensions of the arrays.
_KINDS = {"about": "U0", "videos": "U1", "labels": "U1", "snippets": "i1", "anomaly": "f2", "classes": "f2"}
_KINDS |= {"frames": "i1", "abnormal": "i2", "segments": "i2", "segment_labels": "U1"}
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

    def only(self, chosen: Sequence[int]) -> "TestResult":
        """Return the result of some of the videos."""
        whole, old = self.videos, self.videos.truth
        truth = old and old.only(chosen)
        entries = [whole.entries[index] for index in chosen]
        videos = VideoDataset(entries, whole.dataset, whole.width, truth, whole.frames_per_snippet)
        return replace(self, scores=[self.scores[index] for index in chosen], videos=videos)

    def edges(self, index: int) -> np.ndarray:
        """Return the frames (n + 1,) at which the snippets of a video begin, and at the end its length in frames.

        The length is that of the truth, or else of the snippets.
        """
        snippets, truth = self.scores[index].anomaly.shape[1], self.videos.truth
        frames = len(truth.frames[index]) if truth else round(snippets * self.videos.mean_frames(index, snippets))
        return snippet_edges(snippets, frames, self.videos.frames_per_snippet)


def save_scores(
    path: Path,
    scores: Sequence[VideoScores],
    videos: VideoDataset,
    options: Mapping[str, Any],
    environment: Mapping[str, Any] | None = None,
) -> None:
    """Write a test's scores, completely or not at all, with ``options`` and ``environment`` (None: the current one)."""
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
    if truth := videos.truth:
        abnormal = [abnormal_spans(frames) for frames in truth.frames]
        arrays["frames"] = np.array([len(frames) for frames in truth.frames])
        for name, spans in (("abnormal", abnormal), ("segments", truth.segments)):
            rows = [(index, *span) for index, own in enumerate(spans) for span in own]
            arrays[name] = np.array(rows, dtype=np.int64).reshape(-1, 3)
        arrays["segment_labels"] = np.array([label for own in truth.labels for label in own], dtype=np.str_)
    with atomic_write(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def abnormal_spans(frames: np.ndarray) -> list[tuple[int, int]]:
    """Return the intervals [start, end) in which frame truth (F,) of 0 and 1 is 1."""
    edges = np.flatnonzero(np.diff(frames.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def is_scores(path: str | Path) -> bool:
    """Whether a file is one of ``save_scores``, by the names of its arrays."""
    if not (Path(path).is_file() and zipfile.is_zipfile(path)):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"about.npy", "videos.npy", "snippets.npy", "anomaly.npy"} <= {*archive.namelist()}


def read_scores(path: str | Path) -> TestResult:
    """Read a file of ``save_scores``; ``UserError`` for any other file."""
    must_exist(path, "scores")
    try:
        check_unpacked_size(path, _LARGEST_SHARE)
        with np.load(path, allow_pickle=False) as file:
            return _restore({name: file[name] for name in file.files})
    # Zip, its compression, numpy's headers and our own checks raise errors of many kinds.
    except Exception as error:
        raise UserError(f"scores {path} are not readable: the file is damaged, or is not a file of scores") from error


def _restore(arrays: Mapping[str, np.ndarray]) -> TestResult:
    about = json.loads(arrays["about"].item())
    dataset = Dataset(**about["dataset"])
    _check(about, dataset, arrays)
    listed = zip(arrays["videos"].tolist(), arrays["labels"].tolist(), strict=True)
    # The path that a list would hold, so that any name is restored.
    entries = [Entry(Path(f"{name}__0.npy"), label, row) for row, (name, label) in enumerate(listed, start=2)]
    ends = np.cumsum(arrays["snippets"])[:-1]
    anomaly = np.split(arrays["anomaly"], ends, axis=1)
    classes = np.split(arrays["classes"], ends) if "classes" in arrays else [None] * len(anomaly)
    truth = None
    if "frames" in arrays:

        def by_video(name: str, values: np.ndarray) -> list[list[Any]]:
            parts = np.split(values, np.searchsorted(arrays[name][:, 0], np.arange(1, len(entries))))
            return [part.tolist() for part in parts]

        abnormal, segments = (by_video(name, arrays[name][:, 1:]) for name in ("abnormal", "segments"))
        frames = list(map(frames_from_segments, abnormal, arrays["frames"].tolist()))
        spans = [list(map(tuple, own)) for own in segments]
        truth = Truth(frames, spans, by_video("segments", arrays["segment_labels"]))
    videos = VideoDataset(entries, dataset, 0, truth, about["frames_per_snippet"])
    return TestResult(about["options"], about["environment"], list(map(VideoScores, anomaly, classes)), videos)


def _check(about: Mapping[str, Any], dataset: Dataset, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise an error unless the arrays agree with one another."""
    snippets, anomaly, classes = arrays["snippets"], arrays["anomaly"], arrays.get("classes")
    total = int(snippets.sum())
    checks = [
        all(f"{arrays[name].dtype.kind}{arrays[name].ndim}" == kind for name, kind in _KINDS.items() if name in arrays),
        isinstance(about["options"], dict) and isinstance(about["environment"], dict),
        "frames" in arrays
        if about["frames_per_snippet"] is None
        else isinstance(about["frames_per_snippet"], int) and 0 < about["frames_per_snippet"] <= _MOST_FRAMES,
        isinstance(dataset.fps, int | float) and 0 < dataset.fps < math.inf and isinstance(dataset.title, str),
        len(dataset.classes) > 1 and all(isinstance(word, str) for pair in dataset.classes.items() for word in pair),
        int(snippets.min(initial=1)) > 0,
        len(arrays["videos"]) > 0 and len(snippets) == len(arrays["labels"]) == len(arrays["videos"]),
        len(anomaly) > 0 and anomaly.shape[1] == total,
        classes is None or classes.shape == (total, len(dataset.classes)),
        np.isfinite(anomaly).all() and (classes is None or np.isfinite(classes).all()),
    ]
    if "frames" in arrays:
        frames, labels = arrays["frames"], arrays["segment_labels"]
        checks += [frames.shape == snippets.shape and len(labels) == len(arrays["segments"]), frames.min() >= 0]
        checks += [int(frames.max()) <= _MOST_FRAMES and int(frames.sum()) <= 10 * _MOST_FRAMES]
        for rows in (arrays["abnormal"], arrays["segments"]):
            checks += [rows.shape[1] == 3, (rows >= 0).all(), (rows[:, 0] < len(frames)).all()]
            checks += [(np.diff(rows[:, 0]) >= 0).all(), (rows[:, 2] >= rows[:, 1]).all()]
    for label in set(arrays["labels"].tolist()):
        dataset.encode(label)
    if not all(checks):
        raise ValueError("the arrays do not come from a test")
