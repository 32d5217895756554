"""Checks of the truth of the test list: what nobody notices because the numbers come out all the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from clipfusionvad.data.annotations import read_annotations, video_key
from clipfusionvad.data.truth import KEYED_SUFFIXES, Segment, frames_from_segments
from clipfusionvad.datasets import NORMAL_IN_TRUTH
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.npy import read_array
from clipfusionvad.tools.doctor.findings import ERROR, NOTE, WARNING, Finding
from clipfusionvad.tools.doctor.survey import Row, Survey

# Of the frames that either says are abnormal, how many frame truth and segments may see differently.
MOST_DIFFERING = 0.5


def truth_unreadable(survey: Survey) -> Iterator[Finding]:
    """The truth is missing, damaged, of other videos, or does not fit the features."""
    if survey.truth_problem:
        yield Finding(ERROR, survey.truth_problem)
    elif survey.has_truth and survey.test.rows and not survey.truth:
        count = len(survey.test.rows) - len(survey.test.read)
        what = f"it was not looked at, as {count} feature files of the test list could not be read"
        yield Finding(NOTE, what, str(survey.options.gt_path))


def truth_length(survey: Survey) -> Iterator[Finding]:
    """Videos are longer or shorter in the truth than their features by a snippet or more."""
    for note in survey.truth_notes:
        yield Finding(WARNING, note, advice="make truth for these features with 'python -m clipfusionvad lists'")


def frames_per_snippet(survey: Survey) -> Iterator[Finding]:
    """The truth has another number of frames to a snippet than --frames-per-snippet says."""
    told = survey.options.frames_per_snippet
    found = _frames_per_snippet(survey)
    if found and not 1 / 1.25 < found / told < 1.25:
        what = f"there are {found:.4g} frames of truth to a feature row, but --frames-per-snippet is {told}"
        advice = f"give --frames-per-snippet {round(found)}" if found > 0.9 else "look at the truth's lengths"
        yield Finding(ERROR, what, str(survey.options.gt_path), advice=advice)


def truth_of_training_videos(survey: Survey) -> Iterator[Finding]:
    """The truth file is that of training videos."""
    path = survey.options.gt_path
    if survey.has_truth and _is_keyed(path):
        try:
            named = {video_key(name).casefold() for name in read_annotations(path, survey.dataset)}
        except UserError:
            return
        if trained := sorted(named & survey.train.videos.keys() - survey.test.videos.keys()):
            what = f"it has {len(trained)} videos of the training list, the first is {trained[0]}"
            yield Finding(
                WARNING, what, str(path), advice="are the lists the wrong way round, or test videos trained on?"
            )


def normal_with_truth(survey: Survey) -> Iterator[Finding]:
    """A test video that its list calls normal has abnormal frames or segments."""
    for row, frames, segments, labels in _videos(survey):
        if survey.dataset.is_normal(row.label):
            if frames.any():
                what = f"{_name(survey, row)} is {row.label}, but has {int(frames.sum())} abnormal frames"
                yield Finding(ERROR, what, str(survey.options.gt_path), advice=_REORDER)
            if labels != [NORMAL_IN_TRUTH]:
                what = f"{_name(survey, row)} is {row.label}, but has segments of {_some(labels)}"
                yield Finding(ERROR, what, survey.segments_file, advice=_REORDER)
            elif segments[0][0] != 0 or len(segments) > 1:
                what = f"{_name(survey, row)} is {row.label}, but its segment is not the whole video: {segments}"
                yield Finding(WARNING, what, survey.segments_file)


def anomalous_without_truth(survey: Survey) -> Iterator[Finding]:
    """A test video that its list calls anomalous has no abnormal frame or no segment."""
    for row, frames, segments, labels in _videos(survey):
        if not survey.dataset.is_normal(row.label):
            if not segments or labels == [NORMAL_IN_TRUTH]:
                what = f"{_name(survey, row)} is {row.label}, but has no segment"
                yield Finding(ERROR, what, survey.segments_file, advice=_REORDER)
            elif not frames.any():
                what = f"{_name(survey, row)} is {row.label}, but none of its frames is abnormal"
                yield Finding(ERROR, what, str(survey.options.gt_path), advice=_REORDER)


def segment_bounds(survey: Survey) -> Iterator[Finding]:
    """A segment is empty, or lies past the end of the video."""
    for row, frames, segments, labels in _videos(survey):
        if labels == [NORMAL_IN_TRUTH]:
            continue
        for start, end in segments:
            place = f"the segment {start} to {end} of {_name(survey, row)}"
            if end == start and not survey.dataset.empty_intervals:
                yield Finding(ERROR, f"{place} is empty", survey.segments_file, advice="correct it")
            elif start >= len(frames):
                what = f"{place} lies past the end of the video, which has {len(frames)} frames"
                yield Finding(ERROR, what, survey.segments_file, advice=_REORDER)


def segments_past_the_end(survey: Survey) -> Iterator[Finding]:
    """Segments that run past the end of their videos; what is past it is cut off, as in the released truth."""
    past = [
        (end - len(frames), row)
        for row, frames, segments, labels in _videos(survey)
        for start, end in segments
        if labels != [NORMAL_IN_TRUTH] and start < len(frames) < end
    ]
    if past:
        most, row = max(past, key=lambda item: item[0])
        what = f"segments that run past the end of their videos: {len(past)}, the furthest by {most} frames"
        yield Finding(NOTE, f"{what} ({_name(survey, row)})", survey.segments_file, advice="the rest is cut off")


def segment_order(survey: Survey) -> Iterator[Finding]:
    """Segments of one class that overlap, or do not stand in the order of time."""
    for row, _, segments, labels in _videos(survey):
        for name in dict.fromkeys(labels):
            own = [segment for segment, label in zip(segments, labels, strict=True) if label == name]
            if any(after[0] < before[1] for before, after in pairwise(sorted(own))):
                what = f"segments of {name} of {_name(survey, row)} overlap: {_some(own)}"
                advice = "join them: detection mAP counts both"
                yield _unless_known(survey, row, Finding(WARNING, what, survey.segments_file, advice=advice))
            elif own != sorted(own):
                what = f"segments of {name} of {_name(survey, row)} are not in order: {_some(own)}"
                yield Finding(NOTE, what, survey.segments_file, advice="no matter, unless a digit is wrong")


def segment_labels(survey: Survey) -> Iterator[Finding]:
    """A segment is of a class that the video's label does not name."""
    dataset = survey.dataset
    for row, _, _, labels in _videos(survey):
        odd = sorted({*labels} - {*dataset.codes(row.label), NORMAL_IN_TRUTH})
        if odd and not dataset.is_normal(row.label):
            what = f"{_name(survey, row)} is {row.label}, but has segments of {', '.join(odd)}"
            yield _unless_known(survey, row, Finding(ERROR, what, survey.segments_file, advice=_REORDER))


