"""Ground truth of a test list: abnormal frames, and intervals with their classes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipfusionvad.data.annotations import Annotation, match_names, read_annotations, with_classes
from clipfusionvad.data.config import FRAMES_PER_SNIPPET
from clipfusionvad.data.conventions import convention_of, judged_frames, misfit, read_bounds
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.masks import is_masks
from clipfusionvad.datasets import NORMAL_IN_TRUTH, Convention, Dataset
from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.io.npy import read_array

_EQUAL = "all have as many feature rows: if these are equal parts of each video, give --segments equal"
_NEEDED = "the number of frames of each video, which --segments equal needs"

Segment = tuple[int, int]
# Truth this many times as long as the features is of another number of frames per snippet.
FAR = 1.1


@dataclass
class Truth:
    """Truth per test video, in list order.

    ``frames``: uint8 0/1 arrays, as long as the number of frames that the video is judged on. ``segments``, ``labels``:
    intervals [start, end) in frames and the class of each; a normal video is one interval "A".
    """

    frames: list[np.ndarray]
    segments: list[list[Segment]]
    labels: list[list[str]]

    def only(self, chosen: Sequence[int]) -> Truth:
        """Return the truth of some of the videos."""
        return Truth(**{name: [values[index] for index in chosen] for name, values in vars(self).items()})


def is_keyed(path: str | Path) -> bool:
    """Whether a frame truth is an annotation file, or a folder of masks, that is looked up by video name."""
    return str(path).lower().endswith((".csv", ".json")) or is_masks(path)


def read_truth(
    frames_path: str | Path,
    segments_path: str | Path | None,
    labels_path: str | Path | None,
    entries: Sequence[Entry],
    snippets: Sequence[int],
    dataset: Dataset,
    frames_per_snippet: int | None = FRAMES_PER_SNIPPET,
    tell: Callable[[str], None] = warn,
    convention: Convention | None = None,
) -> Truth:
    """Read the truth of a test list whose features have the given numbers of snippets.

    A ``frames_path`` that ``is_keyed`` is an annotation file looked up by video name, and the only
    file read; each video is then judged on its true number of frames where the file tells it. Otherwise the
    three released arrays are read, which hold no names: they only fit the list and the features they were
    made for. With ``frames_per_snippet`` None a snippet is an equal part of its video, whose frames the keyed file
    must tell. A ``convention`` says how many frames are judged.
    Raises ``UserError`` where the files do not fit, naming the video as far as that can be determined;
    ``tell`` is called with what only looks wrong.
    """
    if frames_per_snippet is None:
        if not is_keyed(frames_path):
            keyed = f"the keyed annotation file, such as list/{dataset.list_files['truth']} that 'lists' writes"
            raise UserError(f"{frames_path} does not hold {_NEEDED}; give {keyed}, as --gt-path")
        return _read_keyed(frames_path, entries, None, dataset, 1, convention)[0]
    lengths = [frames_per_snippet * count for count in snippets]
    if is_keyed(frames_path):
        truth, doubt = _read_keyed(frames_path, entries, lengths, dataset, frames_per_snippet, convention)
        if doubt:
            tell(doubt)
        return truth
    frames = as_frame_truth(read_array(frames_path, "frame truth"), frames_path)
    if convention and convention.videos == len(entries) and convention.frames != len(frames):
        other = convention_of(dataset, len(entries), len(frames))
        advice = f"give --convention {other.name}, which has as many" if other else "no convention has as many"
        raise UserError(f"{frames_path} has {len(frames)} frames, {convention.name} has {convention.frames}: {advice}")
    segments = _read_per_video(segments_path, "segment truth")
    labels = _read_per_video(labels_path, "label truth")
    if len(frames) != sum(lengths):
        why = _explain(len(frames), segments, labels, entries, lengths, frames_per_snippet)
        raise UserError(f"{frames_path} holds {why}")
    for path, array in ((segments_path, segments), (labels_path, labels)):
        if len(array) != len(entries):
            raise UserError(f"{path} holds {len(array)} videos, but the test list has {len(entries)}")
    truth = Truth(np.split(frames, np.cumsum(lengths)[:-1]), [], [])
    known = [*dataset.labels, NORMAL_IN_TRUTH]
    for entry, intervals, names in zip(entries, segments, labels, strict=True):
        where = f"{entry.video} (list row {entry.row})"
        truth.segments.append(_segments(intervals, f"{segments_path}: the item of {where}"))
        if not isinstance(names, list | tuple | np.ndarray) or not all(isinstance(label, str) for label in names):
            raise UserError(f"{labels_path}: the item of {where} is {str(names)[:60]}, not a list of class names")
        truth.labels.append([str(label) for label in names])
        if len(truth.segments[-1]) != len(names):
            counts = f"{len(truth.segments[-1])} intervals, {len(names)} labels"
            raise UserError(f"{segments_path} and {labels_path} differ for {where}: {counts}")
        for label in truth.labels[-1]:
            if label not in known:
                raise UserError(f"{labels_path}: unknown label {label!r} of {entry.video}{dataset.label_hint(label)}")
    if off := _normal_lengths_off(segments, labels, entries, lengths):
        tell(
            f"{frames_path} has as many frames as the features, but {len(off)} normal videos have another length in "
            f"{segments_path}: {_worst(off)}; frames may be judged by the truth of another video"
        )
    return truth


def as_frame_truth(frames: np.ndarray, path: str | Path) -> np.ndarray:
    """Return frame truth (F,) as uint8; ``UserError`` with the path of its file for anything but 0 and 1."""
    if frames.ndim != 1 or frames.dtype.kind not in "fiub":
        raise UserError(f"{path} has shape {frames.shape} {frames.dtype}, not a 0 or 1 for each frame")
    if (wrong := (frames != 0) & (frames != 1)).any():
        at = int(np.argmax(wrong))
        raise UserError(f"{path} holds {frames[at]} at frame {at}; only 0 and 1 are allowed")
    return frames.astype(np.uint8)


def frames_from_segments(segments: Sequence[Segment], length: int) -> np.ndarray:
    """Return frame truth (length,) uint8: 1 inside any interval [start, end); what lies past the end is cut off."""
    frames = np.zeros(length, dtype=np.uint8)
    for start, end in segments:
        frames[start:end] = 1
    return frames


def _read_keyed(
    path: str | Path,
    entries: Sequence[Entry],
    lengths: Sequence[int] | None,
    dataset: Dataset,
    size: int,
    convention: Convention | None = None,
) -> tuple[Truth, str]:
    """Return the truth, and a warning where lengths differ by a snippet of ``size`` frames (at least 2) or more.

    Without ``lengths``, those of the features, the file must hold that of every video.
    """
    annotations = read_annotations(path, dataset, {entry.video for entry in entries})
    names = match_names(annotations, [entry.video for entry in entries])
    annotations = {names.get(name, name): item for name, item in annotations.items()}
    absent = [e for e in entries if e.video not in annotations and not dataset.is_normal(e.label)]
    if absent:
        first = f"the first is {absent[0].video} (list row {absent[0].row})"
        if not names:
            first += f"; the first video in the file is {next(iter(annotations))}"
        raise UserError(f"{path} has no annotation for {len(absent)} anomalous videos of the test list, {first}")
    if lengths is None:
        lengths = [annotations[e.video].frames or 0 if e.video in annotations else 0 for e in entries]
        if 0 in lengths:
            unknown = entries[lengths.index(0)]
            rest = f"it is missing for {lengths.count(0)} videos, the first is {unknown.video} (list row {unknown.row})"
            raise UserError(f"{path} does not hold {_NEEDED}: {rest}; fill its column 'frames'")
    if convention:
        annotations = {name: read_bounds(item, convention) for name, item in annotations.items()}
        told = {e.video: n for e in entries if e.video in annotations and (n := annotations[e.video].frames)}
        rows = [n // size for e, n in zip(entries, lengths, strict=True) if e.video in told]
        if size == FRAMES_PER_SNIPPET and (wrong := misfit(dataset, convention, [*told], [*told.values()], rows)):
            raise UserError(f"{path}: {wrong}")
        for name, judged in zip(told, judged_frames(convention, [*told], [*told.values()]).tolist(), strict=True):
            annotations[name] = replace(annotations[name], frames=judged)
    truth = Truth([], [], [])
    off: list[tuple[int, int, str]] = []
    items = [with_classes(annotations.get(e.video, Annotation(e.video)), e.label, dataset) for e in entries]
    for entry, item, covered in zip(entries, items, lengths, strict=True):
        length = item.frames or covered
        if abs(length - covered) >= max(size, 2):
            off.append((length, covered, entry.video))
        normal = dataset.is_normal(entry.label)
        if normal and item.segments:
            where = f"{entry.video}, which the test list calls {entry.label} (list row {entry.row})"
            raise UserError(f"{path} has intervals for {where}")
        truth.frames.append(frames_from_segments(item.segments, length))
        truth.segments.append([(0, length)] if normal else item.segments)
        truth.labels.append([NORMAL_IN_TRUTH] if normal else item.labels)
    known = [(item.frames, covered // size) for item, covered in zip(items, lengths, strict=True) if item.frames]
    if off and (fitting := fitting_stride(known, size)):
        factor = sum(frames for frames, _ in known) / sum(rows * size for _, rows in known)
        raise UserError(
            f"{path} has {factor:.3g} times the frames that the features cover, in all {len(known)} videos: give "
            f"--frames-per-snippet {fitting} (now {size}); {_worst(off)}"
        )
    differ = "1 video differs" if len(off) == 1 else f"{len(off)} videos differ"
    doubt = f"{path}: {differ} from the features by a snippet or more: {_worst(off)}" if off else ""
    if off and len({*lengths}) == 1 < len({len(frames) for frames in truth.frames}):
        doubt += f"; {_EQUAL}"
    return truth, doubt


def fitting_stride(known: Sequence[tuple[int, int]], size: int) -> int | None:
    """Return the frames per snippet that fit all videos of known (frames, rows), if ``size`` is far from doing so.

    A video of F frames has from F / N - 1 to F / N + 1 rows of N frames: its last snippet may be incomplete.
    """
    ratio = sum(frames for frames, _ in known) / sum(rows for _, rows in known)
    lowest = max(frames / (rows + 1) for frames, rows in known)
    highest = min(frames / (rows - 1) if rows > 1 else float("inf") for frames, rows in known)
    fitting = max(1, round(ratio))
    if FRAMES_PER_SNIPPET != size and lowest < FRAMES_PER_SNIPPET < highest:
        fitting = FRAMES_PER_SNIPPET
    near = 1 / FAR < ratio / size < FAR or lowest < size < highest
    return None if near or not lowest < fitting < highest else fitting


def _read_per_video(path: str | Path | None, what: str) -> np.ndarray:
    if path is None:
        raise UserError(f"{what} is needed beside the frame truth (or one .csv or .json file instead of all)")
    if not Path(path).is_file():
        raise UserError(f"{what} not found: {path} (or give one .csv or .json annotation file as --gt-path)")
    array = read_array(path, what)
    if array.ndim == 0:
        raise UserError(f"{path} holds a single value, not one item per video")
    return array


def _segments(item: Any, where: str) -> list[Segment]:
    try:
        # Released bounds are text for anomalous videos and numbers for normal ones.
        pairs = [[float(bound) if isinstance(bound, str) else bound for bound in pair] for pair in item]
        spans = [(int(start), int(end)) for start, end in pairs]
        whole = all(int(bound) == bound for pair in pairs for bound in pair)
        whole = whole and not any(isinstance(pair, str) for pair in item)
        if not whole or not all(0 <= start <= end for start, end in spans):
            raise ValueError("no interval")
        return spans
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{where} is {str(item)[:60]}, not a list of [start, end] in whole frames, 0 or more, that do not end "
            f"before they start"
        ) from error


def _normal_lengths_off(
    segments: np.ndarray, labels: np.ndarray, entries: Sequence[Entry], lengths: Sequence[int]
) -> list[tuple[int, int, str]]:
    """Return (frames in the truth, frames in the features, name) of normal videos where the two differ."""
    off = []
    for item, names, entry, length in zip(segments, labels, entries, lengths, strict=True):
        # Items that are invalid, too, are reported once the frames fit.
        with contextlib.suppress(UserError, TypeError):
            if list(names) == [NORMAL_IN_TRUTH] and len(item) == 1 and (end := _segments(item, "")[0][1]) != length:
                off.append((end, length, entry.video))
    return off


def _worst(off: list[tuple[int, int, str]]) -> str:
    truth, features, video = max(off, key=lambda item: abs(item[0] - item[1]))
    return f"the worst is {video}: {truth} frames of truth, {features} of features ({truth - features:+d})"


def _explain(
    count: int, segments: np.ndarray, labels: np.ndarray, entries: Sequence[Entry], lengths: Sequence[int], size: int
) -> str:
    """Explain why frame truth and features differ in length, as far as arrays without names show it."""
    total, difference, known = sum(lengths), count - sum(lengths), 0
    snippets = f"{size} x {total // size} snippets"
    parts = [f"{count} frames, but the features of the test list cover {total} ({snippets}): {difference:+d} frames"]
    if abs(difference) < size * len(entries):
        kind = "fills up" if difference < 0 else "drops"
        parts.append(f"less than a snippet per video: probably the extraction {kind} each video's last snippet")
    off: list[tuple[int, int, str]] = []
    if not len(segments) == len(labels) == len(entries):
        videos = f"segments of {len(segments)} videos and labels of {len(labels)}"
        parts.append(f"the truth has {videos}, the test list has {len(entries)} videos")
    elif off := _normal_lengths_off(segments, labels, entries, lengths):
        known = sum(truth - features for truth, features, _ in off)
        parts.append(f"{len(off)} normal videos differ, by {known:+d} frames together: {_worst(off)}")
    if len({*lengths}) == 1 < len(lengths):
        parts.append(_EQUAL)
    advice = "make truth for these features with 'python -m clipfusionvad lists'"
    fitting = max(1, round(count * size / total))
    fits = all(abs(truth - features // size * fitting) < fitting for truth, features, _ in off)
    if off and fits and not 1 / FAR < count / total < FAR:
        return "; ".join([*parts, f"give --frames-per-snippet {fitting}, which fits every row"])
    if known != difference:
        advice = (
            f"the videos of the {'other ' if known else ''}{difference - known:+d} frames are unknown, because the "
            f"arrays hold no names: give an annotation file (.csv, .json) as --gt-path, or {advice}"
        )
    return "; ".join([*parts, advice])
