"""A sweep: its trials in the order in which they run, the search that chooses them, their results, the summary."""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from clipfusionvad.engine.run_folder import BEST, LAST, METRICS, flat_metrics, seed_folder
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_json, write_json, write_text
from clipfusionvad.report.results import RUN_SCORES
from clipfusionvad.report.scores import read_scores
from clipfusionvad.report.table import no_comparison
from clipfusionvad.tools.sweep.cost import Cost
from clipfusionvad.tools.sweep.plan import Cell, Plan, Published, Search
from clipfusionvad.tools.sweep.table import NOT_COMPARED, compare_cells, differences_text, sweep_text
from clipfusionvad.tools.tables import FULL, HEADLINE, OF_METHODS
from clipfusionvad.tools.tables.collect import PLACES

RESULTS, SUMMARY = "results.csv", "summary.md"
_DONE = "done.json"

#: Returns, for some changed options and the file that sets them, the command line of a training and all its options.
Resolve = Callable[[Mapping[str, Any], str], tuple[list[str], dict[str, Any]]]


@dataclass(frozen=True)
class Trial:
    """One training in its own folder: a cell with a seed. ``flags`` are its command line, without --use-checkpoint.

    ``changed`` are the options that the cell sets, ``resolved`` all options that the result depends on.
    """

    cell: str
    seed: int
    folder: Path
    flags: tuple[str, ...]
    changed: Mapping[str, Any]
    resolved: Mapping[str, Any]

    @property
    def is_done(self) -> bool:
        return (self.folder / _DONE).is_file()

    def reset(self) -> None:
        """Forget that the training is finished."""
        (self.folder / _DONE).unlink(missing_ok=True)

    def finish(self, seconds: float) -> None:
        """Record that the training is finished."""
        write_json(self.folder / _DONE, {"seconds": round(seconds, 3), "options": self.resolved})

    def metrics(self) -> dict[str, Any]:
        """Return the metrics of the best model, nested ones as ``map@0.1``."""
        return flat_metrics(read_json(self.folder / METRICS, "metrics")["best"])


class TrialEnd(NamedTuple):
    """How a trial ended: finished (both are false), stopped half-way, or failed with an ``error``."""

    error: str = ""
    stopped: bool = False


