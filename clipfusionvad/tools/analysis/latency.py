"""How long it takes until an event is noticed, at thresholds that allow a number of false alarms per hour.

M annotated events, R rates. Alarms, events and rates are those of ``alarms``; only the main branch is read.
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
from clipfusionvad.tools.analysis.alarms import (
    MergeSeconds,
    MinSeconds,
    alarm_curve,
    find_alarms,
    first_alarms,
    frame_axis,
)
from clipfusionvad.tools.analysis.figures import COARSE_COLOUR, COLOURS, hide_spines, legend_above, new_figure
from clipfusionvad.tools.analysis.result import AnalysisResult, table_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

RATES = (1.0, 5.0, 10.0)


@dataclass(frozen=True)
class Latency:
    """``seconds`` (R, M) from each event's start to the start of its first alarm: 0 where that began before, inf
    where the event is missed. ``rates`` (R,) per hour, the ``thresholds`` (R,) that keep to them (inf: none does), the
    ``labels`` of each event."""

    rates: tuple[float, ...]
    thresholds: np.ndarray
    seconds: np.ndarray
    labels: list[list[str]]

    @property
    def classes(self) -> list[str]:
        return sorted({label for names in self.labels for label in names})

    def of_class(self, rate: int, label: str) -> np.ndarray:
        """Return the seconds of the events of a class at a rate, given by its index."""
        return self.seconds[rate][[label in names for names in self.labels]]


def latencies(test: Tested, rule: Thresholds, rates: Sequence[float] = RATES) -> Latency:
    """Return the latency of every event at each rate of false alarms per hour, in rising order."""
    from clipfusionvad.report.curves import pool

    pooled = pool(test.scores, test.videos)
    axis, rates = frame_axis(test, pooled), sorted(set(rates))
    curve = alarm_curve(axis, pooled.anomaly[0], rule)
    at = [curve.at_rate(rate) for rate in rates]
    thresholds = np.array([curve.thresholds[index] if index >= 0 else np.inf for index in at])
    alarms = find_alarms(axis, pooled.anomaly[0], thresholds, rule)
    return Latency(tuple(rates), thresholds, first_alarms(axis, alarms, len(rates)) / axis.fps, axis.labels)


def by_class(found: Latency) -> DataFrame:
    """Return events, share missed, and median and 90th percentile of the seconds of those found, by rate and class."""
    import pandas as pd

    rows = []
    for index, rate in enumerate(found.rates):
        for label in ["all", *found.classes]:
            seconds = found.seconds[index] if label == "all" else found.of_class(index, label)
            hit = seconds[np.isfinite(seconds)]
            quantiles = np.quantile(hit, [0.5, 0.9]) if len(hit) else (np.nan, np.nan)
            rows.append((rate, label, len(seconds), 1 - len(hit) / len(seconds), *quantiles))
    header = ["false_alarms_per_hour", "class", "events", "share_missed", "median_seconds", "seconds_of_90_percent"]
    return pd.DataFrame(rows, columns=header)


def draw_latency(found: Latency) -> Figure:
    """Draw the share of events noticed over time, and every event by class at the middle rate."""
    figure = new_figure(12, max(4.2, 0.3 * len(found.classes) + 1.6))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    longest = max(found.seconds[np.isfinite(found.seconds)].max(initial=0), 1) * 1.05
    for rate, threshold, seconds, colour in zip(found.rates, found.thresholds, found.seconds, COLOURS, strict=False):
        hit = np.sort(seconds[np.isfinite(seconds)])
        share = np.arange(len(hit) + 1) / len(seconds)
        missed = f"{rate:g} an hour, from {threshold:.3g} on: {100 * (1 - len(hit) / len(seconds)):.0f} % missed"
        left.step([0, *hit, longest], [*share, share[-1]], where="post", color=colour, label=missed)
    left.set(xlim=(0, longest), ylim=(0, 1.03), xlabel="seconds after the start of an event")
    left.set_xscale("symlog", linthresh=1)
    left.set_ylabel("share of events noticed")
    middle = len(found.rates) // 2
    _draw_classes(right, found, middle, longest)
    right.set_title(f"at {found.rates[middle]:g} false alarms an hour", fontsize=10, loc="left")
    for axis in (left, right):
        axis.xaxis.set_major_formatter("{x:g}")
    hide_spines(left, right)
    legend_above(figure, left, "false alarms allowed")
    return figure


def _draw_classes(axis: Axes, found: Latency, rate: int, longest: float) -> None:
    rows = []
    for place, label in enumerate(found.classes):
        seconds = found.of_class(rate, label)
        hit = seconds[np.isfinite(seconds)]
        axis.plot(hit, np.full(len(hit), place), "o", color=COARSE_COLOUR, ms=5, alpha=0.55, mew=0)
        missed = len(seconds) - len(hit)
        rows.append(f"{label}: {missed} of {len(seconds)} missed" if missed else f"{label} ({len(seconds)})")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xscale("symlog", linthresh=1)
    axis.set(xlim=(-0.1, longest), ylim=(len(rows) - 0.4, -0.6))
    axis.set_xlabel("seconds after the start of an event, a dot for each event")
    axis.grid(axis="y", color="#eeeeee", lw=0.7)


def latency(
    test: Tested,
    *,
    rates: Annotated[tuple[float, ...], Option("false alarms per hour that are allowed", above=0)] = RATES,
    merge_seconds: MergeSeconds = 1.0,
    min_seconds: MinSeconds = 1.0,
) -> AnalysisResult:
    """Seconds until an event is noticed, at fixed false alarms per hour."""
    if not rates:
        raise UserError("--rates needs at least one number")
    found = latencies(test, Thresholds(min_seconds=min_seconds, merge_seconds=merge_seconds), rates)
    numbers = by_class(found)
    short = numbers[numbers["class"] == "all"]
    short.columns = ["false alarms/h", "class", "events", "missed", "median s", "90 % s"]
    return AnalysisResult(numbers, draw_latency(found), [table_text(short)])
