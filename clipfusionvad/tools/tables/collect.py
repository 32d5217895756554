"""Find finished runs in folders of any depth, and group those that are seeds of one setting."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clipfusionvad.datasets import DATASETS
from clipfusionvad.engine.config import default_options
from clipfusionvad.engine.run_folder import METRICS, OPTIONS, flat_metrics, seed_folder
from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.io.files import read_json, read_yaml, walk_files
from clipfusionvad.report.results import RUN_SCORES, TEST_METRICS, TEST_SCORES
from clipfusionvad.report.scores import read_scores
from clipfusionvad.report.table import check_metrics, no_comparison
from clipfusionvad.tools.tables import BEST, LAST

#: Options that say where a run is stored and how it is computed, not what is trained.
PLACES = {"seed", "seeds", "output_dir", "model_path", "checkpoint_path", "metrics_json"}
PLACES |= {"device", "workers", "check", "packed", "packed_dir"}


@dataclass(frozen=True)
class Result:
    """A run of one seed, or a test: flat ``metrics`` by weights (a test's count as the best), and its options.

    ``scores`` is the file with the scores of its best weights, or None.
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
    def sigma(self) -> float:
        """With which standard deviation, in snippets, its scores were smoothed over time."""
        found = self.metrics.get(BEST, {}).get("smooth")
        return float(found or 0)

    @property
    def setting(self) -> str:
        """Return a key that all seeds of a setting share. A test does not name its model's run, so it has its own."""
        if self.is_test:
            return str(self.folder.resolve())
        # Runs that were made before the program had an option lack it.
        usual = default_options(self.options["method"])
        kept = {key: value for key, value in self.options.items() if key not in PLACES and value != usual.get(key)}
        return json.dumps(kept, sort_keys=True, default=str)


class Setting:
    """All seeds of one setting; ``folder`` holds their folders, or is that of the only run.

    ``data`` is the dataset's name in a table, where made-up data is marked.
    """

    def __init__(self, first: Result):
        self.name, self.results = "", list[Result]()
        parent, options = first.folder.parent, first.options
        has_parent = first.seed is not None and seed_folder(parent, first.seed) == first.folder
        self.folder = parent if has_parent else first.folder
        self.method, self.dataset = options["method"], options["dataset"]
        self.demo, self.protocol = bool(options.get("demo")), str(options.get("protocol", "paper"))
        title = DATASETS[self.dataset].title if self.dataset in DATASETS else self.dataset
        self.data = title + (" (demo)" if self.demo else "")

    @cached_property
    def no_comparison(self) -> str:
        """Why the papers' figures may not stand beside its metrics; "" where they may."""
        first = self.results[0]
        return no_comparison(first.options, read_scores(first.scores).videos.judged if first.scores else None)


def collect(paths: Sequence[Path]) -> list[Setting]:
    """Find every finished run in and below folders, grouped by setting, in the order in which they are found.

    Runs belong to one setting if their options differ only in the seed and in ``PLACES``. A seed that occurs twice is
    counted once, with a warning. Raises ``UserError`` without any run, and for damaged ones.
    """
    settings: dict[str, Setting] = {}
    seen: set[Path] = set()
    for path in paths:
        found = [result for result in _read_below(path) if result.folder.resolve() not in seen]
        seen |= {result.folder.resolve() for result in found}
        for result in found:
            setting = settings.setdefault(result.setting, Setting(result))
            twin = next((other for other in setting.results if other.seed == result.seed), None)
            if twin:
                warn(f"{result.folder} is the same setting and seed as {twin.folder}: counted once")
            else:
                setting.results.append(result)
    _name(list(settings.values()))
    return list(settings.values())


def _name(settings: Sequence[Setting]) -> None:
    """Name settings by the last parts of their folders, as many as make the names unique."""
    places = [setting.folder.resolve().parts for setting in settings]
    counts = Counter(parts[at:] for parts in places for at in range(len(parts)))
    for setting, parts in zip(settings, places, strict=True):
        unique = ("/".join(parts[at:]) for at in reversed(range(len(parts))) if counts[parts[at:]] == 1)
        # Several settings in one folder differ only in the folders of their seeds.
        setting.name = next(unique, str(setting.results[0].folder))


def _read_below(path: Path) -> list[Result]:
    if not path.is_dir():
        raise UserError(f"no such folder: {path}; give the folders of runs, of several seeds, or of sweeps")
    files = list(walk_files(path, METRICS))
    trained = {file.parent for file in files if file.name == METRICS and (file.parent / OPTIONS).is_file()}
    tested = {file.parent for file in files if file.name == TEST_METRICS and (file.parent / TEST_SCORES).is_file()}
    folders = [(folder, False) for folder in sorted(trained)] + [(folder, True) for folder in sorted(tested - trained)]
    found = [result for folder, is_test in folders if (result := _read(folder, is_test))]
    if not found:
        raise UserError(f"{path} holds no finished run: no {METRICS} beside {OPTIONS} there or below")
    return found


def _read(folder: Path, is_test: bool) -> Result | None:
    """Read a training or a test; None for the summary of several seeds, whose folders are below it."""
    source, scores = (folder / name for name in ((TEST_METRICS, TEST_SCORES) if is_test else (METRICS, RUN_SCORES)))
    content = read_json(source, "metrics")
    if is_test:
        options, metrics = read_scores(scores).options, {BEST: content}
    elif "seeds" in content:
        return None
    else:
        options = read_yaml(folder / OPTIONS, "options")
        metrics = {weights: content[weights] for weights in (BEST, LAST) if weights in content}
        if not metrics:
            raise UserError(f"metrics {source} do not belong to a run: neither {BEST} nor {LAST} is there")
    if not isinstance(options, dict) or not all(isinstance(options.get(key), str) for key in ("method", "dataset")):
        raise UserError(f"the options of {folder} name no method and dataset: it is damaged, or not a run")
    if not isinstance(options.get("seed", 0), int):
        raise UserError(f"the options of {folder}: seed is {str(options['seed'])[:60]}, not a whole number")
    for weights, found in metrics.items():
        check_metrics(found, f"metrics {source}, {weights}")
    flat = {weights: flat_metrics(found) for weights, found in metrics.items()}
    return Result(folder, options, flat, scores if scores.is_file() else None, is_test)
