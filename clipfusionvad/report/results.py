"""The results of a run's or a test's folder, and the summary over several seeds of one training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfusionvad.engine.config import LAST_WEIGHTS
from clipfusionvad.engine.run_folder import ENVIRONMENT, LOSSES, METRICS, OPTIONS, runs_below, seed_folder, which_run
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_json, read_yaml
from clipfusionvad.report.scores import TestResult, read_scores
from clipfusionvad.report.table import check_metrics, metrics_table, smoothing_lines

if TYPE_CHECKING:
    import pandas as pd

# Scores and their metrics: at the end of training, and of a later test into the same folder.
RUN_SCORES, TEST_SCORES = "scores.npz", "test_scores.npz"
TEST_METRICS, TEST_DATA = "test_metrics.json", "test_data.csv"
_METRICS = {RUN_SCORES: METRICS, TEST_SCORES: TEST_METRICS}


@dataclass(frozen=True)
class Run:
    """A folder's content; parts that it lacks are None or empty.

    ``results`` holds metrics by the model's name, the one of ``tested`` last; of several seeds, the mean first, other
    statistics over all, and the metrics of each. ``losses`` and ``evaluations`` are tables by step. ``scores`` is the
    file of ``tested``.
    """

    folder: Path
    scores: Path | None
    tested: TestResult | None
    results: dict[str, dict[str, Any]]
    options: dict[str, Any]
    environment: dict[str, Any]
    losses: "pd.DataFrame | None"
    evaluations: "pd.DataFrame | None"

    @property
    def known_test(self) -> TestResult:
        """``tested``; ``UserError`` where there is none."""
        if self.tested is None:
            hint = which_run(self.folder) or "test its model into a folder (--output-dir) and give that"
            raise UserError(f"{self.folder} holds no {RUN_SCORES}: {hint}")
        return self.tested

    @property
    def seed_folders(self) -> dict[str, Path]:
        """The folders of several seeds by their names in ``results``."""
        seeds = self.options.get("seeds")
        return {f"seed {seed}": seed_folder(self.folder, seed) for seed in seeds} if isinstance(seeds, list) else {}

    @property
    def judged(self) -> int | None:
        """``VideoDataset.judged`` of its test, or of the first seed's; None where its scores are missing."""
        files = [folder / RUN_SCORES for folder in self.seed_folders.values()]
        tested = self.tested or (read_scores(files[0]) if files and files[0].is_file() else None)
        return tested.videos.judged if tested else None


def read_run(folder: Path) -> Run:
    """Read a folder, of a training and a later test in it the later one; ``UserError`` without any, or if damaged."""
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; give the folder of a run, or the --output-dir of a test")
    there = [folder / name for name in _METRICS if (folder / name).is_file()]
    newest = max(there, key=lambda path: path.stat().st_mtime_ns, default=None)
    if not newest and not (folder / OPTIONS).is_file():
        hint = which_run(folder)
        raise UserError(f"{folder} holds neither a run ({OPTIONS}) nor a test ({TEST_SCORES}){hint and f': {hint}'}")
    tested = read_scores(newest) if newest else None
    metrics = folder / _METRICS[newest.name if newest else RUN_SCORES]
    results = read_json(metrics, "metrics") if metrics.is_file() else {}
    if newest and newest.name == TEST_SCORES and results:
        results = {"test": results}
    elif "seeds" in results:
        try:
            folded = {title: results[name] for name, (title, _) in _FOLDS.items()}
            results = folded | {f"seed {seed}": found for seed, found in results["seeds"].items()}
        except (LookupError, AttributeError) as error:
            raise UserError(f"metrics {metrics} do not belong to several seeds: {error!r}") from error
    for name, found in results.items():
        check_metrics(found, f"metrics {metrics}, {name}")
    options = tested.options if tested else read_yaml(folder / OPTIONS, "options")
    if not isinstance(options, dict):
        raise UserError(f"options {folder / OPTIONS} must hold lines of the form 'option: value'")
    environment = tested.environment if tested else {}
    if not tested and (folder / ENVIRONMENT).is_file():
        environment = read_json(folder / ENVIRONMENT, "environment")
    logs = (_read_log(folder / LOSSES), _read_log(folder / "metrics.csv"))
    return Run(folder, newest, tested, results, options, environment, *logs)


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of the runs and tests below one that is neither; empty if it is one."""
    if not folder.is_dir() or any((folder / name).is_file() for name in (OPTIONS, *_METRICS)):
        return []
    return runs_below(folder, OPTIONS, *_METRICS)


def _read_log(path: Path) -> "pd.DataFrame | None":
    """Read a log by step; None where it is missing or empty."""
    import pandas as pd

    if not path.is_file() or not path.stat().st_size:
        return None
    try:
        log = pd.read_csv(path, index_col="step").select_dtypes("number")
        if not pd.api.types.is_integer_dtype(log.index.dtype):
            raise ValueError("a step is not a whole number")
        return log if len(log) else None
    # The reader of pandas fails in many ways.
    except Exception as error:
        raise UserError(f"{path} is not readable as the log of a run: {error}") from error


def summarise_seeds(folder: Path, seeds: Sequence[int], select: str) -> dict[str, Any]:
    """Build the ``metrics.json`` of several seeds from that of each.

    ``seeds`` holds the metrics of each seed's best model; ``mean``, ``std`` (n - 1; None for one seed), ``min`` and
    ``max`` have the same form. ``model_seed`` is the seed whose model represents all: the median by ``model_by``, the
    metric ``select``; of an even number, the lower one of the middle two.
    """
    found = {seed: read_json(seed_folder(folder, seed) / METRICS, "metrics")["best"] for seed in seeds}
    # How far scores are smoothed is not a metric.
    metrics = [{key: value for key, value in one.items() if key != "smooth"} for one in found.values()]
    by = next(iter(found[seeds[0]])) if select == LAST_WEIGHTS else select
    ranked = sorted(seeds, key=lambda seed: -np.inf if found[seed][by] is None else found[seed][by])
    return {
        "seeds": {str(seed): metrics for seed, metrics in found.items()},
        **{name: _fold(metrics, fold) for name, (_, fold) in _FOLDS.items()},
        "model_seed": ranked[(len(ranked) - 1) // 2],
        "model_by": by,
    }


def seeds_table(summary: Mapping[str, Any], paper: Mapping[str, float], above: Sequence[str] = ()) -> str:
    """Render the table of a test with columns over the seeds."""
    table = metrics_table({title: summary[name] for name, (title, _) in _FOLDS.items()}, paper, above)
    return "\n".join([table, *smoothing_lines(summary["seeds"])])


_FOLDS: dict[str, tuple[str, Callable[[Sequence[float]], Any]]] = {
    "mean": ("mean", lambda values: float(np.mean(values))),
    "std": ("± std", lambda values: float(np.std(values, ddof=1)) if len(values) > 1 else None),
    "min": ("min", min),
    "max": ("max", max),
}


def _fold(values: Sequence[Any], fold: Callable[[Sequence[float]], Any]) -> Any:
    """Reduce nested metrics of several seeds to one; None where a seed has no number."""
    if isinstance(values[0], Mapping):
        shared = [key for key in values[0] if all(key in value for value in values)]
        return {key: _fold([value[key] for value in values], fold) for key in shared}
    if isinstance(values[0], str):
        return values[0]
    return None if None in values else fold(values)
