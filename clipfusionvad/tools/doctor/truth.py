"""Checks of the truth of the test list: mistakes that change the metrics without any error."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from clipfusionvad.data.features import check_frames, recorded_frames
from clipfusionvad.data.truth import Segment, frames_from_segments, is_keyed
from clipfusionvad.datasets import NORMAL_IN_TRUTH
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.npy import read_array
from clipfusionvad.tools.doctor import ERROR, NOTE, WARNING, Finding, some
from clipfusionvad.tools.doctor.scan import DatasetScan, ScannedRow

# The share of the frames abnormal in either that frame truth and segments may disagree on.
MOST_DIFFERING = 0.5
_REORDER = "is the truth of another list, or in another order? Build both with 'python -m clipfusionvad lists'"


def truth_unreadable(scan: DatasetScan) -> Iterator[Finding]:
    """The truth is missing, damaged, of other videos, or does not fit the features."""
    if scan.truth_problem:
        yield Finding(ERROR, scan.truth_problem)
    elif scan.has_truth and scan.test.rows and not scan.truth:
        count = len(scan.test.rows) - len(scan.test.read)
        what = f"it was not checked, because {count} feature files of the test list could not be read"
        yield Finding(NOTE, what, file=scan.config.gt_path)


def truth_length(scan: DatasetScan) -> Iterator[Finding]:
    """Videos are longer or shorter in the truth than their features by a snippet or more."""
    for note in scan.truth_notes:
        yield Finding(WARNING, note, "make truth for these features with 'python -m clipfusionvad lists'")


def last_row(scan: DatasetScan) -> Iterator[Finding]:
    """Videos whose frames divide by those of a row have one row fewer: the extraction drops the last one."""
    if (stride := scan.config.stride) is None:
        return
    known = [(row, scan.annotated.get(row.video)) for row in scan.test.read]
    frames = [(row, item.frames) for row, item in known if item and item.frames]
    # Rows more than the whole ones that the frames give, where they divide, and where they do not.
    whole = [(row, row.features.snippets - count // stride) for row, count in frames if count % stride == 0]
    others = [row.features.snippets - count // stride for row, count in frames if count % stride]
    short = [row for row, more in whole if more == -1]
    if 2 * len(short) > len(whole) and sum(more < 0 for more in others) <= len(others) / 10:
        rule = f"; others have {'ceil' if np.median(others) > 0 else 'floor'}(frames / {stride})" if others else ""
        many = "all" if len(short) == len(whole) else f"{len(short)} of"
        what = f"{many} {len(whole)} videos whose frames divide by {stride} have one row fewer than that{rule}"
        advice = f"the extraction ends one row early, as range(0, frames - {stride}, {stride}) does: correct it"
        yield short[0].finding(WARNING, f"{what}, the first is {short[0].file}", advice)


def frames_per_snippet(scan: DatasetScan) -> Iterator[Finding]:
    """The truth has another number of frames per snippet than --frames-per-snippet says."""
    path, used = scan.config.gt_path, scan.config.frames_per_snippet
    if not scan.has_truth or not scan.test_is_whole or scan.config.segments == "equal":
        return
    counts = [row.features.snippets for row in scan.test.rows]
    items = [scan.annotated.get(row.video) for row in scan.test.rows]
    ratios = [item.frames / count for item, count in zip(items, counts, strict=True) if item and item.frames]
    if not is_keyed(path):
        try:
            ratios = [len(read_array(path, "frame truth")) / sum(counts)]
        except (UserError, TypeError):
            return
    found = float(np.median(ratios)) if ratios else 0
    if found and not 1 / 1.25 < found / used < 1.25:
        what = f"there are {found:.4g} frames of truth per feature row, but --frames-per-snippet is {used}"
        advice = f"give --frames-per-snippet {round(found)}" if found > 0.9 else "look at the truth's lengths"
        if len({*counts}) == 1 < len({*ratios}):
            advice = "if a row is an equal part of its video, give --segments equal"
        yield Finding(ERROR, what, advice, path)


def recorded_stride(scan: DatasetScan) -> Iterator[Finding]:
    """The extraction's manifest beside the features has another number of frames per row than --frames-per-snippet."""
    if (used := scan.config.stride) is None:
        return
    for listed in scan.lists:
        try:
            paths = [row.entry.path for row in listed.rows]
            check_frames(paths, used, recorded_frames(paths))
        except UserError as error:
            yield listed.finding(ERROR if listed is scan.test else WARNING, str(error))


def truth_of_training_videos(scan: DatasetScan) -> Iterator[Finding]:
    """The truth file is that of training videos."""
    if trained := sorted(scan.annotated.keys() & scan.train.videos.keys() - scan.test.videos.keys()):
        what = f"it has {len(trained)} videos of the training list, the first is {trained[0]}"
        yield Finding(WARNING, what, "are the lists swapped? Is it the truth of this test list?", scan.config.gt_path)


