"""A sweep: its trials in the order in which they run, their results, and the summary."""

import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from clipfusionvad.engine.run_folder import BEST, LAST, seed_folder
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import write_text
from clipfusionvad.tools.sweep.plan import Cell, Plan, Published
from clipfusionvad.tools.sweep.search import SearchState
from clipfusionvad.tools.sweep.table import differences_text, sweep_text
from clipfusionvad.tools.sweep.trials import Trial, TrialEnd, write_results
from clipfusionvad.tools.tables import FULL

SUMMARY = "summary.md"
#: Options that say where a training is stored and how it is computed, which do not change its result.
_PLACES = {"output_dir", "model_path", "checkpoint_path", "seeds", "device", "workers", "check", "packed", "packed_dir"}


class TrainingOptions(Protocol):
    """What a sweep needs to know of the options of a training."""

    dataset: str

    def resolve(self, options: Mapping[str, Any], source: str) -> tuple[list[str], dict[str, Any]]:
        """Return the command line of a training with some options changed, and all its options by name.

        Raises ``UserError`` for wrong options; ``source`` is the file that sets them.
        """

    def current(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """Return recorded options under today's names."""


class Sweep:
    """All trials of a sweep; ``dataset`` is the name of the options' dataset, ``seeds`` are one or more."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        seeds: Sequence[int],
        training: TrainingOptions,
        dataset: str,
        overwrite: bool = False,
    ):
        self.folder, self.seeds, self.overwrite = folder, seeds, overwrite
        self.training, self.dataset = training, dataset
        _, self.base = training.resolve({}, "")
        self.trials: list[Trial] = []
        self.waiting: deque[Trial] = deque()
        self.errors: dict[tuple[str, int], str] = {}
        self.stopped = False
        self._cells: dict[str, dict[str, Any]] = {}
        self._published: dict[str, Published] = {}
        self._chosen: dict[str, tuple[SearchState, int]] = {}
        self.searches = [
            SearchState(search, folder / f"{search.name}.json", self.base["seed"], overwrite)
            for search in plan.searches
        ]
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
            search = next((one for one in self.searches if not one.is_complete), None)
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
        write_results(self.folder, self.trials, self.errors)

    def finished_cells(self) -> Iterator[list[Trial]]:
        """Yield the trials of every cell whose seeds are all trained."""
        for cell in self._cells:
            trials = self._of(cell)
            if all(trial.is_done for trial in trials):
                yield trials

    def write_summary(self) -> str:
        """Write ``results.csv`` and ``summary.md``; return the text of the latter."""
        table = write_results(self.folder, self.trials, self.errors)
        text = sweep_text(table, FULL, *self._shown_figures())
        done = {cell: [trial.folder for trial in self._of(cell) if trial.is_done] for cell in self._cells}
        if not self.stopped and done.get(FULL):
            text += "\n" + differences_text(FULL, {cell: folders for cell, folders in done.items() if folders})
        write_text(self.folder / SUMMARY, text)
        return text

    def _shown_figures(self) -> tuple[dict[str, Published], list[str]]:
        """Return the published figures of cells on this dataset, and a note on those of another one."""
        if self.base["demo"]:
            return {}, ["made-up data: no published figures beside it"] if self._published else []
        shown, others = {}, []
        for cell, paper in self._published.items():
            if (self._cells[cell]["method"], self.dataset) != (paper.method, paper.dataset):
                others.append(f"published figures are of {paper.method} on {paper.dataset}: not shown")
                continue
            # Papers report detection mAP as the released procedure computes it.
            released = self.base["protocol"] == "paper"
            figures = {metric: value for metric, value in paper.figures.items() if released or "map" not in metric}
            shown[cell] = replace(paper, figures=figures)
        return shown, list(dict.fromkeys(others))

    def _add(self, cell: Cell) -> None:
        """Add the trials of a cell, unless another cell sets the same options."""
        flags, options = self.training.resolve(cell.options, cell.source)
        resolved = {key: value for key, value in options.items() if key not in _PLACES}
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
            dataset, own = self.training.dataset, resolved | {"seed": seed}
            trial = Trial(cell.name, seed, folder, dataset, whole, cell.options, own)
            self.trials.append(trial)
            if not self.overwrite:
                trial.check(self.training.current)
            if self.overwrite or not trial.is_done:
                self.waiting.append(trial)

    def _add_chosen(self, search: SearchState, number: int) -> None:
        cell = search.cell(number)
        self._chosen[cell.name] = (search, number)
        self._add(cell)
        self._report(cell.name)

    def _report(self, cell: str) -> None:
        """Report the result of a chosen cell to its search, once all its seeds have ended."""
        search, number = self._chosen.get(cell, (None, 0))
        if search is None or number in search.values:
            return
        trials = self._of(cell)
        if any((cell, trial.seed) in self.errors for trial in trials):
            search.tell(number, None)
        elif all(trial.is_done for trial in trials):
            metrics, wanted = [trial.metrics() for trial in trials], search.search.maximize
            if wanted not in metrics[0]:
                known = ", ".join(metrics[0])
                raise UserError(f"{search.search.source}: no metric {wanted!r}; there are: {known}")
            values = [found[wanted] for found in metrics if found[wanted] is not None]
            search.tell(number, sum(values) / len(values) if values else None)

    def _of(self, cell: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.cell == cell]
