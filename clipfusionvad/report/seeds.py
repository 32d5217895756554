"""Summaries over several seeds of one training: mean, deviation and range of their metrics."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipfusionvad.engine.config import LAST_WEIGHTS
from clipfusionvad.engine.run_folder import METRICS, seed_folder
from clipfusionvad.io.files import read_json
from clipfusionvad.report.table import metrics_table


def summarise_seeds(folder: Path, seeds: Sequence[int], select: str) -> dict[str, Any]:
    """Build the ``metrics.json`` of several seeds from that of each.

    ``seeds`` holds the metrics of each seed's best model; ``mean``, ``std`` (n - 1; None for one seed), ``min`` and
    ``max`` have the same form. ``model_seed`` is the seed whose model represents all: the median by ``model_by``, the
    metric ``select``; of an even number, the lower one of the middle two.
    """
    found = {seed: read_json(seed_folder(folder, seed) / METRICS, "metrics")["best"] for seed in seeds}
    results = list(found.values())
    by = next(iter(results[0])) if select == LAST_WEIGHTS else select
    ranked = sorted(seeds, key=lambda seed: -np.inf if found[seed][by] is None else found[seed][by])
    return {
        "seeds": {str(seed): metrics for seed, metrics in found.items()},
        **{name: _fold(results, fold) for name, fold in _FOLDS.items()},
        "model_seed": ranked[(len(ranked) - 1) // 2],
        "model_by": by,
    }


def seeds_table(summary: Mapping[str, Any], paper: Mapping[str, float]) -> str:
    """Render the table of a test with columns over the seeds."""
    return metrics_table({title: summary[name] for name, title in _TITLES.items()}, paper)


def seeds_columns(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return columns for a page: the result of each seed, then those over all seeds, the mean last."""
    folded = {title: summary[name] for name, title in reversed(_TITLES.items())}
    return {f"seed {seed}": metrics for seed, metrics in summary["seeds"].items()} | folded


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


_FOLDS: dict[str, Callable[[Sequence[float]], Any]] = {
    "mean": lambda values: float(np.mean(values)),
    "std": _std,
    "min": min,
    "max": max,
}
_TITLES = {"mean": "mean", "std": "± std", "min": "min", "max": "max"}


def _fold(values: Sequence[Any], fold: Callable[[Sequence[float]], Any]) -> Any:
    """Reduce nested metrics of several seeds to one; None where a seed has no number."""
    if isinstance(values[0], Mapping):
        shared = [key for key in values[0] if all(key in value for value in values)]
        return {key: _fold([value[key] for value in values], fold) for key in shared}
    return None if None in values else fold(values)
