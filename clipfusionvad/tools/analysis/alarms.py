"""False alarms per hour against recall.

S snippets of all test videos in one sequence, N videos, K thresholds, M annotated events. An alarm is a run of
snippets that reach the threshold; alarms are merged over short gaps and dropped if they are too short, as
``metrics.segments`` does with one threshold for both bounds. An alarm is false if none of its frames is annotated. An
event is found if an alarm overlaps it. Rates are per hour of frames that are not annotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option
from clipfusionvad.metrics.segments import Thresholds
from clipfusionvad.report.scores import Tested
from clipfusionvad.tools.analysis.figures import COLOURS, hide_spines, new_figure
from clipfusionvad.tools.analysis.result import AnalysisResult, branch_names, table_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clipfusionvad.report.curves import Pooled

MergeSeconds = Annotated[float, Option("merge alarms over gaps of up to this many seconds", minimum=0)]
MinSeconds = Annotated[float, Option("seconds of the shortest alarm", minimum=0)]
RECALLS = (0.5, 0.7, 0.8, 0.9)
# Thresholds of a curve besides the highest scores of the events, at which recall changes.
POINTS = 300
# Cells (thresholds × snippets) that are processed at once.
CELLS = 2**24
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class FrameAxis:
    """All test videos on one axis of frames.

    ``video`` (S,) the video of each snippet; ``bounds`` (S + 1,) frames before each snippet; ``abnormal``
    (S + 1,) annotated frames before each snippet; ``snippets`` (N,) and ``frames`` (N,) of each video. Each annotated
    interval of a video is one event: ``events`` (M, 2) as frames [start, end) of the axis, ``labels`` their classes.
    """

    video: np.ndarray
    bounds: np.ndarray
    abnormal: np.ndarray
    snippets: np.ndarray
    frames: np.ndarray
    events: np.ndarray
    labels: list[list[str]]
    fps: float

    @property
    def normal_hours(self) -> float:
        """Hours of frames that are not annotated."""
        return float(self.bounds[-1] - self.abnormal[-1]) / self.fps / SECONDS_PER_HOUR


def frame_axis(test: Tested, pooled: Pooled) -> FrameAxis:
    """Return the axis of a test whose truth is known; ``UserError`` without an annotated event or a normal frame."""
    video = np.repeat(np.arange(len(pooled.snippets)), pooled.snippets)
    frames = np.bincount(video, pooled.frames, len(pooled.snippets)).astype(np.int64)
    events = _events(test, frames)
    if not events or pooled.positives.sum() == pooled.frames.sum():
        raise UserError("alarms need both annotated events and frames that are not annotated")
    return FrameAxis(
        video,
        np.concatenate([[0], np.cumsum(pooled.frames)]),
        np.concatenate([[0], np.cumsum(pooled.positives)]),
        pooled.snippets,
        frames,
        np.array(list(events), dtype=np.int64),
        list(events.values()),
        test.videos.dataset.fps,
    )


def _events(test: Tested, frames: np.ndarray) -> dict[tuple[int, int], list[str]]:
    """Return intervals on the axis, cut to their video, and the classes of each."""
    truth, anomalous = test.videos.known_truth, test.videos.dataset.labels[1:]
    events: dict[tuple[int, int], list[str]] = {}
    offsets = np.cumsum(frames) - frames
    for offset, length, spans, names in zip(
        offsets.tolist(), frames.tolist(), truth.segments, truth.labels, strict=True
    ):
        for (start, end), name in zip(spans, names, strict=True):
            if name in anomalous and start < min(end, length):
                events.setdefault((offset + start, offset + min(end, length)), []).append(name)
    return events


@dataclass(frozen=True)
class Alarms:
    """Alarms of one curve at K thresholds: ``row`` (A,) the index of each one's threshold, in rising order, and its
    frames ``start``, ``end`` (A,), in rising order within a threshold; ``abnormal`` (A,) of them are annotated."""

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray
    abnormal: np.ndarray

    @property
    def false(self) -> np.ndarray:
        return self.abnormal == 0


def find_alarms(axis: FrameAxis, curve: np.ndarray, thresholds: np.ndarray, rule: Thresholds) -> Alarms:
    """Return the alarms of a curve (S,) at each of the thresholds (K,); only the two durations of ``rule`` count."""
    step = max(1, CELLS // (len(curve) + len(axis.snippets)))
    parts = [_find(axis, curve, thresholds[at : at + step], at, rule) for at in range(0, len(thresholds), step)]
    return Alarms(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _find(
    axis: FrameAxis, curve: np.ndarray, thresholds: np.ndarray, offset: int, rule: Thresholds
) -> tuple[np.ndarray, ...]:
    """Return the columns of ``Alarms`` for some thresholds, the first of which has the index ``offset``."""
    # A place that is never inside follows every video, so that no run continues into the next video or row.
    columns = np.arange(len(curve)) + axis.video
    inside = np.zeros((len(thresholds), len(curve) + len(axis.snippets)), dtype=bool)
    inside[:, columns] = curve >= thresholds[:, None]
    edges = np.flatnonzero(np.diff(inside.ravel().view(np.int8), prepend=0)).reshape(-1, 2)
    row, place = np.divmod(edges[:, 0], inside.shape[1])
    first = np.searchsorted(columns, place)
    last = first + edges[:, 1] - edges[:, 0]
    start, end, video = axis.bounds[first], axis.bounds[last], axis.video[first]

    new = np.ones(len(row), dtype=bool)
    new[1:] = (row[1:] != row[:-1]) | (video[1:] != video[:-1])
    new[1:] |= start[1:] - end[:-1] > rule.merged_frames(axis.fps)
    heads = np.flatnonzero(new)
    tails = np.append(heads[1:], len(row))[: len(heads)] - 1
    row, video, start, end = row[heads], video[heads], start[heads], end[tails]
    abnormal = axis.abnormal[last[tails]] - axis.abnormal[first[heads]]

    least = np.minimum(rule.least_frames(axis.fps, 1 << 62), axis.frames[video])
    kept = (end - start >= least) & (end > start)
    return row[kept] + offset, start[kept], end[kept], abnormal[kept]


def first_alarms(axis: FrameAxis, alarms: Alarms, count: int) -> np.ndarray:
    """Return the frames from each event's start to its first alarm at each of ``count`` thresholds: (K, M).

    0 where the alarm began before the event, inf where the event is missed.
    """
    whole = axis.bounds[-1] + 1
    ends = alarms.row * whole + alarms.end
    wanted = np.arange(count)[:, None] * whole + axis.events[:, 0]
    at = np.searchsorted(ends, wanted, side="right")
    padded_row, padded_start = np.append(alarms.row, -1)[at], np.append(alarms.start, 0)[at]
    found = (padded_row == np.arange(count)[:, None]) & (padded_start < axis.events[:, 1])
    return np.where(found, np.maximum(padded_start - axis.events[:, 0], 0), np.inf)


@dataclass(frozen=True)
class AlarmCurve:
    """One branch at falling ``thresholds`` (K,), and at each: false alarms per hour, the share of events found, the
    share of normal frames under an alarm, and the share of annotated frames under an alarm; (K,) each."""

    thresholds: np.ndarray
    per_hour: np.ndarray
    recall: np.ndarray
    frame_rate: np.ndarray
    frame_recall: np.ndarray

    def at_recall(self, recall: float) -> int:
        """Return the index of the highest threshold that finds this share of the events; -1 if none does."""
        reached = np.flatnonzero(self.recall >= recall - 1e-12)
        return int(reached[0]) if len(reached) else -1

    def at_rate(self, per_hour: float) -> int:
        """Return the index of the lowest threshold down to which there are never more false alarms; -1 if none.

        At far lower thresholds alarms merge until few are left; those are not counted.
        """
        above = np.flatnonzero(self.per_hour > per_hour)
        return (int(above[0]) if len(above) else len(self.per_hour)) - 1


def alarm_curve(axis: FrameAxis, curve: np.ndarray, rule: Thresholds) -> AlarmCurve:
    """Return the rates of a curve (S,) at up to ``POINTS`` thresholds and at the highest score of every event."""
    thresholds = _thresholds(axis, curve)
    alarms = find_alarms(axis, curve, thresholds, rule)
    count = len(thresholds)
    covered, abnormal = (np.bincount(alarms.row, of, count) for of in (alarms.end - alarms.start, alarms.abnormal))
    total = axis.abnormal[-1]
    return AlarmCurve(
        thresholds.astype(np.float64),
        np.bincount(alarms.row[alarms.false], minlength=count) / axis.normal_hours,
        np.isfinite(first_alarms(axis, alarms, count)).mean(axis=1),
        (covered - abnormal) / (axis.bounds[-1] - total),
        abnormal / total,
    )


def _thresholds(axis: FrameAxis, curve: np.ndarray) -> np.ndarray:
    """Return scores at which something changes, falling: densest at the top, where false alarms are few."""
    ranked = np.unique(curve)[::-1]
    if len(ranked) > POINTS:
        half = POINTS // 2
        ranks = np.concatenate([np.geomspace(1, len(ranked), half), np.linspace(1, len(ranked), half)])
        ranked = ranked[np.unique(ranks.astype(np.int64)) - 1]
    first = np.searchsorted(axis.bounds, axis.events[:, 0], side="right") - 1
    last = np.searchsorted(axis.bounds, axis.events[:, 1], side="left")
    bounds = np.stack([first, last], axis=1).ravel()
    peaks = np.maximum.reduceat(np.append(curve, -np.inf), bounds)[::2]
    return np.unique(np.concatenate([ranked, peaks]))[::-1]


def draw_alarms(curves: Sequence[AlarmCurve], names: Sequence[str]) -> Figure:
    """Draw the share of events found over false alarms per hour and over the share of normal time under alarm."""
    figure = new_figure(11, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    for curve, name, colour in zip(curves, names, COLOURS, strict=False):
        points = [at for at in map(curve.at_recall, RECALLS) if at >= 0]
        # Where each level of recall is first reached: lower thresholds of the same recall only cost more.
        first = np.unique(curve.recall, return_index=True)[1]
        for axis, cost in ((left, curve.per_hour), (right, 100 * curve.frame_rate)):
            axis.plot(cost[first], curve.recall[first], "-", color=colour, lw=1.6, label=name)
            axis.plot(cost[points], curve.recall[points], "o", color=colour, ms=5)
    left.set_xlabel("false alarms per hour of normal video")
    right.set_xlabel("percent of normal frames under alarm")
    left.set_ylabel("share of annotated events found")
    for axis in (left, right):
        axis.set_ylim(0, 1.03)
        axis.set_yticks([0, *RECALLS, 1])
        axis.grid(axis="y", color="#dddddd", lw=0.7)
        axis.set_xscale("symlog", linthresh=1)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlim(left=0)
    hide_spines(left, right)
    left.legend(loc="lower right", frameon=False)
    return figure


def alarms(test: Tested, *, merge_seconds: MergeSeconds = 1.0, min_seconds: MinSeconds = 1.0) -> AnalysisResult:
    """False alarms per hour against recall."""
    import pandas as pd

    from clipfusionvad.report.curves import pool

    rule = Thresholds(min_seconds=min_seconds, merge_seconds=merge_seconds)
    pooled = pool(test.scores, test.videos)
    axis, names = frame_axis(test, pooled), branch_names(len(pooled.anomaly))
    curves = [alarm_curve(axis, curve, rule) for curve in pooled.anomaly]
    titles = {
        "thresholds": "threshold",
        "per_hour": "false_alarms_per_hour",
        "recall": "recall",
        "frame_rate": "normal_frames_under_alarm",
        "frame_recall": "frame_recall",
    }
    tables = [pd.DataFrame({"branch": name, **vars(curve)}) for name, curve in zip(names, curves, strict=True)]
    numbers = pd.concat(tables).rename(columns=titles)
    # Row -1 does not exist, so an operating point that is not reached is missing.
    fixed = [
        table.reindex([curve.at_recall(recall)]).assign(branch=name, recall=recall)
        for name, curve, table in zip(names, curves, tables, strict=True)
        for recall in RECALLS
    ]
    short = pd.concat(fixed)[["branch", "recall", "thresholds", "per_hour", "frame_rate", "frame_recall"]]
    short.columns = ["branch", "recall", "threshold", "false alarms/h", "normal frames", "frame recall"]
    about = f"{len(axis.events)} events, {axis.normal_hours:.2f} hours without one"
    return AnalysisResult(numbers, draw_alarms(curves, names), [about, table_text(short)])
