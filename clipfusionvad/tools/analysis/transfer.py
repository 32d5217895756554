"""Models on the test data of other datasets: sources × targets.

The anomaly score needs no class names. If a method learned nothing for single classes, its prompts take the names of
the target's classes, so it also tells those apart. Otherwise it keeps its own classes, and only its score is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipfusionvad.tools.analysis.figures import GREY, Axes, Figure, draw_matrix, new_figure
from clipfusionvad.tools.analysis.result import UNKNOWN, AnalysisResult, DataFrame, make_table, table_text

#: Titles of the metrics of ``evaluate`` that are shown, and their factor to percent.
METRICS = {
    "auc1": ("AUC", 100),
    "ap1": ("AP", 100),
    "auc2": ("AUC, fine branch", 100),
    "ap2": ("AP, fine branch", 100),
    "map_average": ("detection mAP", 1),
}
TRAINED, TESTED = "trained on", "tested on"


@dataclass(frozen=True)
class Source:
    """A trained model: its name and classes, the first weight that has an entry for each class (None: none has), and
    ``test``, which returns its metrics on the test data of a target, by index."""

    name: str
    labels: Sequence[str]
    class_weight: str | None
    test: Callable[[int], Mapping[str, Any]]


def transfer(sources: Sequence[Source], targets: Sequence[tuple[str, Sequence[str]]]) -> AnalysisResult:
    """Models on the test data of each other's datasets.

    ``targets`` are the names and the classes of test data.
    """
    from tqdm import tqdm

    pairs = [(source, index) for source in sources for index in range(len(targets))]
    rows = []
    for source, index in tqdm(pairs, "transfer", unit="test", disable=None, leave=False):
        metrics = source.test(index)
        percent = {title: factor * _number(metrics.get(name)) for name, (title, factor) in METRICS.items()}
        rows.append({TRAINED: source.name, TESTED: targets[index][0], **percent})
    table = make_table(rows).dropna(axis=1, how="all")
    remarks = [
        f"{source.name} has learned weights for each of its classes ({source.class_weight}): on other classes it keeps "
        f"its own, and only its anomaly score is tested"
        for source in sources
        if source.class_weight
    ]
    home = [[list(source.labels) == list(labels) for _, labels in targets] for source in sources]
    return AnalysisResult(table, draw_transfer(table, np.array(home)), [table_text(table), *remarks])


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def draw_transfer(table: DataFrame, home: np.ndarray) -> Figure:
    """Draw a heat map for each metric; ``home`` (sources, targets): model and data are of the same dataset."""
    sources, targets = list(table[TRAINED].unique()), list(table[TESTED].unique())
    metrics = [column for column in table if column not in (TRAINED, TESTED)]
    width = 0.09 * max(map(len, sources)) + (1.5 + 0.85 * len(targets)) * len(metrics)
    figure = new_figure(max(width, 6), 1.9 + 0.55 * len(sources))
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        _draw_metric(axis, table[metric].to_numpy().reshape(home.shape), home, sources, targets)
        axis.set_title(metric, fontsize=10)
    axes[0].set_ylabel(TRAINED)
    figure.supxlabel("tested on (percent; framed: the dataset of the training)", fontsize=9)
    return figure


def _draw_metric(
    axis: Axes, values: np.ndarray, home: np.ndarray, sources: Sequence[str], targets: Sequence[str]
) -> None:
    from matplotlib.patches import Rectangle

    draw_matrix(axis, values, sources, targets, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axis.tick_params(axis="x", rotation=20)
    for (row, column), value in np.ndenumerate(values):
        text, colour = (UNKNOWN, GREY) if np.isnan(value) else (f"{value:.1f}", "black")
        axis.text(column, row, text, ha="center", va="center", color="white" if value > 55 else colour)
        if home[row, column]:
            axis.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, ec="#d98200", lw=2))
