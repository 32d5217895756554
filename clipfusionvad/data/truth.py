"""Ground truth of a test list: abnormal frames, and intervals with their classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipfusionvad.data.annotations import read_annotations
from clipfusionvad.data.config import FRAMES_PER_SNIPPET
from clipfusionvad.data.lists import Entry
from clipfusionvad.datasets import NORMAL_IN_TRUTH, Dataset
from clipfusionvad.io.errors import UserError, nearest, warn
from clipfusionvad.io.npy import read_array

KEYED_SUFFIXES = (".csv", ".json")

Segment = tuple[int, int]


@dataclass
class Truth:
    """Truth per test video, in list order.

    ``frames``: uint8 0/1 arrays, as long as the number of frames that the video is judged on.
    ``segments``, ``labels``: intervals [start, end) in frames and the class of each; a normal video has the
    label "A" and one interval, the whole video.
    """

    frames: list[np.ndarray]
    segments: list[list[Segment]]
    labels: list[list[str]]

    def only(self, chosen: Sequence[int]) -> Truth:
        """Return the truth of some of the videos."""
        return Truth(
            [self.frames[index] for index in chosen],
            [self.segments[index] for index in chosen],
            [self.labels[index] for index in chosen],
        )


def read_truth(
    frames_path: str | Path,
    segments_path: str | Path | None,
    labels_path: str | Path | None,
    entries: Sequence[Entry],
    snippets: Sequence[int],
    dataset: Dataset,
    frames_per_snippet: int = FRAMES_PER_SNIPPET,
    tell: Callable[[str], None] = warn,
) -> Truth:
    """Read the truth of a test list whose features have the given numbers of snippets.

    A ``frames_path`` that ends in .csv or .json is an annotation file looked up by video name, and the only
    file read; each video is then judged on its true number of frames where the file tells it. Otherwise the
    three released arrays are read, which hold no names: they only fit the list and the features they were
    made for. Raises ``UserError`` where the files do not fit, naming the video as far as that can be
    determined; ``tell`` is called with what only looks wrong.
    """
    if str(frames_path).lower().endswith(KEYED_SUFFIXES):
        return _read_keyed(frames_path, entries, snippets, dataset, frames_per_snippet, tell)
    frames = read_array(frames_path, "frame truth")
    segments = _read_per_video(segments_path, "segment truth")
    labels = _read_per_video(labels_path, "label truth")
    _check_frames(frames_path, frames)
    lengths = [frames_per_snippet * count for count in snippets]
    if len(frames) != sum(lengths):
        raise UserError(_explain(frames_path, frames, segments, labels, entries, lengths, frames_per_snippet))
    for path, array in ((segments_path, segments), (labels_path, labels)):
        if len(array) != len(entries):
            raise UserError(f"{path} holds {len(array)} videos, but the test list has {len(entries)}")
    truth = Truth(
        np.split(frames.astype(np.uint8), np.cumsum(lengths)[:-1]),
        [_segments(item, segments_path, entry) for item, entry in zip(segments, entries, strict=True)],
        [_labels(item, labels_path, entry) for item, entry in zip(labels, entries, strict=True)],
    )
    known = [*dataset.labels, NORMAL_IN_TRUTH]
    for entry, intervals, names in zip(entries, truth.segments, truth.labels, strict=True):
        if len(intervals) != len(names):
            raise UserError(
                f"{segments_path} and {labels_path} differ for {entry.video} (list row {entry.row}): "
                f"{len(intervals)} intervals, {len(names)} labels"
            )
        for label in names:
            if label not in known:
                raise UserError(f"{labels_path}: unknown label {label!r} of {entry.video}{nearest(label, known)}")
    if off := _normal_lengths_off(truth.segments, truth.labels, entries, lengths):
        tell(
            f"{frames_path} is as long as the features, but {len(off)} normal videos are not as long as "
            f"{segments_path} says: {_worst(off)}; frames may be judged by another video's truth"
        )
    return truth


def frames_from_segments(segments: Sequence[Segment], length: int) -> np.ndarray:
    """Frame truth (length,) uint8: 1 inside any interval [start, end); what lies past the end is cut off."""
    frames = np.zeros(length, dtype=np.uint8)
    for start, end in segments:
        frames[start:end] = 1
    return frames


def _read_keyed(
    path: str | Path,
    entries: Sequence[Entry],
    snippets: Sequence[int],
    dataset: Dataset,
    frames_per_snippet: int,
    tell: Callable[[str], None],
) -> Truth:
    annotations = read_annotations(path, dataset)
    absent = [e for e in entries if e.video not in annotations and not dataset.is_normal(e.label)]
    if absent:
        raise UserError(
            f"{path} has no annotation for {len(absent)} anomalous videos of the test list, "
            f"the first is {absent[0].video} (list row {absent[0].row})"
        )
    truth = Truth([], [], [])
    off: list[tuple[int, int, str]] = []
    for entry, count in zip(entries, snippets, strict=True):
        item = annotations.get(entry.video)
        covered = frames_per_snippet * count
        length = item.frames if item and item.frames else covered
        if abs(length - covered) >= max(frames_per_snippet, 2):
            off.append((length, covered, entry.video))
        segments, labels = (item.segments, item.labels) if item else ([], [])
        if dataset.is_normal(entry.label):
            if segments:
                raise UserError(
                    f"{path} has intervals for {entry.video}, which the test list calls {entry.label} "
                    f"(list row {entry.row})"
                )
            truth.segments.append([(0, length)])
            truth.labels.append([NORMAL_IN_TRUTH])
        else:
            truth.segments.append(segments)
            truth.labels.append(labels)
        truth.frames.append(frames_from_segments(segments, length))
    if off:
        tell(f"{path}: {len(off)} videos differ from their features by a snippet or more: {_worst(off)}")
    return truth


def _read_per_video(path: str | Path | None, what: str) -> np.ndarray:
    if path is None:
        raise UserError(f"{what} is needed beside the frame truth (or one .csv or .json file instead of all)")
    if not Path(path).is_file():
        raise UserError(f"{what} not found: {path} (or give one .csv or .json annotation file as --gt-path)")
    array = read_array(path, what)
    if array.ndim == 0:
        raise UserError(f"{path} holds a single value, not one item per video")
    return array


def _check_frames(path: str | Path, frames: np.ndarray) -> None:
    if frames.ndim != 1 or frames.dtype.kind not in "fiub":
        raise UserError(f"{path} has shape {frames.shape} {frames.dtype}, not a 0 or 1 for each frame")
    wrong = (frames != 0) & (frames != 1)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise UserError(f"{path} holds {frames[at]} at frame {at}; only 0 and 1 are allowed")


def _segments(item: Any, path: str | Path | None, entry: Entry) -> list[Segment]:
    try:
        # Released bounds are text for anomalous videos and numbers for normal ones.
        spans = [(int(start), int(end)) for start, end in item]
        bounds = [bound for pair in item for bound in pair if not isinstance(bound, str)]
        whole = all(int(bound) == bound for bound in bounds) and not any(isinstance(pair, str) for pair in item)
        if not whole or not all(0 <= start <= end for start, end in spans):
            raise ValueError("no interval")
        return spans
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path}: the item of {entry.video} (list row {entry.row}) is {str(item)[:60]}, "
            f"not a list of [start, end] in whole frames, 0 or more, that do not end before they start"
        ) from error


def _labels(item: Any, path: str | Path | None, entry: Entry) -> list[str]:
    if not isinstance(item, list | tuple | np.ndarray) or not all(isinstance(label, str) for label in item):
        raise UserError(
            f"{path}: the item of {entry.video} (list row {entry.row}) is {str(item)[:60]}, not a list of class names"
        )
    return [str(label) for label in item]


def _normal_lengths_off(
    segments: list[list[Segment]], labels: list[list[str]], entries: Sequence[Entry], lengths: Sequence[int]
) -> list[tuple[int, int, str]]:
    """(frames in the truth, frames in the features, name) of normal videos where the two differ."""
    return [
        (intervals[0][1], length, entry.video)
        for intervals, names, entry, length in zip(segments, labels, entries, lengths, strict=True)
        if names == [NORMAL_IN_TRUTH] and len(intervals) == 1 and intervals[0][1] != length
    ]


def _worst(off: list[tuple[int, int, str]]) -> str:
    truth, features, video = max(off, key=lambda item: abs(item[0] - item[1]))
    return f"the worst is {video}: {truth} frames of truth, {features} of features ({truth - features:+d})"


def _explain(
    path: str | Path,
    frames: np.ndarray,
    segments: np.ndarray,
    labels: np.ndarray,
    entries: Sequence[Entry],
    lengths: Sequence[int],
    frames_per_snippet: int,
) -> str:
    """Explain why frame truth and features differ in length, as far as arrays without names show it."""
    total, difference = sum(lengths), len(frames) - sum(lengths)
    parts = [
        f"{path} holds {len(frames)} frames, but the features of the test list cover {total} "
        f"({frames_per_snippet} x {total // frames_per_snippet} snippets): {difference:+d} frames"
    ]
    if abs(difference) < frames_per_snippet * len(entries):
        kind = "longer" if difference < 0 else "shorter"
        parts.append(
            f"less than a snippet per video, as where each video's last, incomplete snippet makes "
            f"the features {kind} than the truth"
        )
    known = 0
    if not len(segments) == len(labels) == len(entries):
        parts.append(
            f"the truth is of {len(segments)} videos by its segments and {len(labels)} by its labels, "
            f"the test list has {len(entries)}"
        )
    else:
        try:
            per_video = [_segments(item, "", entry) for item, entry in zip(segments, entries, strict=True)]
            names = [_labels(item, "", entry) for item, entry in zip(labels, entries, strict=True)]
            off = _normal_lengths_off(per_video, names, entries, lengths)
        except UserError:
            # The segments are invalid, too; that is reported once the frames fit.
            off = []
        if off:
            known = sum(truth - features for truth, features, _ in off)
            parts.append(f"{len(off)} normal videos differ, by {known:+d} frames together: {_worst(off)}")
    if known != difference:
        parts.append(
            f"in which videos the {'other ' if known else ''}{difference - known:+d} frames are these arrays "
            f"cannot tell, as they hold no names: give an annotation file (.csv, .json) as the frame truth, "
            f"or make truth for these features with 'python -m clipfusionvad lists'"
        )
    else:
        parts.append("make truth for these features with 'python -m clipfusionvad lists'")
    return "; ".join(parts)
