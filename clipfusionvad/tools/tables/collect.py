"""Finished runs, found in folders of any depth, and which of them are seeds of one setting."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clipfusionvad.datasets import DATASETS
from clipfusionvad.engine.run_folder import METRICS, OPTIONS, flat_metrics, seed_folder
from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.io.files import read_json, read_yaml, walk_files
from clipfusionvad.report.results import RUN_SCORES, TEST_METRICS, TEST_SCORES
from clipfusionvad.report.scores import read_scores
from clipfusionvad.report.table import check_metrics

BEST, LAST = "best", "last"
#: Options that say where a run is kept and how it is computed, not what is trained.
PLACES = {"seed", "seeds", "output_dir", "model_path", "checkpoint_path", "metrics_json"}
PLACES |= {"device", "workers", "check", "packed", "packed_dir"}


@dataclass(frozen=True)
class Result:
    """A run of one seed, or a test. ``metrics`` are flat, by the weights they are of; a test's stand for the best.

    ``scores`` is the file with the scores of its best weights, if it is there.
    """

    folder: Path
    options: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    scores: Path | None
    is_test: bool = False

    @property
    def seed(self) -> int | None:
        return self.options.get("seed")

    @property
    def setting(self) -> str:
        """The same for all seeds of a setting. Whose model a test is of cannot be told, so each stands by itself."""
        if self.is_test:
            return str(self.folder.resolve())
        kept = {key: value for key, value in self.options.items() if key not in PLACES}
        return json.dumps(kept, sort_keys=True, default=str)

    @property
    def name(self) -> Path:
        """The folder that stands for all seeds."""
        parent = self.folder.parent
        return parent if self.seed is not None and seed_folder(parent, self.seed) == self.folder else self.folder


@dataclass
class Cell:
    """All seeds of one setting; ``folder`` holds their folders, or is that of the only one."""

    name: str
    folder: Path
    results: list[Result] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        return self.results[0].options

    @property
    def method(self) -> str:
        return str(self.options["method"])

    @property
    def dataset(self) -> str:
        return str(self.options["dataset"])

    @property
    def demo(self) -> bool:
        return bool(self.options.get("demo"))

    @property
    def protocol(self) -> str:
        return str(self.options.get("protocol", "paper"))

    @property
    def data(self) -> str:
        """The data as a table names it: what is made up must not be taken for a benchmark."""
        known = DATASETS.get(self.dataset)
        return (known.title if known else self.dataset) + (" (demo)" if self.demo else "")


def collect(paths: Sequence[Path]) -> list[Cell]:
    """Every finished run in and below folders, joined by setting, in the order in which they are found.

    Runs are of one setting if their options are the same but for the seed and the places of files. A seed that is
    there twice is counted once, with a warning. ``UserError`` where there is no run, and for damaged ones.
    """
    cells: dict[str, Cell] = {}
    seen: set[Path] = set()
    for path in paths:
        found = [result for result in _read_below(path) if result.folder.resolve() not in seen]
        seen |= {result.folder.resolve() for result in found}
        for result in found:
            cell = cells.setdefault(result.setting, Cell("", result.name))
            twin = next((other for other in cell.results if other.seed == result.seed), None)
            if twin:
                warn(f"{result.folder} is the same setting and seed as {twin.folder}: counted once")
            else:
                cell.results.append(result)
    _name(list(cells.values()))
    return list(cells.values())


def _name(cells: Sequence[Cell]) -> None:
    """Name cells by their folders, with as many of those above as tell them apart."""
    places = [cell.folder.resolve() for cell in cells]
    for depth in range(1, 1 + max(len(place.parts) for place in places)):
        unnamed = [cell for cell in cells if not cell.name]
        names = Counter("/".join(place.parts[-depth:]) for place in places)
        for cell in unnamed:
            name = "/".join(cell.folder.resolve().parts[-depth:])
            cell.name = name if names[name] == 1 else ""
    # Several settings of one folder's seeds differ in nothing but their seed's folder.
    for cell in cells:
        cell.name = cell.name or str(cell.results[0].folder)


def _read_below(path: Path) -> list[Result]:
    if not path.is_dir():
        raise UserError(f"no such folder: {path}; give the folders of runs, of several seeds, or of sweeps")
    files = list(walk_files(path, METRICS))
    trained = {file.parent for file in files if file.name == METRICS and (file.parent / OPTIONS).is_file()}
    tested = {file.parent for file in files if file.name == TEST_METRICS and (file.parent / TEST_SCORES).is_file()}
    read = [_read_training(folder) for folder in sorted(trained)]
    found = [result for result in read if result] + [_read_test(folder) for folder in sorted(tested - trained)]
    if not found:
        raise UserError(f"{path} holds no finished run: no {METRICS} beside {OPTIONS} there or below")
    return found


def _read_training(folder: Path) -> Result | None:
    """None for the summary of several seeds, which are found below it."""
    content = read_json(folder / METRICS, "metrics")
    if "seeds" in content:
        return None
    options = read_yaml(folder / OPTIONS, "options")
    scores = folder / RUN_SCORES
    kept = {weights: content[weights] for weights in (BEST, LAST) if weights in content}
    if not kept:
        raise UserError(f"metrics {folder / METRICS} are not those of a run: neither {BEST} nor {LAST} is there")
    return _result(folder, options, kept, folder / METRICS, scores if scores.is_file() else None)


def _read_test(folder: Path) -> Result:
    scores = folder / TEST_SCORES
    metrics = {BEST: read_json(folder / TEST_METRICS, "metrics")}
    return replace(_result(folder, read_scores(scores).options, metrics, folder / TEST_METRICS, scores), is_test=True)


def _result(folder: Path, options: Any, metrics: dict[str, Any], source: Path, scores: Path | None) -> Result:
    if not isinstance(options, dict) or not all(isinstance(options.get(key), str) for key in ("method", "dataset")):
        raise UserError(f"the options of {folder} name no method and dataset: the run is damaged, or something else")
    if not isinstance(options.get("seed", 0), int):
        raise UserError(f"the options of {folder}: seed is {str(options['seed'])[:60]}, not a whole number")
    for weights, found in metrics.items():
        check_metrics(found, f"metrics {source}, {weights}")
    return Result(folder, options, {weights: flat_metrics(found) for weights, found in metrics.items()}, scores)
