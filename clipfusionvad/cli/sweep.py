"""Train many settings with several seeds each, and compare them: ablations, grids, searches."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipfusionvad.cli.option_files import OptionFile, option_file_of
from clipfusionvad.cli.options import build_parser, config_tokens, record
from clipfusionvad.cli.parser import Parser
from clipfusionvad.cli.train import summarise_runs, train
from clipfusionvad.datasets import find_dataset
from clipfusionvad.engine.run_folder import BEST, DATA, LAST, states_in
from clipfusionvad.io.argtypes import non_negative_int, positive_int
from clipfusionvad.io.errors import EXIT_INTERRUPTED, UserError, run_main
from clipfusionvad.io.files import check_writable, remove_leftovers, write_text
from clipfusionvad.io.locks import hold
from clipfusionvad.io.provenance import Sources
from clipfusionvad.models import find_method
from clipfusionvad.tools.demo import make_demo
from clipfusionvad.tools.sweep import ray_pool
from clipfusionvad.tools.sweep.plan import FULL, Cell, Published, read_sweep
from clipfusionvad.tools.sweep.pool import run_trials
from clipfusionvad.tools.sweep.search import Settings
from clipfusionvad.tools.sweep.table import differences_text, sweep_text
from clipfusionvad.tools.sweep.trials import RESULTS, Outcome, Trial, trial_folder, write_results

SUMMARY, LOG = "summary.md", "train.log"
#: What says where a training is kept and what it runs on, not what comes of it.
_PLACES = {"output_dir", "model_path", "checkpoint_path", "seeds", "device", "workers", "check", "packed", "packed_dir"}


def main(argv: list[str]) -> int:
    return run_main(lambda: _sweep(argv))


def _sweep(argv: list[str]) -> int:
    args, flags = make_parser().parse_known_args(argv)
    if args.ray_address and args.engine != "ray":
        raise UserError("--ray-address is for --engine ray")
    option_file = option_file_of(find_dataset(args.dataset))
    check_writable(args.output_dir / RESULTS)
    with hold(args.output_dir):
        return _run(Sweep(args, option_file, flags))


def _run(sweep: Sweep) -> int:
    args, dataset = sweep.args, sweep.option_file.DATASET
    for folder in {sweep.folder, *(trial.folder.parent for trial in sweep.trials)}:
        remove_leftovers(folder)
    if sweep.base.demo:
        make_demo(dataset)
    with tqdm(total=sweep.total, desc="sweep", unit="run", disable=None) as bar:
        bar.update(sweep.done)
        work = partial(run_trial, overwrite=args.overwrite)
        if args.engine == "ray":
            outcomes = ray_pool.run_trials(sweep.next, work, args.jobs, args.ray_address)
        else:
            outcomes = run_trials(sweep.next, work, args.jobs)
        for trial, outcome in outcomes:
            sweep.note(trial, outcome)
            bar.update(not outcome.stopped)
    return sweep.conclude()


def run_trial(trial: Trial, overwrite: bool = False) -> Outcome:
    """Train, from where it was stopped if it was; what training prints goes to ``train.log`` in the run's folder."""
    dataset = find_dataset(trial.dataset)
    goes_on = bool(states_in(trial.folder)) and not overwrite
    try:
        args = option_file_of(dataset).parse_args([*trial.flags, "--use-checkpoint" if goes_on else "--overwrite"])
        trial.folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with open(trial.folder / LOG, "a", encoding="utf-8") as log:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                code = train(args, dataset)
    except (UserError, OSError) as error:
        return Outcome(error=" ".join(str(error).split()))
    except KeyboardInterrupt:
        return Outcome(stopped=True)
    if code == EXIT_INTERRUPTED:
        return Outcome(stopped=True)
    trial.finish(time.perf_counter() - start)
    return Outcome()


