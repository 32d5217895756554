"""Read the folder of a run or of a test for its page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipfusionvad.datasets import DATASETS
from clipfusionvad.engine.run_folder import ENVIRONMENT, LOSSES, METRICS, OPTIONS, seeds_in
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_json, read_yaml
from clipfusionvad.report.scores import TestResult, read_scores
from clipfusionvad.report.seeds import seeds_columns
from clipfusionvad.report.table import check_metrics

if TYPE_CHECKING:
    import pandas as pd

# Scores and their metrics: at the end of training, and of a later test into the same folder.
RUN_SCORES, TEST_SCORES = "scores.npz", "test_scores.npz"
TEST_METRICS, TEST_DATA = "test_metrics.json", "test_data.csv"
_METRICS = {RUN_SCORES: METRICS, TEST_SCORES: TEST_METRICS}


@dataclass(frozen=True)
class Run:
    """A folder's content; parts that it lacks are None or empty.

    ``results`` holds metrics by the model's name, the one of ``tested`` last; of several seeds, the metrics of each and
    over all, the mean last. ``losses`` and ``evaluations`` are tables by step.
    """

    folder: Path
    tested: TestResult | None
    results: dict[str, dict[str, Any]]
    options: dict[str, Any]
    environment: dict[str, Any]
    losses: pd.DataFrame | None
    evaluations: pd.DataFrame | None

    @property
    def dataset_title(self) -> str:
        name = str(self.options.get("dataset", "unknown data"))
        known = self.tested.videos.dataset if self.tested else DATASETS.get(name)
        return known.title if known else name


def read_run(folder: Path) -> Run:
    """Read a folder; of a training and a later test in it, scores and results are those of the later one.

    Raises ``UserError`` for a folder with neither, and for damaged files.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; give the folder of a run, or the --output-dir of a test")
    there = [folder / name for name in _METRICS if (folder / name).is_file()]
    newest = max(there, key=lambda path: path.stat().st_mtime_ns, default=None)
    if not newest and not (folder / OPTIONS).is_file():
        seeds = ", ".join(seeds_in(folder))
        hint = f"; its seeds are not all trained yet: give the folder of one ({seeds})" if seeds else ""
        raise UserError(f"{folder} holds neither a run (options.yaml) nor a test ({TEST_SCORES}){hint}")
    tested = read_scores(newest) if newest else None
    metrics = folder / _METRICS[newest.name if newest else RUN_SCORES]
    results = _read_json(metrics, "metrics")
    if newest and newest.name == TEST_SCORES and results:
        results = {"test": results}
    elif "seeds" in results:
        try:
            results = seeds_columns(results)
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"metrics {metrics} do not belong to several seeds: {error!r}") from error
    for name, found in results.items():
        check_metrics(found, f"metrics {metrics}, {name}")
    return Run(
        folder,
        tested,
        results,
        tested.options if tested else _read_options(folder / OPTIONS),
        tested.environment if tested else _read_json(folder / ENVIRONMENT, "environment"),
        _read_log(folder / LOSSES),
        _read_log(folder / "metrics.csv"),
    )


def _read_json(path: Path, what: str) -> dict[str, Any]:
    return read_json(path, what) if path.is_file() else {}


def _read_options(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "options")
    if not isinstance(content, dict):
        raise UserError(f"options {path} must hold lines of the form 'option: value'")
    return content


def _read_log(path: Path) -> pd.DataFrame | None:
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