def truth_disagrees(survey: Survey) -> Iterator[Finding]:
    """Frame truth and segments of a video tell of different times."""
    differing = 0
    for row, frames, segments, labels in _videos(survey):
        if labels == [NORMAL_IN_TRUTH]:
            continue
        marked = frames_from_segments([(max(start, 0), max(end, 0)) for start, end in segments], len(frames))
        off, either = int((marked != frames).sum()), int((marked | frames).sum())
        differing += off
        if off > MOST_DIFFERING * either:
            what = f"frames and segments of {_name(survey, row)} agree in {either - off} of {either} abnormal frames"
            yield Finding(ERROR, what, str(survey.options.gt_path), advice=_REORDER)
    if differing:
        what = f"frame truth and {survey.segments_file} differ in {differing} frames altogether"
        yield Finding(NOTE, what, str(survey.options.gt_path), advice="so where they follow two annotation files")


_REORDER = "is the truth of another list, or in another order? Build both with 'python -m clipfusionvad lists'"


def _videos(survey: Survey) -> Iterator[tuple[Row, np.ndarray, list[Segment], list[str]]]:
    """Every test video of a known label with its truth, where there is one."""
    if survey.truth:
        yield from zip(survey.test.rows, survey.truth.frames, survey.truth.segments, survey.truth.labels, strict=True)


def _unless_known(survey: Survey, row: Row, finding: Finding) -> Finding:
    """A note in place of what the official annotation has just so."""
    if row.entry.video not in survey.dataset.annotation_quirks:
        return finding
    return replace(finding, level=NOTE, advice="so in the official annotation")


def _name(survey: Survey, row: Row) -> str:
    return f"{row.entry.video} (row {row.number} of the test list)"


def _is_keyed(path: str) -> bool:
    return Path(path).suffix.lower() in KEYED_SUFFIXES


def _some(items: list[Any]) -> str:
    return ", ".join(map(str, items[:4])) + (", …" if len(items) > 4 else "")


def _frames_per_snippet(survey: Survey) -> float | None:
    """Frames of truth to a row of features: the middling video's where truth is told by video, else altogether."""
    path, rows = survey.options.gt_path, survey.test.rows
    if not survey.has_truth or not rows or len(survey.test.read) < len(rows):
        return None
    try:
        if not _is_keyed(path):
            return len(read_array(path, "frame truth")) / sum(row.features.snippets for row in rows)
        known = {name.casefold(): item.frames for name, item in read_annotations(path, survey.dataset).items()}
    except (UserError, TypeError):
        return None
    ratios = [frames / row.features.snippets for row in rows if (frames := known.get(row.video))]
    return float(np.median(ratios)) if ratios else None


CHECKS = (
    truth_unreadable,
    truth_length,
    frames_per_snippet,
    truth_of_training_videos,
    normal_with_truth,
    anomalous_without_truth,
    segment_bounds,
    segments_past_the_end,
    segment_order,
    segment_labels,
    truth_disagrees,
)