class Sweep:
    """All trials of a sweep; ``dataset`` is the name of the options' dataset, ``seeds`` are one or more.

    ``current`` returns options under today's names, ``cost`` what the model of a file costs. ``UserError`` for wrong
    options, and for results of others.
    """

    def __init__(
        self, folder: Path, plan: Plan, seeds: Sequence[int], dataset: str, overwrite: bool,
        resolve: Resolve, current: Callable[[Mapping[str, Any]], Mapping[str, Any]], cost: Callable[[Path], Cost],
    ):  # fmt: skip
        self.folder, self.seeds, self.dataset, self.overwrite = folder, seeds, dataset, overwrite
        self._resolve, self._current, self._cost = resolve, current, cost
        _, self.base = resolve({}, "")
        self.trials: list[Trial] = []
        self.waiting: deque[Trial] = deque()
        self.errors: dict[tuple[str, int], str] = {}
        self.stopped = False
        self._cells: dict[str, dict[str, Any]] = {}
        self._published: dict[str, Published] = {}
        self._chosen: dict[str, tuple[SearchState, int]] = {}
        # What is wrong in a search is found before anything is trained.
        for one in plan.searches:
            for name, values in one.space.items():
                for value in values if isinstance(values, list) else (values["low"], values["high"]):
                    resolve({**one.options, name: value}, one.source)
        seed = self.base["seed"]
        self.searches = [SearchState(one, folder / f"{one.name}.json", seed, overwrite) for one in plan.searches]
        for cell in plan.cells:
            self._add(cell)
        for search in self.searches:
            for number in range(len(search.chosen)):
                self._add_chosen(search, number)

    @property
    def total(self) -> int:
        to_choose = sum(search.search.trials - len(search.chosen) for search in self.searches)
        return len(self.trials) + to_choose * len(self.seeds)

    def next(self) -> Trial | None:
        """Return the next trial to run; None where there is none."""
        while not self.waiting:
            # More results make a search choose better, so it waits until nothing else is left.
            search = next((one for one in self.searches if len(one.chosen) < one.search.trials), None)
            if search is None:
                return None
            search.ask()
            self._add_chosen(search, len(search.chosen) - 1)
        return self.waiting.popleft()

    def record(self, trial: Trial, end: TrialEnd) -> None:
        """Record how a trial ended."""
        if end.stopped:
            self.stopped = True
            return
        if end.error:
            self.errors[trial.cell, trial.seed] = end.error
            tqdm.write(f"failed: {trial.cell}, seed {trial.seed}: {end.error}", file=sys.stderr)
        self._report(trial.cell)
        self._write_results()

    def finished_cells(self) -> Iterator[list[Trial]]:
        """Yield the trials of every cell whose seeds are all trained."""
        for trials in map(self._of, self._cells):
            if all(trial.is_done for trial in trials):
                yield trials

    def write_summary(self) -> str:
        """Write ``results.csv`` and ``summary.md``; return the text of the latter."""
        reference, compared, costs = FULL, NOT_COMPARED, dict[str, Cost]()
        metrics: Sequence[str] = HEADLINE
        done = {cell: [trial.folder for trial in self._of(cell) if trial.is_done] for cell in self._cells}
        done = {cell: folders for cell, folders in done.items() if folders}
        several_methods = len({options["method"] for options in self._cells.values()}) > 1
        if several_methods:
            reference, metrics = next(iter(self._cells)), OF_METHODS
        if not self.stopped and reference in done:
            compared = compare_cells(reference, done, metrics)
            if several_methods:
                costs = {cell: self._cost(folders[0] / BEST) for cell, folders in done.items()}
        text = sweep_text(self._write_results(), reference, *self._shown_figures(), compared, metrics, costs)
        if reference in done:
            text += "\n" + differences_text(reference, compared, metrics)
        write_text(self.folder / SUMMARY, text)
        return text

    def _write_results(self) -> pd.DataFrame:
        """Write ``results.csv``, a row for each trial, from the content of their folders."""
        rows = []
        for trial in self.trials:
            error = self.errors.get((trial.cell, trial.seed), "")
            state = "done" if trial.is_done else "failed" if error else "open"
            row = {"cell": trial.cell, "seed": trial.seed, "state": state, "error": error if state == "failed" else ""}
            rows.append(row | dict(trial.changed) | (trial.metrics() if trial.is_done else {}))
        table = pd.DataFrame(rows)
        write_text(self.folder / RESULTS, table.to_csv(index=False))
        return table

    def _shown_figures(self) -> tuple[dict[str, Published], list[str]]:
        """Return the published figures of cells on this dataset, and a note on those of another one."""
        tested = (trial.folder / RUN_SCORES for trial in self.trials if trial.is_done)
        scores = next(filter(Path.is_file, tested), None) if self._published else None
        if scores and (reason := no_comparison(self.base, read_scores(scores).videos.judged)):
            return {}, [f"The papers' figures are not shown: {reason}."]
        # Papers report detection mAP as the released procedure computes it.
        released = self.base["protocol"] == "paper"
        shown, others = {}, []
        for cell, paper in self._published.items():
            if (self._cells[cell]["method"], self.dataset) == (paper.method, paper.dataset):
                figures = {metric: value for metric, value in paper.figures.items() if released or "map" not in metric}
                shown[cell] = replace(paper, figures=figures)
            else:
                others.append(f"published figures are of {paper.method} on {paper.dataset}: not shown")
        return shown, list(dict.fromkeys(others))

    def _add(self, cell: Cell) -> None:
        """Add the trials of a cell, unless another cell sets the same options."""
        flags, options = self._resolve(cell.options, cell.source)
        resolved = {key: value for key, value in options.items() if key not in PLACES}
        twin = next((name for name, other in self._cells.items() if other == resolved), None)
        if cell.published:
            self._published.setdefault(twin or cell.name, cell.published)
        if twin is not None:
            print(f"{cell.name} is the same as {twin}: not trained again")
            return
        self._cells[cell.name] = resolved
        for seed in self.seeds:
            folder = seed_folder(self.folder / cell.name, seed)
            places = {"seed": seed, "output-dir": folder, "model-path": folder / BEST, "checkpoint-path": folder / LAST}
            whole = (*flags, *(f"--{name}={value}" for name, value in places.items()))
            trial = Trial(cell.name, seed, folder, whole, cell.options, resolved | {"seed": seed})
            self.trials.append(trial)
            if self.overwrite or not trial.is_done:
                self.waiting.append(trial)
                continue
            before = self._current(read_json(folder / _DONE, "record").get("options", {}))
            keys = sorted((before.keys() | resolved.keys()) - PLACES)
            if differing := [key for key in keys if before.get(key) != resolved.get(key)]:
                raise UserError(
                    f"{folder} was trained with another {', '.join(differing)}: name another --output-dir, or train "
                    f"again with --overwrite"
                )

    def _add_chosen(self, state: "SearchState", number: int) -> None:
        search = state.search
        cell = Cell(f"{search.name}-{number:03d}", {**search.options, **state.chosen[number]}, search.source)
        self._chosen[cell.name] = (state, number)
        self._add(cell)
        self._report(cell.name)

    def _report(self, cell: str) -> None:
        """Report the result of a chosen cell to its search, once all its seeds have ended."""
        state, number = self._chosen.get(cell, (None, 0))
        if state is None or number in state.values:
            return
        trials = self._of(cell)
        if any((cell, trial.seed) in self.errors for trial in trials):
            state.tell(number, None)
        elif all(trial.is_done for trial in trials):
            metrics, wanted = [trial.metrics() for trial in trials], state.search.maximize
            if wanted not in metrics[0]:
                raise UserError(f"{state.search.source}: no metric {wanted!r}; there are: {', '.join(metrics[0])}")
            values = [found[wanted] for found in metrics if found[wanted] is not None]
            state.tell(number, sum(values) / len(values) if values else None)

    def _of(self, cell: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.cell == cell]


