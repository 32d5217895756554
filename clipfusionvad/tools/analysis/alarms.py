"""False alarms per hour against recall: what an operator would have to bear for what is found.

S snippets of all test videos one after the other, N videos, K thresholds, M annotated events. An alarm is a run of
snippets that reach the threshold, merged over short gaps and dropped where too short, as ``video.segments`` does with
one threshold for both bounds. It is false if none of its frames is annotated. An event is found if an alarm overlaps
it. Rates are per hour of frames that are not annotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from clipfusionvad.io.errors import UserError
from clipfusionvad.metrics.segments import Thresholds
from clipfusionvad.report.curves import PooledScores, pool
from clipfusionvad.report.plots import COARSE_COLOUR, FINE_COLOUR
from clipfusionvad.report.scores import TestResult
from clipfusionvad.tools.analysis.result import Insight, Table, bare, branch_names

RECALLS = (0.5, 0.7, 0.8, 0.9)
# Thresholds of a curve besides the highest scores of the events, at which recall changes.
POINTS = 300
# Cells (thresholds × snippets) that are worked on at once.
CELLS = 2**24
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Timeline:
    """All test videos on one axis of frames.

    ``video`` (S,) which one a snippet belongs to; ``bounds`` (S + 1,) frames before each snippet; ``abnormal``
    (S + 1,) annotated frames before each snippet; ``snippets`` (N,) and ``frames`` (N,) of each video. Events, each
    interval of a video once: ``events`` (M, 2) as frames [start, end) of the axis, ``labels`` their classes.
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


def timeline(tested: TestResult, pooled: PooledScores) -> Timeline:
    """The axis of a test whose truth is known; ``UserError`` where it has no annotated event, or nothing else."""
    video = np.repeat(np.arange(len(pooled.snippets)), pooled.snippets)
    frames = np.bincount(video, pooled.frames, len(pooled.snippets)).astype(np.int64)
    events = _events(tested, frames)
    if not events or pooled.positives.sum() == pooled.frames.sum():
        raise UserError("alarms need both annotated events and frames that are not annotated")
    spans = np.array(list(events), dtype=np.int64)
    return Timeline(
        video,
        np.concatenate([[0], np.cumsum(pooled.frames)]),
        np.concatenate([[0], np.cumsum(pooled.positives)]),
        pooled.snippets,
        frames,
        spans,
        list(events.values()),
        tested.videos.dataset.fps,
    )


def _events(tested: TestResult, frames: np.ndarray) -> dict[tuple[int, int], list[str]]:
    """Intervals on the axis, cut to their video, and the classes of each."""
    truth, anomalous = tested.videos.known_truth, tested.videos.dataset.labels[1:]
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
    """Alarms of one curve at K thresholds: ``row`` (A,) the number of each one's threshold, in rising order, and its
    frames ``start``, ``end`` (A,), in rising order within a threshold; ``abnormal`` (A,) of them are annotated."""

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray
    abnormal: np.ndarray

    @property
    def false(self) -> np.ndarray:
        return self.abnormal == 0


