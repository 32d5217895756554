"""Turn the anomaly scores of consecutive snippets into segments, of a whole video or of a running stream.

A segment starts with a snippet that reaches the high threshold and lasts while snippets reach the low one. Segments
are then merged over short gaps, and short ones are dropped. Snippet i has the frames bounds[i] … bounds[i + 1] - 1,
which are shown from seconds[i] to seconds[i + 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from clipfusionvad.io.errors import UserError


@dataclass(frozen=True)
class Thresholds:
    """Scores at which a segment starts (high) and below which it ends (low), its minimum length, gaps to merge."""

    high: float = 0.5
    low: float = 0.4
    min_seconds: float = 1.0
    merge_seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise UserError(f"the low threshold {self.low} is above the high one, {self.high}")

    @classmethod
    def of(cls, high: float | None, low: float | None, min_seconds: float, merge_seconds: float) -> Thresholds:
        """Fill in a threshold that is not given: its default, or the given one where the default is beyond it."""
        if high is None:
            high = max(cls.high, cls.low if low is None else low)
        return cls(high, min(cls.low, high) if low is None else low, min_seconds, merge_seconds)

    def least_seconds(self, whole: float) -> float:
        """Return the length of the shortest segment in a video of ``whole`` seconds, which is never too short."""
        return min(self.min_seconds, whole)

    def least_frames(self, fps: float, whole: int) -> float:
        """Return the frames of the shortest segment in a video of ``whole`` frames, which is never too short."""
        return min(round(self.min_seconds * fps, 6), whole)

    def merged_frames(self, fps: float) -> float:
        """Return the frames of the longest gap that is merged."""
        # Rounded, so that 0.7 s at 10 frames per second are 7 frames exactly.
        return round(self.merge_seconds * fps, 6)


class Span(NamedTuple):
    """Frames start_frame … end_frame - 1; start and end are those bounds in seconds."""

    start_frame: int
    end_frame: int
    start: float
    end: float


@dataclass(frozen=True)
class Segment:
    """Frames start_frame … end_frame - 1; start and end are those bounds in seconds.

    ``confidence`` is the mean, ``peak`` the highest anomaly score of its snippets. ``label`` is the anomalous class
    of highest mean probability, ``class_probability`` that mean. ``class_unsure``: that of another anomalous class is
    more than half of it. All three are None for a method without classes.
    """

    start: float
    end: float
    start_frame: int
    end_frame: int
    confidence: float
    peak: float
    label: str | None = None
    class_probability: float | None = None
    class_unsure: bool | None = None


def find_segments(
    anomaly: np.ndarray,
    classes: Any,
    bounds: np.ndarray,
    seconds: np.ndarray,
    labels: Sequence[str],
    thresholds: Thresholds,
) -> list[Segment]:
    """Return the segments of one video: anomaly (n,), classes (n, C) or None, bounds and seconds (n + 1,)."""
    segments = []
    for first, last in find_spans(anomaly, seconds, thresholds):
        part, known = anomaly[first:last], None if classes is None else classes[first:last].sum(axis=0)
        span = Span(int(bounds[first]), int(bounds[last]), float(seconds[first]), float(seconds[last]))
        segments.append(_Sums(span, int(last - first), part.sum(), part.max(), known).segment(labels))
    return segments


def find_spans(anomaly: np.ndarray, seconds: np.ndarray, thresholds: Thresholds) -> np.ndarray:
    """Return the segments as snippets [first, last), (k, 2) int."""
    verdict = np.where(anomaly >= thresholds.high, 1, np.where(anomaly < thresholds.low, -1, 0))
    # A score between the thresholds keeps the state of the last decisive one.
    decided = np.maximum.accumulate(np.where(verdict != 0, np.arange(len(verdict)), 0))
    inside = verdict[decided] == 1
    spans = np.flatnonzero(np.diff(inside, prepend=False, append=False)).reshape(-1, 2)
    gaps = _length(seconds[spans[:-1, 1]], seconds[spans[1:, 0]]) > thresholds.merge_seconds
    starts, ends = spans[np.insert(gaps, 0, True)[: len(spans)], 0], spans[np.append(gaps, True)[: len(spans)], 1]
    long = _length(seconds[starts], seconds[ends]) >= thresholds.least_seconds(_length(seconds[0], seconds[-1]))
    return np.stack([starts, ends], axis=1)[long]


def _length(start: Any, end: Any) -> Any:
    """Return seconds between times, rounded so that 7 frames of 0.1 s are 0.7 s exactly."""
    return np.round(end - start, 6)


class Alert(NamedTuple):
    """A segment has started (and lasted long enough to count) or ended; ``segment`` is its state at that time."""

    kind: Literal["start", "end"]
    segment: Segment


class OnlineSegments:
    """``find_segments`` for one snippet at a time in constant memory; the alerts give the same segments."""

    def __init__(self, labels: Sequence[str], thresholds: Thresholds):
        self.labels, self.thresholds = labels, thresholds
        self.first: float | None = None
        self.last = 0.0
        self.inside = self.announced = False
        self.run: _Sums | None = None
        self.gap: _Sums | None = None

    def add(self, span: Span, anomaly: float, classes: np.ndarray | None = None) -> list[Alert]:
        """Add the next snippet with its score and class probabilities (C,) or None."""
        self.first, self.last = span.start if self.first is None else self.first, span.end
        self.inside = anomaly >= self.thresholds.high or (self.inside and anomaly >= self.thresholds.low)
        alerts = []
        until = span.start if self.inside else span.end
        if self.run and _length(self.run.span.end, until) > self.thresholds.merge_seconds:
            alerts = self._close()
        snippet = _Sums(span, 1, anomaly, anomaly, classes)
        if self.inside:
            self.run = snippet if self.run is None else self.run.then(self.gap).then(snippet)
            self.gap = None
            alerts += self._announce(math.inf)
        elif self.run:
            self.gap = snippet if self.gap is None else self.gap.then(snippet)
        return alerts

    def finish(self) -> list[Alert]:
        """Close the last segment at the end of the stream; the object can then be reused."""
        alerts = self._announce(_length(self.first or 0, self.last)) + self._close()
        self.first, self.inside = None, False
        return alerts

    def _announce(self, whole: float) -> list[Alert]:
        least, run = self.thresholds.least_seconds(whole), self.run
        if self.announced or run is None or _length(run.span.start, run.span.end) < least:
            return []
        self.announced = True
        return [Alert("start", run.segment(self.labels))]

    def _close(self) -> list[Alert]:
        ended = [Alert("end", self.run.segment(self.labels))] if self.run and self.announced else []
        self.run = self.gap = None
        self.announced = False
        return ended


@dataclass(frozen=True)
class _Sums:
    """Sums over consecutive snippets."""

    span: Span
    count: int
    anomaly: float
    peak: float
    classes: np.ndarray | None

    def then(self, other: _Sums | None) -> _Sums:
        if other is None:
            return self
        classes = None if self.classes is None else self.classes + other.classes
        peak = max(self.peak, other.peak)
        span = self.span._replace(end_frame=other.span.end_frame, end=other.span.end)
        return _Sums(span, self.count + other.count, self.anomaly + other.anomaly, peak, classes)

    def segment(self, labels: Sequence[str]) -> Segment:
        span, mean = self.span, float(self.anomaly / self.count)
        bounds = (span.start, span.end, span.start_frame, span.end_frame)
        if self.classes is None:
            return Segment(*bounds, mean, float(self.peak))
        order = 1 + np.argsort(-self.classes[1:], kind="stable")
        best, second = int(order[0]), self.classes[order[1:2]]
        found = labels[best], float(self.classes[best] / self.count), bool((2 * second > self.classes[best]).any())
        return Segment(*bounds, mean, float(self.peak), *found)
