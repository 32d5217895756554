"""The table that a test prints."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from clipfusionvad.io.errors import UserError

# Far beyond any metric; larger whole numbers of JSON are no floats.
_LARGEST = 1e300
BRANCHES = {"1": "coarse branch", "2": "fine branch"}
RANKING = {"auc": "AUC", "ap": "AP", "ano_auc": "Ano-AUC"}
MEANS = {"mauc": "mAUC, class against rest", "mean_ap": "mAP of frames, class against rest"}
IOUS = ("0.1", "0.2", "0.3", "0.4", "0.5")
VARIANTS = {
    "map_released": "as released",
    "map_normal_matched": "corrected: normal class matched",
    "map_anomalous_only": "corrected: anomalous videos only",
}


@dataclass(frozen=True)
class Figure:
    """A published figure: percent for detection mAP (``map…``), 0..1 for all other metrics."""

    method: str
    dataset: str
    metric: str
    value: float
    source: str

    @property
    def percent(self) -> float:
        return self.value if self.metric.startswith("map") else 100 * self.value


def published_figures() -> list[Figure]:
    """All figures of ``published.csv``. Of several for one metric, the first is what the paper claims as its result."""
    text = resources.files(__package__).joinpath("published.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return [Figure(row["method"], row["dataset"], row["metric"], float(row["value"]), row["source"]) for row in rows]


def published(method: str, dataset: str, protocol: str = "paper") -> dict[str, float]:
    """The published figures of a method on a dataset, keyed as the metrics are ("map@0.1" for one IoU).

    Detection mAP was published as the released procedure computes it, so it stands beside that variant only.
    """
    own = [figure for figure in published_figures() if (figure.method, figure.dataset) == (method, dataset)]
    figures = {figure.metric: figure.value for figure in reversed(own)}
    if "map_average" in figures:
        figures["map_released@average"] = figures["map_average"]
    if protocol == "paper":
        return figures
    return {key: value for key, value in figures.items() if "map" not in key or "released" in key}


def check_metrics(metrics: Any, where: str) -> None:
    """Raise ``UserError`` unless a result that was read from a file holds what its tables show."""
    if not isinstance(metrics, dict):
        raise UserError(f"{where}: names and numbers are expected, not {str(metrics)[:60]}")
    needed = [keys for _, keys in _rows(metrics)]
    needed += [(variant, iou) for variant in VARIANTS for iou in IOUS if "map" in metrics]
    per_class = metrics.get("per_class", {})
    if not isinstance(per_class, dict) or not all(isinstance(found, dict) for found in per_class.values()):
        raise UserError(f"{where}: per_class does not hold the metrics of classes")
    needed += [("per_class", label, key) for label, found in per_class.items() for key in found]
    for keys in needed:
        try:
            value = _value(metrics, keys)
        except (LookupError, TypeError) as error:
            raise UserError(f"{where}: there is no {', '.join(keys)}") from error
        if value is not None and (not isinstance(value, int | float) or abs(value) > _LARGEST):
            raise UserError(f"{where}: {', '.join(keys)} is {str(value)[:60]}, not a number")


def metrics_table(results: Mapping[str, Mapping[str, Any]], paper: Mapping[str, float]) -> str:
    """Lay metrics out as text, everything in percent: a column per result and one for the published figures."""
    columns = [*results, *(["paper"] if paper else [])]
    lines = [f"{'percent':34}" + "".join(f"{column:>10}" for column in columns)]
    for title, _, values in metrics_rows(results, paper):
        lines.append(f"{title:34}" + "".join(f"{value:>10}" for value in values))
    return "\n".join(lines)


def metrics_rows(
    results: Mapping[str, Mapping[str, Any]], paper: Mapping[str, float]
) -> list[tuple[str, str, list[str]]]:
    """The lines of that table: title, key as in ``published``, a percentage or "-" per result and for the paper."""
    rows = []
    for title, keys in _rows(next(iter(results.values()))):
        values = [_percent(keys, _value(result, keys)) for result in results.values()]
        if paper:
            values.append(_percent(keys, paper.get("@".join(keys))))
        rows.append((title, "@".join(keys), values))
    return rows


def _rows(metrics: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """Title and key path of every line that the metrics can fill."""
    rows: list[tuple[str, tuple[str, ...]]] = [
        (f"{name}, {branch}", (f"{key}{number}",))
        for number, branch in BRANCHES.items()
        for key, name in RANKING.items()
        if f"{key}{number}" in metrics
    ]
    rows += [(title, (key,)) for key, title in MEANS.items() if key in metrics]
    if "map" in metrics:
        rows += [(f"detection mAP@{iou}", ("map", iou)) for iou in IOUS]
        rows += [("detection mAP, average", ("map_average",))]
        rows += [(f"  {title}", (key, "average")) for key, title in VARIANTS.items()]
    return rows


def _value(metrics: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    value: Any = metrics
    for key in keys:
        value = value[key]
    return value


def _percent(keys: tuple[str, ...], value: float | None) -> str:
    if value is None or value != value:
        return "-"
    return f"{value if keys[0].startswith('map') else 100 * value:.2f}"