def normal_with_truth(scan: DatasetScan) -> Iterator[Finding]:
    """A test video that its list calls normal has abnormal frames or segments."""
    for video in _videos(scan):
        if not scan.dataset.is_normal(video.row.label):
            continue
        if video.frames.any():
            yield video.about_frames(ERROR, f"is {video.row.label}, but has {int(video.frames.sum())} abnormal frames")
        if not video.normal:
            yield video.about_segments(ERROR, f"is {video.row.label}, but has segments of {some(video.labels)}")
        elif video.segments[0][0] != 0 or len(video.segments) > 1:
            what = f"is {video.row.label}, but its segment is not the whole video: {video.segments}"
            yield video.about_segments(WARNING, what, "")


def anomalous_without_truth(scan: DatasetScan) -> Iterator[Finding]:
    """A test video that its list calls anomalous has no abnormal frame or no segment."""
    for video in _videos(scan):
        if not scan.dataset.is_normal(video.row.label):
            if not video.segments or video.normal:
                yield video.about_segments(ERROR, f"is {video.row.label}, but has no segment")
            elif not video.frames.any():
                yield video.about_frames(ERROR, f"is {video.row.label}, but has no abnormal frame")


def segment_bounds(scan: DatasetScan) -> Iterator[Finding]:
    """A segment is empty, lies past the end of the video, or runs past it: the rest is cut off, as released."""
    for video in _videos(scan):
        for start, end in [] if video.normal else video.segments:
            place = f"has {len(video.frames)} frames; the segment {start} to {end}"
            if end == start and not scan.dataset.empty_intervals:
                yield video.about_segments(ERROR, f"has the empty segment {start} to {end}", "correct it")
            elif start >= len(video.frames):
                yield video.about_segments(ERROR, f"{place} lies past its end")
            elif end > len(video.frames):
                yield video.about_segments(NOTE, f"{place} runs past its end", "the rest is cut off")


def segment_order(scan: DatasetScan) -> Iterator[Finding]:
    """Segments of one class overlap, or are not in the order of time."""
    for video in _videos(scan):
        for name in dict.fromkeys(video.labels):
            pairs = zip(video.segments, video.labels, strict=True)
            segments = [segment for segment, label in pairs if label == name]
            if any(after[0] < before[1] for before, after in pairwise(sorted(segments))):
                what = f"has segments of {name} that overlap: {some(segments)}"
                yield video.unless_known(video.about_segments(WARNING, what, "join them: detection mAP counts both"))
            elif segments != sorted(segments):
                what = f"has segments of {name} that are not in order: {some(segments)}"
                yield video.about_segments(NOTE, what, "this is harmless, unless a digit is wrong")


def segment_labels(scan: DatasetScan) -> Iterator[Finding]:
    """A segment is of a class that the video's label does not name."""
    for video in _videos(scan):
        odd = {*video.labels} - {*scan.dataset.codes(video.row.label), NORMAL_IN_TRUTH}
        if odd and not scan.dataset.is_normal(video.row.label):
            what = f"is {video.row.label}, but has segments of {', '.join(sorted(odd))}"
            yield video.unless_known(video.about_segments(ERROR, what))


def truth_disagrees(scan: DatasetScan) -> Iterator[Finding]:
    """Frame truth and segments of a video mark different times."""
    differing = 0
    for video in _videos(scan):
        if video.normal:
            continue
        marked = frames_from_segments(video.segments, len(video.frames))
        off, either = int((marked != video.frames).sum()), int((marked | video.frames).sum())
        differing += off
        if off > MOST_DIFFERING * either:
            what = f"has {either} frames that are abnormal by its frames or segments, {either - off} of them by both"
            yield video.about_frames(ERROR, what)
    if differing:
        what = f"frame truth and {scan.segments_file} differ in {differing} frames in total"
        yield Finding(NOTE, what, "this is normal if they follow two annotation files", scan.config.gt_path)


@dataclass(frozen=True)
class _Video:
    """A test video with its truth."""

    scan: DatasetScan
    row: ScannedRow
    frames: np.ndarray
    segments: list[Segment]
    labels: list[str]

    @property
    def name(self) -> str:
        return f"{self.row.entry.video} (row {self.row.entry.row} of the test list)"

    @property
    def normal(self) -> bool:
        """Whether the truth calls the video normal."""
        return self.labels == [NORMAL_IN_TRUTH]

    def about_frames(self, level: str, what: str) -> Finding:
        return Finding(level, f"{self.name} {what}", _REORDER, self.scan.config.gt_path)

    def about_segments(self, level: str, what: str, advice: str = _REORDER) -> Finding:
        return Finding(level, f"{self.name} {what}", advice, self.scan.segments_file)

    def unless_known(self, finding: Finding) -> Finding:
        """Return a note instead if the official annotation has the same quirk."""
        if self.row.entry.video not in self.scan.dataset.annotation_quirks:
            return finding
        return replace(finding, level=NOTE, advice="as in the official annotation")


def _videos(scan: DatasetScan) -> list[_Video]:
    """Return every test video with its truth, if the truth could be read."""
    truth = (scan.truth.frames, scan.truth.segments, scan.truth.labels) if scan.truth else ([], [], [])
    return [_Video(scan, *parts) for parts in zip(scan.test.rows if scan.truth else [], *truth, strict=True)]
