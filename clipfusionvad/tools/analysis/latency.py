"""How long it takes until an event is noticed, at thresholds that allow so many false alarms per hour.

M annotated events, R rates. Alarms, events and rates are those of ``alarms``; the main branch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from clipfusionvad.metrics.segments import Thresholds
from clipfusionvad.report.curves import pool
from clipfusionvad.report.scores import TestResult
from clipfusionvad.tools.analysis.alarms import alarm_curve, find_alarms, first_alarms, timeline
from clipfusionvad.tools.analysis.result import Insight, Row, Table, bare

RATES = (1.0, 5.0, 10.0)
_COLOURS = ("#1f4e79", "#d98200", "#5b8c5a", "#8e5ea2", "#b0413e")


@dataclass(frozen=True)
class Latency:
    """``seconds`` (R, M) from each event's start to the start of its first alarm: 0 where that was on before, inf
    where the event is missed. ``rates`` (R,) per hour, the ``thresholds`` (R,) that keep to them (inf: none does), the
    ``labels`` of each event."""

    rates: tuple[float, ...]
    thresholds: np.ndarray
    seconds: np.ndarray
    labels: list[list[str]]


def latencies(tested: TestResult, rule: Thresholds, rates: Sequence[float] = RATES) -> Latency:
    """The latency of every event at each rate of false alarms per hour, in rising order."""
    pooled = pool(tested.scores, tested.videos)
    line, rates = timeline(tested, pooled), sorted(set(rates))
    curve = alarm_curve(line, pooled.anomaly[0], rule)
    at = [curve.at_rate(rate) for rate in rates]
    thresholds = np.array([curve.thresholds[index] if index >= 0 else np.inf for index in at])
    alarms = find_alarms(line, pooled.anomaly[0], thresholds, rule)
    return Latency(tuple(rates), thresholds, first_alarms(line, alarms, len(rates)) / line.fps, line.labels)


def by_class(found: Latency) -> list[Row]:
    """Rate, class, events, share missed, median and 90th percentile of the seconds of those that are found."""
    rows: list[Row] = []
    labels = sorted({label for names in found.labels for label in names})
    for rate, seconds in zip(found.rates, found.seconds, strict=True):
        for label in ["all", *labels]:
            own = seconds[[label == "all" or label in names for names in found.labels]]
            hit = own[np.isfinite(own)]
            middle, late = np.quantile(hit, [0.5, 0.9]).tolist() if len(hit) else (float("nan"),) * 2
            rows.append((rate, label, len(own), 1 - len(hit) / len(own), middle, late))
    return rows


def draw_latency(found: Latency) -> Figure:
    """Left, the share of events noticed within so many seconds; right, every event, by class, at the middle rate."""
    labels = sorted({label for names in found.labels for label in names})
    figure = Figure(figsize=(12, max(4.2, 0.3 * len(labels) + 1.6)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    longest = max(found.seconds[np.isfinite(found.seconds)].max(initial=0), 1) * 1.05
    for rate, threshold, seconds, colour in zip(found.rates, found.thresholds, found.seconds, _COLOURS, strict=False):
        hit = np.sort(seconds[np.isfinite(seconds)])
        share = np.arange(1, len(hit) + 1) / len(seconds)
        missed = f"{rate:g} an hour, from {threshold:.3g} on: {100 * (1 - len(hit) / len(seconds)):.0f} % missed"
        left.step([0, *hit, longest], [0, *share, *share[-1:], *[0] * (not len(hit))], where="post", color=colour)
        left.lines[-1].set_label(missed)
    left.set(xlim=(0, longest), ylim=(0, 1.03), xlabel="seconds after the start of an event")
    left.set_xscale("symlog", linthresh=1)
    left.set_ylabel("share of events noticed")
    middle = len(found.rates) // 2
    _draw_classes(right, labels, found, middle, longest)
    right.set_title(f"at {found.rates[middle]:g} false alarms an hour", fontsize=10, loc="left")
    for axis in (left, right):
        axis.xaxis.set_major_formatter("{x:g}")
        bare(axis)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=9,
        title="false alarms allowed",
    )
    return figure


def _draw_classes(axis: matplotlib.axes.Axes, labels: Sequence[str], found: Latency, rate: int, longest: float) -> None:
    rows = []
    for place, label in enumerate(labels):
        own = found.seconds[rate][[label in names for names in found.labels]]
        hit = own[np.isfinite(own)]
        axis.plot(hit, np.full(len(hit), place), "o", color=_COLOURS[0], ms=5, alpha=0.55, mew=0)
        missed = len(own) - len(hit)
        rows.append(f"{label}: {missed} of {len(own)} missed" if missed else f"{label} ({len(own)})")
    axis.set_yticks(range(len(labels)), rows)
    axis.set_xscale("symlog", linthresh=1)
    axis.set(
        xlim=(-0.1, longest), ylim=(len(labels) - 0.4, -0.6), xlabel="seconds after its start, a dot for each event"
    )
    axis.grid(axis="y", color="#eeeeee", lw=0.7)


def latency_insight(tested: TestResult, rule: Thresholds, rates: Sequence[float] = RATES) -> Insight:
    """The latencies by class as table and picture."""
    found = latencies(tested, rule, rates)
    rows = by_class(found)
    header = ("false_alarms_per_hour", "class", "events", "share_missed", "median_seconds", "seconds_of_90_percent")
    short = Table(("false alarms/h", "class", "events", "missed", "median s", "90 % s"), rows)
    overall = Table(short.header, [row for row in rows if row[1] == "all"])
    return Insight(Table(header, rows), draw_latency(found), [overall.text()])