def make_parser() -> Parser:
    parser = Parser(
        prog="clipfusionvad sweep",
        description=__doc__,
        usage="clipfusionvad sweep CONFIG … --dataset NAME [options] [options of the training]",
        epilog="All other options are those of the training, for every run: python -m clipfusionvad train --help",
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML files: a --config each, a grid or a search")
    parser.add_argument("--dataset", required=True, help="ucf, xd, … or a YAML file of your own")
    parser.add_argument(
        "--seeds", nargs="+", type=non_negative_int, default=[3], metavar="N", help="how many seeds, or which ones"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/sweep"), help="folder of all its runs")
    parser.add_argument("--jobs", type=positive_int, default=1, help="trainings at a time; each takes the next GPU")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="ray: on a Ray cluster")
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="its address, or auto; without: Ray on this machine")
    parser.add_argument(
        "--full", action=argparse.BooleanOptionalAction, default=True, help=f"also train '{FULL}', with nothing changed"
    )
    parser.add_argument("--overwrite", action="store_true", help="train anew what is there already")
    return parser


class Sweep:
    """All trials of a sweep, in the order in which they are run, and what is known of them."""

    def __init__(self, args: Namespace, option_file: OptionFile, flags: Sequence[str]):
        plan = read_sweep(args.configs, args.full)
        self.args, self.option_file = args, option_file
        self.flags = [*([f"--method={plan.method}"] if plan.method else []), *flags]
        self.base = option_file.parse_args(self.flags)
        self.folder: Path = args.output_dir
        self.seeds = _seeds(args.seeds, self.base.seed)
        self.trials: list[Trial] = []
        self.waiting: deque[Trial] = deque()
        self.errors: dict[tuple[str, int], str] = {}
        self.stopped = False
        self._known: dict[str, dict[str, Any]] = {}
        self._settings: dict[str, tuple[Settings, int]] = {}
        self._printed: dict[str, Published] = {}
        self.searches = [
            Settings(search, self.folder / f"{search.name}.json", self.base.seed, args.overwrite)
            for search in plan.searches
        ]
        for cell in plan.cells:
            self._add(cell)
        for settings in self.searches:
            for number in range(len(settings.chosen)):
                self._add_setting(settings, number)

    @property
    def total(self) -> int:
        unasked = sum(settings.search.trials - len(settings.chosen) for settings in self.searches)
        return len(self.trials) + unasked * len(self.seeds)

    @property
    def done(self) -> int:
        return len(self.trials) - len(self.waiting)

    def next(self) -> Trial | None:
        """The next trial to run; None where there is none."""
        while not self.waiting:
            # A search chooses the better the more it knows, so it is asked only when nothing else is left.
            settings = next((one for one in self.searches if len(one.chosen) < one.search.trials), None)
            if settings is None:
                return None
            settings.ask()
            self._add_setting(settings, len(settings.chosen) - 1)
        return self.waiting.popleft()

    def note(self, trial: Trial, outcome: Outcome) -> None:
        """Keep what came of a trial."""
        if outcome.stopped:
            self.stopped = True
            return
        if outcome.error:
            self.errors[trial.cell, trial.seed] = outcome.error
            tqdm.write(f"failed: {trial.cell}, seed {trial.seed}: {outcome.error}", file=sys.stderr)
        self._tell(trial.cell)
        write_results(self.folder, self.trials, self.errors)

    def conclude(self) -> int:
        """Write and print what the sweep has come to; returns the exit code."""
        table = write_results(self.folder, self.trials, self.errors)
        if len(self.seeds) > 1:
            for cell in self._known:
                own = self._of(cell)
                if all(trial.is_done() for trial in own):
                    self._conclude_cell(own)
        text = sweep_text(table, FULL, *self._published()) + self._differences()
        write_text(self.folder / SUMMARY, text)
        print(f"\n{text}")
        print(f"results       {self.folder}: {SUMMARY}, {RESULTS}, and the runs of each cell in a folder of its own")
        if self.stopped:
            print("stopped; the same command goes on from here")
            return EXIT_INTERRUPTED
        return 1 if self.errors else 0

    def _differences(self) -> str:
        """How far the cells are from the full one, once all that was to be trained has been."""
        done = {cell: [trial.folder for trial in self._of(cell) if trial.is_done()] for cell in self._known}
        if self.stopped or not done.get(FULL):
            return ""
        return "\n" + differences_text(FULL, {cell: folders for cell, folders in done.items() if folders})

    def _published(self) -> tuple[dict[str, Published], list[str]]:
        """What was printed of cells on this dataset, and a line on what was printed on another."""
        if self.base.demo:
            return {}, ["made-up data: no published figures beside it"] if self._printed else []
        shown, others = {}, []
        for cell, paper in self._printed.items():
            made = (self._known[cell]["method"], self.option_file.DATASET.name)
            if made != (paper.method, paper.dataset):
                others.append(f"published figures are of {paper.method} on {paper.dataset}: not shown")
                continue
            # Detection mAP was published as the released procedure computes it.
            released = self.base.protocol == "paper"
            figures = {metric: value for metric, value in paper.figures.items() if released or "map" not in metric}
            shown[cell] = replace(paper, figures=figures)
        return shown, list(dict.fromkeys(others))

    def _conclude_cell(self, own: Sequence[Trial]) -> None:
        """What a training of these seeds side by side would have left in the folder above theirs."""
        folder = own[0].folder.parent
        places = ["--output-dir", str(folder), "--model-path", str(folder / BEST)]
        args = self._parse([*own[0].flags, *places, "--seeds", *map(str, self.seeds)])
        sources = Sources.read(own[0].folder / DATA)
        summarise_runs(args, self.option_file.DATASET, folder, sources)

    def _add(self, cell: Cell) -> None:
        """Take a cell in, unless it is another one under a new name."""
        method = find_method(str(cell.options.get("method", self.base.method)))
        own = config_tokens(build_parser(self.option_file.DATASET, method), cell.options, cell.source)
        flags = [*self.flags, *own]
        resolved = {key: value for key, value in record(self._parse(flags)).items() if key not in _PLACES}
        twin = next((name for name, other in self._known.items() if other == resolved), None)
        if cell.published:
            self._printed.setdefault(twin or cell.name, cell.published)
        if twin is not None:
            print(f"{cell.name} is the same as {twin}: not trained again")
            return
        self._known[cell.name] = resolved
        for seed in self.seeds:
            folder = trial_folder(self.folder, cell.name, seed)
            places = {"seed": seed, "output-dir": folder, "model-path": folder / BEST, "checkpoint-path": folder / LAST}
            whole = [*flags, *(f"--{name}={value}" for name, value in places.items())]
            trial = Trial(
                cell.name, seed, folder, self.args.dataset, tuple(whole), cell.options, resolved | {"seed": seed}
            )
            self.trials.append(trial)
            if self.args.overwrite or not trial.is_done():
                self.waiting.append(trial)

    def _add_setting(self, settings: Settings, number: int) -> None:
        cell = Cell(settings.name(number), settings.options(number), settings.search.source)
        self._settings[cell.name] = (settings, number)
        self._add(cell)
        self._tell(cell.name)

    def _tell(self, cell: str) -> None:
        """Let the search that chose a cell know what it came to, once all its seeds have ended."""
        if cell not in self._settings:
            return
        settings, number = self._settings[cell]
        own = self._of(cell)
        if number in settings.values:
            return
        if any((cell, trial.seed) in self.errors for trial in own):
            settings.tell(number, None)
        elif all(trial.is_done() for trial in own):
            metrics, wanted = [trial.metrics() for trial in own], settings.search.maximize
            if wanted not in metrics[0]:
                known = ", ".join(metrics[0])
                raise UserError(f"{settings.search.source}: no metric {wanted!r}; there are: {known}")
            values = [found[wanted] for found in metrics if found[wanted] is not None]
            settings.tell(number, sum(values) / len(values) if values else None)

    def _of(self, cell: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.cell == cell]

    def _parse(self, flags: Sequence[str]) -> Namespace:
        return self.option_file.parse_args(list(flags))


def _seeds(given: Sequence[int], first: int) -> list[int]:
    """The seeds meant: several as they are given, a single number as so many from the option file's on."""
    seeds = list(given) if len(given) > 1 else [first + 10 * number for number in range(given[0])]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError("--seeds takes a number of at least 1, or several different seeds")
    return seeds