class SearchState:
    """The settings that Optuna chose for a search by the results of the earlier ones, stored in a JSON file.

    The state is in that file, not in Optuna: a continued search chooses the same. The number seeds the sampler.
    """

    def __init__(self, search: Search, path: Path, seed: int, fresh: bool):
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise UserError("a search needs Optuna, which is not installed: pip install optuna") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.search, self.path, self.seed = optuna, search, path, seed
        self.space = {name: self._distribution(name, values) for name, values in search.space.items()}
        self.chosen: list[dict[str, Any]] = []
        # None where a setting failed.
        self.values: dict[int, float | None] = {}
        if path.is_file() and not fresh:
            self._read()

    def ask(self) -> None:
        """Choose the next setting."""
        sampler = self.optuna.samplers.TPESampler(seed=self.seed + len(self.chosen))
        study = self.optuna.create_study(direction="maximize", sampler=sampler)
        states = self.optuna.trial.TrialState
        for number, value in sorted(self.values.items()):
            known: dict[str, Any] = {"params": self.chosen[number], "distributions": self.space, "value": value}
            state = states.FAIL if value is None else states.COMPLETE
            study.add_trial(self.optuna.trial.create_trial(**known, state=state))
        self.chosen.append(study.ask(self.space).params)
        self._write()

    def tell(self, number: int, value: float | None) -> None:
        """Record the result of setting ``number``."""
        self.values[number] = value
        self._write()

    def _write(self) -> None:
        trials = [
            {"options": options, "value": self.values.get(number), "told": number in self.values}
            for number, options in enumerate(self.chosen)
        ]
        write_json(self.path, {"space": dict(self.search.space), "seed": self.seed, "trials": trials})

    def _read(self) -> None:
        content = read_json(self.path, "search")
        if content.get("space") != dict(self.search.space) or content.get("seed") != self.seed:
            raise UserError(f"{self.path} is a search of another space or seed: name another --output-dir")
        try:
            self.chosen = [{name: trial["options"][name] for name in self.space} for trial in content["trials"]]
            self.values = {i: trial["value"] for i, trial in enumerate(content["trials"]) if trial["told"]}
        except (KeyError, TypeError) as error:
            raise UserError(f"search {self.path} is damaged: name another --output-dir") from error

    def _distribution(self, name: str, values: Any) -> Any:
        kinds = self.optuna.distributions
        if isinstance(values, list):
            if not all(isinstance(value, bool | int | float | str) for value in values):
                raise UserError(f"sweep {self.search.source}: search: {name} may choose among plain values only")
            return kinds.CategoricalDistribution(values)
        low, high, log, step = values["low"], values["high"], bool(values.get("log", False)), values.get("step")
        if isinstance(low, int) and isinstance(high, int):
            return kinds.IntDistribution(low, high, log=log, step=step or 1)
        return kinds.FloatDistribution(float(low), float(high), log=log, step=step)
