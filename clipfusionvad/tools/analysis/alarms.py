"""False alarms per hour against recall, and how long it takes until an event is noticed.

S snippets of all test videos in one sequence, N videos, K thresholds, M annotated events. An alarm is a run of
snippets that reach the threshold; alarms are merged over short gaps and dropped if they are too short, as
``metrics.segments`` does with one threshold for both bounds. An alarm is false if none of its frames is annotated. An
event is found if an alarm overlaps it. Rates are per hour of frames that are not annotated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, NamedTuple

import numpy as np

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option
from clipfusionvad.metrics.segments import Thresholds
from clipfusionvad.report.curves import PooledScores, pool
from clipfusionvad.report.scores import TestResult
from clipfusionvad.tools.analysis import figures
from clipfusionvad.tools.analysis.result import AnalysisResult, DataFrame, branch_names, make_table, table_text

MergeSeconds = Annotated[float, Option("merge alarms over gaps of up to this many seconds", minimum=0)]
MinSeconds = Annotated[float, Option("seconds of the shortest alarm", minimum=0)]
Rates = Annotated[tuple[float, ...], Option("false alarms per hour that are allowed", above=0, nonempty=True)]
RECALLS = (0.5, 0.7, 0.8, 0.9)
RATES = (1.0, 5.0, 10.0)
TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
# Thresholds of a curve besides the highest scores of the events, at which recall changes.
POINTS = 300
# Cells (thresholds × snippets) that are processed at once.
CELLS = 2**24


@dataclass(frozen=True)
class FrameAxis:
    """All test videos on one axis of frames.

    ``video`` (S,) the video of each snippet; ``bounds`` (S + 1,) frames before each snippet; ``abnormal``
    (S + 1,) annotated frames before each snippet; ``frames`` (N,) of each video. Each annotated interval of a video is
    one event: ``events`` (M, 2) as frames [start, end) of the axis, ``labels`` their classes.
    """

    video: np.ndarray
    bounds: np.ndarray
    abnormal: np.ndarray
    frames: np.ndarray
    events: np.ndarray
    labels: list[list[str]]
    fps: float

    @property
    def normal_hours(self) -> float:
        """Hours of frames that are not annotated."""
        return float(self.bounds[-1] - self.abnormal[-1]) / self.fps / 3600


def frame_axis(test: TestResult, pooled: PooledScores) -> FrameAxis:
    """Return the axis of a test whose truth is known; ``UserError`` without an annotated event or a normal frame."""
    video = np.repeat(np.arange(len(pooled.snippets)), pooled.snippets)
    frames = np.bincount(video, pooled.frames, len(pooled.snippets)).astype(np.int64)
    truth, anomalous = test.videos.known_truth, test.videos.dataset.labels[1:]
    events: dict[tuple[int, int], list[str]] = {}
    offsets = (np.cumsum(frames) - frames).tolist()
    for offset, length, spans, names in zip(offsets, frames.tolist(), truth.segments, truth.labels, strict=True):
        for (start, end), name in zip(spans, names, strict=True):
            if name in anomalous and start < min(end, length):
                events.setdefault((offset + start, offset + min(end, length)), []).append(name)
    if not events or pooled.positives.sum() == pooled.frames.sum():
        raise UserError("alarms need both annotated events and frames that are not annotated")
    bounds, abnormal = (np.concatenate([[0], np.cumsum(counts)]) for counts in (pooled.frames, pooled.positives))
    intervals, labels = np.array(list(events), dtype=np.int64), list(events.values())
    return FrameAxis(video, bounds, abnormal, frames, intervals, labels, test.videos.dataset.fps)


class Alarms(NamedTuple):
    """Alarms of one curve at K thresholds: ``row`` (A,) the index of each one's threshold, in rising order, and its
    frames ``start``, ``end`` (A,), in rising order within a threshold; ``abnormal`` (A,) of them are annotated."""

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray
    abnormal: np.ndarray


def find_alarms(axis: FrameAxis, curve: np.ndarray, thresholds: np.ndarray, rule: Thresholds) -> Alarms:
    """Return the alarms of a curve (S,) at each of the thresholds (K,); only the two durations of ``rule`` count."""
    step = max(1, CELLS // (len(curve) + len(axis.frames)))
    parts = [_find(axis, curve, thresholds[at : at + step], at, rule) for at in range(0, len(thresholds), step)]
    return Alarms(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _find(axis: FrameAxis, curve: np.ndarray, thresholds: np.ndarray, offset: int, rule: Thresholds) -> Alarms:
    """Return the alarms at some thresholds, the first of which has the index ``offset``."""
    # A place that is never inside follows every video, so that no run continues into the next video or row.
    columns = np.arange(len(curve)) + axis.video
    inside = np.zeros((len(thresholds), len(curve) + len(axis.frames)), dtype=bool)
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
    start, end = start[heads], end[tails]
    least = np.minimum(rule.least_frames(axis.fps, 1 << 62), axis.frames[video[heads]])
    kept = (end - start >= least) & (end > start)
    abnormal = axis.abnormal[last[tails]] - axis.abnormal[first[heads]]
    return Alarms(row[heads][kept] + offset, start[kept], end[kept], abnormal[kept])


def first_alarms(axis: FrameAxis, alarms: Alarms, count: int) -> np.ndarray:
    """Return the frames from each event's start to its first alarm at each of ``count`` thresholds: (K, M).

    0 where the alarm began before the event, inf where the event is missed.
    """
    whole = axis.bounds[-1] + 1
    wanted = np.arange(count)[:, None] * whole + axis.events[:, 0]
    at = np.searchsorted(alarms.row * whole + alarms.end, wanted, side="right")
    padded_row, padded_start = np.append(alarms.row, -1)[at], np.append(alarms.start, 0)[at]
    found = (padded_row == np.arange(count)[:, None]) & (padded_start < axis.events[:, 1])
    return np.where(found, np.maximum(padded_start - axis.events[:, 0], 0), np.inf)


def alarm_curve(axis: FrameAxis, scores: np.ndarray, rule: Thresholds) -> DataFrame:
    """Return the rates of scores (S,) at up to ``POINTS`` falling thresholds and at the highest score of every event.

    ``recall`` is the share of the events that are found, ``frame_recall`` the share of annotated frames under an alarm.
    """
    # Densest at the top, where false alarms are few.
    ranked = np.unique(scores)[::-1]
    if len(ranked) > POINTS:
        half = POINTS // 2
        ranks = np.concatenate([np.geomspace(1, len(ranked), half), np.linspace(1, len(ranked), half)])
        ranked = ranked[np.unique(ranks.astype(np.int64)) - 1]
    first = np.searchsorted(axis.bounds, axis.events[:, 0], side="right") - 1
    last = np.searchsorted(axis.bounds, axis.events[:, 1], side="left")
    peaks = np.maximum.reduceat(np.append(scores, -np.inf), np.stack([first, last], axis=1).ravel())[::2]
    thresholds = np.unique(np.concatenate([ranked, peaks]))[::-1]

    alarms, count, total = find_alarms(axis, scores, thresholds, rule), len(thresholds), axis.abnormal[-1]
    covered, abnormal = (np.bincount(alarms.row, of, count) for of in (alarms.end - alarms.start, alarms.abnormal))
    return make_table(
        {
            "threshold": thresholds.astype(np.float64),
            "false_alarms_per_hour": np.bincount(alarms.row, alarms.abnormal == 0, count) / axis.normal_hours,
            "recall": np.isfinite(first_alarms(axis, alarms, count)).mean(axis=1),
            "normal_frames_under_alarm": (covered - abnormal) / (axis.bounds[-1] - total),
            "frame_recall": abnormal / total,
        }
    )


def at_recall(curve: DataFrame, recall: float) -> int:
    """Return the row of the highest threshold that finds this share of the events; -1 if none does."""
    reached = np.flatnonzero(curve["recall"] >= recall - 1e-12)
    return int(reached[0]) if len(reached) else -1


def at_rate(curve: DataFrame, per_hour: float) -> int:
    """Return the row of the lowest threshold down to which there are never more false alarms; -1 if there is none.

    At far lower thresholds alarms merge until few are left; those are not counted.
    """
    above = np.flatnonzero(curve["false_alarms_per_hour"] > per_hour)
    return (int(above[0]) if len(above) else len(curve)) - 1


def draw_alarms(curves: dict[str, DataFrame]) -> figures.Figure:
    """Draw the share of events found over false alarms per hour and over the share of normal time under alarm."""
    figure = figures.new_figure(11, 4.4)
    axes = figure.subplots(1, 2, sharey=True)
    for (name, curve), colour in zip(curves.items(), figures.COLOURS, strict=False):
        recall = curve["recall"].to_numpy()
        points = [row for row in (at_recall(curve, value) for value in RECALLS) if row >= 0]
        # Where each level of recall is first reached: lower thresholds of the same recall only cost more.
        first = np.unique(recall, return_index=True)[1]
        costs = curve["false_alarms_per_hour"], 100 * curve["normal_frames_under_alarm"]
        for axis, cost in zip(axes, costs, strict=True):
            axis.plot(cost.to_numpy()[first], recall[first], "-", color=colour, lw=1.6, label=name)
            axis.plot(cost.to_numpy()[points], recall[points], "o", color=colour, ms=5)
    titles = "false alarms per hour of normal video", "percent of normal frames under alarm"
    for axis, title in zip(axes, titles, strict=True):
        axis.set(ylim=(0, 1.03), yticks=[0, *RECALLS, 1], xlabel=title)
        axis.grid(axis="y", color="#dddddd", lw=0.7)
        _scale(axis)
    axes[0].set_ylabel("share of annotated events found (recall)")
    figures.hide_spines(*axes)
    levels = ", ".join(f"{value:g}" for value in RECALLS)
    label = f"highest threshold with a recall of at least {levels}"
    axes[0].plot([], [], "o", color=figures.GREY, ms=5, label=label)
    figures.legend_above(figure, axes[0])
    return figure


def _scale(axis: figures.Axes) -> None:
    """Begin the x axis at 0, with a linear scale up to 1 and a logarithmic one above."""
    end = axis.get_xlim()[1]
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(0, end)
    axis.set_xticks([value for value in TICKS if value <= end])
    axis.xaxis.set_major_formatter("{x:g}")


def alarms(test: TestResult, *, merge_seconds: MergeSeconds = 1.0, min_seconds: MinSeconds = 1.0) -> AnalysisResult:
    """False alarms per hour against recall."""
    import pandas as pd

    rule = Thresholds(min_seconds=min_seconds, merge_seconds=merge_seconds)
    pooled = pool(test.scores, test.videos)
    axis = frame_axis(test, pooled)
    names = branch_names(len(pooled.anomaly))
    curves = {name: alarm_curve(axis, scores, rule) for name, scores in zip(names, pooled.anomaly, strict=True)}
    # Row -1 does not exist, so a recall that is not reached has no numbers.
    short = [
        (name, recall, *curve.drop(columns="recall").reindex([at_recall(curve, recall)]).iloc[0])
        for name, curve in curves.items()
        for recall in RECALLS
    ]
    header = ["branch", "recall", "threshold", "false alarms/h", "normal under alarm", "abnormal under alarm"]
    text = table_text(short, header)
    numbers = pd.concat(curves, names=["branch"]).reset_index("branch")
    about = f"{len(axis.events)} annotated events; {axis.normal_hours:.2f} hours are not annotated"
    return AnalysisResult(numbers, draw_alarms(curves), [about, text, "under alarm: shares of frames"])


def latencies(test: TestResult, rule: Thresholds, rates: Sequence[float] = RATES) -> DataFrame:
    """Return a row for each rising ``rate`` of false alarms per hour and each ``class`` of an event, "all" included.

    ``seconds`` from its start to the start of its first alarm: 0 where that began before, inf where it is missed;
    ``threshold``: the lowest that keeps to the rate, inf if none does.
    """
    pooled = pool(test.scores, test.videos)
    axis, rates = frame_axis(test, pooled), sorted(set(rates))
    curve = alarm_curve(axis, pooled.anomaly[0], rule)
    at = [at_rate(curve, rate) for rate in rates]
    thresholds = np.array([curve["threshold"][row] if row >= 0 else np.inf for row in at])
    found = find_alarms(axis, pooled.anomaly[0], thresholds, rule)
    seconds = first_alarms(axis, found, len(rates)) / axis.fps
    rows = [
        (rates[row], thresholds[row], label, seconds[row, event])
        for row, (event, names) in product(range(len(rates)), enumerate(axis.labels))
        for label in ("all", *names)
    ]
    return make_table(rows, ["rate", "threshold", "class", "seconds"])


def by_class(events: DataFrame) -> DataFrame:
    """Return events, share missed, and median and 90th percentile of the seconds of those found, by rate and class."""
    rows = []
    for rate, label in product(events["rate"].unique(), ["all", *sorted({*events["class"]} - {"all"})]):
        seconds = events["seconds"][(events["rate"] == rate) & (events["class"] == label)]
        hit = seconds[np.isfinite(seconds)]
        rows.append((rate, label, len(seconds), 1 - len(hit) / len(seconds), hit.quantile(0.5), hit.quantile(0.9)))
    header = ["false_alarms_per_hour", "class", "events", "share_missed", "median_seconds", "seconds_of_90_percent"]
    return make_table(rows, header)


def draw_latency(events: DataFrame) -> figures.Figure:
    """Draw the share of events noticed over time, and every event by class at the middle rate."""
    rates, labels = events["rate"].unique(), sorted({*events["class"]} - {"all"})
    figure = figures.new_figure(12, max(4.2, 0.3 * len(labels) + 1.6))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    longest = max(events["seconds"].replace(np.inf, 0).max(), 1) * 1.05
    for rate, colour in zip(rates, figures.COLOURS, strict=False):
        own = events[(events["rate"] == rate) & (events["class"] == "all")]
        hit = np.sort(own["seconds"][np.isfinite(own["seconds"])])
        share = np.arange(len(hit) + 1) / len(own)
        missed = f"{rate:g} per hour (threshold {own['threshold'].iloc[0]:.3g}): {100 * (1 - share[-1]):.0f} % missed"
        left.step([0, *hit, longest], [*share, share[-1]], where="post", color=colour, label=missed)
    left.set(xlim=(0, longest), ylim=(0, 1.03), ylabel="share of events noticed")
    left.set_xlabel("seconds after the start of an event")
    rows, middle = [], rates[len(rates) // 2]
    for place, label in enumerate(labels):
        seconds = events["seconds"][(events["rate"] == middle) & (events["class"] == label)]
        hit = seconds[np.isfinite(seconds)]
        right.plot(hit, np.full(len(hit), place), "o", color=figures.COARSE_COLOUR, ms=5, alpha=0.55, mew=0)
        rows.append(f"{label}: {len(hit)} of {len(seconds)} noticed")
    right.set_yticks(range(len(rows)), rows)
    right.set(xlim=(0, longest), ylim=(len(rows) - 0.4, -0.6))
    right.set_xlabel("seconds after the start of an event, a dot for each event")
    right.set_title(f"at {middle:g} false alarms per hour", fontsize=10, loc="left")
    right.grid(axis="y", color="#eeeeee", lw=0.7)
    for axis in (left, right):
        _scale(axis)
    # Dots at 0 are whole.
    right.set_xlim(left=-0.05)
    figures.hide_spines(left, right)
    figures.legend_above(figure, left, "false alarms allowed")
    return figure


def latency(
    test: TestResult, *, rates: Rates = RATES, merge_seconds: MergeSeconds = 1.0, min_seconds: MinSeconds = 1.0
) -> AnalysisResult:
    """Seconds until an event is noticed, at fixed false alarms per hour."""
    found = latencies(test, Thresholds(min_seconds=min_seconds, merge_seconds=merge_seconds), rates)
    numbers = by_class(found)
    short = numbers[numbers["class"] == "all"]
    short.columns = ["false alarms/h", "class", "events", "missed", "median s", "90 % within s"]
    return AnalysisResult(numbers, draw_latency(found), [table_text(short)])
