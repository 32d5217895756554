"""Models on the test data of other datasets: sources × targets.

The anomaly score needs no class names. Where a method learned nothing of its own for each class, its prompts take the
names of the target's classes, and it tells those apart; otherwise it keeps its own, and only its score goes over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from clipfusionvad.tools.analysis.result import UNKNOWN, Insight, Table

#: Metrics of ``evaluate`` that a transfer is told by, with their factor to percent.
METRICS = {
    "auc1": ("AUC", 100),
    "ap1": ("AP", 100),
    "auc2": ("AUC, fine branch", 100),
    "ap2": ("AP, fine branch", 100),
    "map_average": ("detection mAP", 1),
}


@dataclass(frozen=True)
class Tried:
    """One model on one dataset: names of both, whether that is the one it was trained on, the metrics there."""

    source: str
    target: str
    own: bool
    metrics: Mapping[str, Any]

    def percent(self, metric: str) -> float:
        value = self.metrics.get(metric)
        return float("nan") if value is None else METRICS[metric][1] * float(value)


def known_metrics(tried: Sequence[Tried]) -> list[str]:
    """The metrics that any of the models has somewhere."""
    return [metric for metric in METRICS if any(not np.isnan(one.percent(metric)) for one in tried)]


def draw_transfer(tried: Sequence[Tried]) -> Figure:
    """A heat map for each metric; framed where model and data are of the same dataset."""
    sources, targets = (list(dict.fromkeys(getattr(one, side) for one in tried)) for side in ("source", "target"))
    metrics = known_metrics(tried)
    longest = max(map(len, sources))
    size = (0.09 * longest + (1.5 + 0.85 * len(targets)) * len(metrics), 1.9 + 0.55 * len(sources))
    figure = Figure(figsize=(max(size[0], 6), size[1]), layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        table = np.full((len(sources), len(targets)), np.nan)
        for one in tried:
            place = sources.index(one.source), targets.index(one.target)
            table[place] = one.percent(metric)
            if one.own:
                frame = (place[1] - 0.48, place[0] - 0.48), 0.96, 0.96
                axis.add_patch(Rectangle(*frame, fill=False, ec="#d98200", lw=2))
        axis.imshow(table, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            text, colour = (UNKNOWN, "#8a8a8a") if np.isnan(value) else (f"{value:.1f}", "black")
            axis.text(column, row, text, ha="center", va="center", color="white" if value > 55 else colour)
        axis.set_xticks(range(len(targets)), targets, rotation=20, ha="right")
        axis.set_title(METRICS[metric][0], fontsize=10)
    axes[0].set_yticks(range(len(sources)), sources)
    axes[0].set_ylabel("trained on")
    figure.supxlabel("tested on (percent; framed: the dataset it was trained on)", fontsize=9)
    return figure


def transfer_insight(tried: Sequence[Tried], remarks: Sequence[str] = ()) -> Insight:
    """The metrics in percent as table and picture."""
    metrics = known_metrics(tried)
    rows = [(one.source, one.target, *(one.percent(metric) for metric in metrics)) for one in tried]
    table = Table(("trained on", "tested on", *(METRICS[metric][0] for metric in metrics)), rows)
    return Insight(table, draw_transfer(tried), [table.text(), *remarks])