def find_alarms(line: Timeline, curve: np.ndarray, thresholds: np.ndarray, rule: Thresholds) -> Alarms:
    """Alarms of a curve (S,) at each of the thresholds (K,); of ``rule`` only the two durations count."""
    step = max(1, CELLS // (len(curve) + len(line.snippets)))
    parts = [_find(line, curve, thresholds[at : at + step], at, rule) for at in range(0, len(thresholds), step)]
    return Alarms(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _find(
    line: Timeline, curve: np.ndarray, thresholds: np.ndarray, offset: int, rule: Thresholds
) -> tuple[np.ndarray, ...]:
    """Columns of ``Alarms`` for some thresholds, the first of which is number ``offset``."""
    # A place that is never inside follows every video, so that no run goes on into the next one or the next row.
    columns = np.arange(len(curve)) + line.video
    inside = np.zeros((len(thresholds), len(curve) + len(line.snippets)), dtype=bool)
    inside[:, columns] = curve >= thresholds[:, None]
    edges = np.flatnonzero(np.diff(inside.ravel().view(np.int8), prepend=0)).reshape(-1, 2)
    row, place = np.divmod(edges[:, 0], inside.shape[1])
    first = np.searchsorted(columns, place)
    last = first + edges[:, 1] - edges[:, 0]
    start, end, video = line.bounds[first], line.bounds[last], line.video[first]

    new = np.ones(len(row), dtype=bool)
    new[1:] = (row[1:] != row[:-1]) | (video[1:] != video[:-1])
    new[1:] |= start[1:] - end[:-1] > rule.merged_frames(line.fps)
    heads = np.flatnonzero(new)
    tails = np.append(heads[1:], len(row))[: len(heads)] - 1
    row, video, start, end = row[heads], video[heads], start[heads], end[tails]
    abnormal = line.abnormal[last[tails]] - line.abnormal[first[heads]]

    least = np.minimum(rule.least_frames(line.fps, 1 << 62), line.frames[video])
    kept = (end - start >= least) & (end > start)
    return row[kept] + offset, start[kept], end[kept], abnormal[kept]


def first_alarms(line: Timeline, alarms: Alarms, count: int) -> np.ndarray:
    """Frames from each event's start to its first alarm at each of ``count`` thresholds: (K, M), inf where missed.

    0 where the alarm was on before.
    """
    whole = line.bounds[-1] + 1
    ends = alarms.row * whole + alarms.end
    wanted = np.arange(count)[:, None] * whole + line.events[:, 0]
    at = np.searchsorted(ends, wanted, side="right")
    padded_row, padded_start = np.append(alarms.row, -1)[at], np.append(alarms.start, 0)[at]
    found = (padded_row == np.arange(count)[:, None]) & (padded_start < line.events[:, 1])
    return np.where(found, np.maximum(padded_start - line.events[:, 0], 0), np.inf)


@dataclass(frozen=True)
class AlarmCurve:
    """One branch at falling ``thresholds`` (K,): false alarms per hour, shares of normal frames under any alarm, of
    events found, and of annotated frames under an alarm; (K,) each."""

    thresholds: np.ndarray
    per_hour: np.ndarray
    frame_rate: np.ndarray
    recall: np.ndarray
    frame_recall: np.ndarray

    def at_recall(self, recall: float) -> int:
        """The highest threshold at which so large a share of the events is found; -1 where none does."""
        reached = np.flatnonzero(self.recall >= recall - 1e-12)
        return int(reached[0]) if len(reached) else -1

    def at_rate(self, per_hour: float) -> int:
        """The lowest threshold down to which there are never more false alarms per hour; -1 where there is none.

        Far lower, alarms grow together until few are left: that is not meant.
        """
        above = np.flatnonzero(self.per_hour > per_hour)
        return (int(above[0]) if len(above) else len(self.per_hour)) - 1


def alarm_curve(line: Timeline, curve: np.ndarray, rule: Thresholds) -> AlarmCurve:
    """Rates of a curve (S,) at up to ``POINTS`` thresholds and at the highest score of every event."""
    thresholds = _thresholds(line, curve)
    alarms = find_alarms(line, curve, thresholds, rule)
    count = len(thresholds)
    covered, abnormal = (np.bincount(alarms.row, of, count) for of in (alarms.end - alarms.start, alarms.abnormal))
    total = line.abnormal[-1]
    return AlarmCurve(
        thresholds,
        np.bincount(alarms.row[alarms.false], minlength=count) / line.normal_hours,
        (covered - abnormal) / (line.bounds[-1] - total),
        np.isfinite(first_alarms(line, alarms, count)).mean(axis=1),
        abnormal / total,
    )


def _thresholds(line: Timeline, curve: np.ndarray) -> np.ndarray:
    """Scores at which something changes, falling: densest at the top, where false alarms are few."""
    ranked = np.unique(curve)[::-1]
    if len(ranked) > POINTS:
        half = POINTS // 2
        ranks = np.concatenate([np.geomspace(1, len(ranked), half), np.linspace(1, len(ranked), half)])
        ranked = ranked[np.unique(ranks.astype(np.int64)) - 1]
    first = np.searchsorted(line.bounds, line.events[:, 0], side="right") - 1
    last = np.searchsorted(line.bounds, line.events[:, 1], side="left")
    bounds = np.stack([first, last], axis=1).ravel()
    peaks = np.maximum.reduceat(np.append(curve, -np.inf), bounds)[::2]
    return np.unique(np.concatenate([ranked, peaks]))[::-1]


def draw_alarms(curves: Sequence[AlarmCurve], names: Sequence[str]) -> Figure:
    """Events found, over false alarms per hour and over the share of normal time under alarm."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for curve, name, colour in zip(curves, names, (COARSE_COLOUR, FINE_COLOUR), strict=False):
        points = [at for at in map(curve.at_recall, RECALLS) if at >= 0]
        # Where each level of recall is first reached: what is lost at once is not worth a lower threshold.
        way = np.unique(curve.recall, return_index=True)[1]
        for axis, cost in ((left, curve.per_hour), (right, 100 * curve.frame_rate)):
            axis.plot(cost[way], curve.recall[way], "-", color=colour, lw=1.6, label=name)
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
        bare(axis)
    left.legend(loc="lower right", frameon=False)
    return figure


def alarms_insight(tested: TestResult, rule: Thresholds) -> Insight:
    """The curves of all branches, and the rates at fixed recall."""
    pooled = pool(tested.scores, tested.videos)
    line, names = timeline(tested, pooled), branch_names(len(pooled.anomaly))
    curves = [alarm_curve(line, curve, rule) for curve in pooled.anomaly]
    header = ("branch", "threshold", "false_alarms_per_hour", "recall", "normal_frames_under_alarm", "frame_recall")
    columns = ("thresholds", "per_hour", "recall", "frame_rate", "frame_recall")
    rows = [
        (name, *point)
        for name, curve in zip(names, curves, strict=True)
        for point in zip(*(getattr(curve, column).tolist() for column in columns), strict=True)
    ]
    fixed = [
        (name, recall, *(_at(curve, curve.at_recall(recall), column) for column in columns[:2] + columns[3:]))
        for name, curve in zip(names, curves, strict=True)
        for recall in RECALLS
    ]
    short = Table(("branch", "recall", "threshold", "false alarms/h", "normal frames", "frame recall"), fixed)
    about = f"{len(line.events)} events, {line.normal_hours:.2f} hours without one"
    return Insight(Table(header, rows), draw_alarms(curves, names), [about, short.text()])


def _at(curve: AlarmCurve, index: int, column: str) -> float:
    return float(getattr(curve, column)[index]) if index >= 0 else float("nan")
