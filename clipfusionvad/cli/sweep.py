"""Train many settings with several seeds each, and compare them: ablations, grids, searches."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from clipfusionvad.cli.options import OptionFile, build_parser, config_tokens, option_file_of, settings_of
from clipfusionvad.cli.parser import Parser
from clipfusionvad.cli.train import train
from clipfusionvad.datasets import find_dataset
from clipfusionvad.engine.config import default_options, recorded
from clipfusionvad.io.errors import EXIT_INTERRUPTED, UserError
from clipfusionvad.io.files import check_writable, hold, remove_leftovers
from clipfusionvad.io.option import Option, add_arguments, declared_options, from_arguments
from clipfusionvad.models import current_options, find_method
from clipfusionvad.tools.tables import FULL

if TYPE_CHECKING:
    from clipfusionvad.tools.sweep.cost import Cost
    from clipfusionvad.tools.sweep.sweep import Sweep, Trial, TrialEnd

_ADDRESS = Option("its address, or auto (default: Ray on this machine)", metavar="HOST:PORT")


@dataclass(frozen=True)
class SweepOptions:
    """How the settings of a sweep are trained."""

    seeds: Annotated[tuple[int, ...], Option("how many seeds, or which ones", minimum=0, metavar="N")] = (3,)
    output_dir: Annotated[str, Option("folder of all its runs")] = "runs/sweep"
    jobs: Annotated[int, Option("trainings at a time; each takes the next GPU", minimum=1)] = 1
    engine: Annotated[str, Option("ray: on a Ray cluster", choices=("local", "ray"))] = "local"
    ray_address: Annotated[str | None, _ADDRESS] = None
    full: Annotated[bool, Option(f"also train '{FULL}', with nothing changed")] = True
    overwrite: Annotated[bool, Option("train again what is finished already")] = False


def main(argv: list[str]) -> int:
    args, flags = make_parser().parse_known_args(argv)
    options = from_arguments(SweepOptions, vars(args))
    if options.ray_address and options.engine != "ray":
        raise UserError("--ray-address is for --engine ray")
    option_file, folder = option_file_of(find_dataset(args.dataset)), Path(options.output_dir)

    from clipfusionvad.tools.sweep.plan import read_sweep
    from clipfusionvad.tools.sweep.sweep import RESULTS, Sweep

    check_writable(folder / RESULTS)
    with hold(folder):
        plan = read_sweep(args.configs, options.full)
        flags = [*([f"--method={plan.method}"] if plan.method else []), *flags]
        resolve = partial(_resolve, option_file, flags)
        seeds = chosen_seeds(options.seeds, resolve({}, "")[1]["seed"])
        name = option_file.DATASET.name
        sweep = Sweep(folder, plan, seeds, name, options.overwrite, resolve, partial(_current, option_file), _cost)
        return _run(sweep, args.dataset, option_file, options)


def chosen_seeds(given: Sequence[int], first: int) -> list[int]:
    """Return the seeds that ``--seeds`` names, or as many as it says, from ``first`` in steps of ten."""
    seeds = [first + 10 * number for number in range(given[0])] if len(given) == 1 else list(given)
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError("--seeds takes a number of at least 1, or several different seeds")
    return seeds


def make_parser() -> Parser:
    parser = Parser(
        prog="clipfusionvad sweep",
        description=__doc__,
        usage="clipfusionvad sweep CONFIG … --dataset NAME [options] [options of the training]",
        epilog="All other options are those of the training, for every run: python -m clipfusionvad train --help",
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML files: a --config each, a grid or a search")
    parser.add_argument("--dataset", required=True, help="ucf, xd, … or a YAML file of your own")
    add_arguments(parser, declared_options(SweepOptions).values())
    return parser


def _resolve(
    option_file: OptionFile, flags: list[str], options: Mapping[str, Any], source: str
) -> tuple[list[str], dict[str, Any]]:
    """Return the command line of a training with some options changed, and all its options by name."""
    method = str(options.get("method") or option_file.parse_args(flags).method)
    parser = build_parser(option_file.DATASET, find_method(method))
    parser.read_settings(options, source)
    flags = [*flags, *config_tokens(parser, options, source)]
    return flags, recorded(vars(option_file.parse_args(flags)))


def _current(option_file: OptionFile, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded options under today's names, with those that came later at their defaults."""
    options = current_options(recorded)
    method = str(options.get("method"))
    known = build_parser(option_file.DATASET, find_method(method)).options
    return default_options(method) | {known[key].dest if key in known else key: options[key] for key in options}


def _cost(path: Path) -> "Cost":
    from clipfusionvad.cli.trained_model import load_model
    from clipfusionvad.engine.checkpoint import read_model_file
    from clipfusionvad.tools.sweep.cost import cost_of

    return cost_of(load_model(path), read_model_file(str(path)).state)


def _run(sweep: "Sweep", dataset: str, option_file: OptionFile, options: SweepOptions) -> int:
    from tqdm import tqdm

    from clipfusionvad.tools.demo import make_demo
    from clipfusionvad.tools.sweep.pool import run_trials
    from clipfusionvad.tools.sweep.sweep import RESULTS, SUMMARY

    for folder in {sweep.folder, *(trial.folder.parent for trial in sweep.trials)}:
        remove_leftovers(folder)
    if sweep.base["demo"]:
        make_demo(option_file.DATASET)
    if options.overwrite:
        for trial in sweep.trials:
            trial.reset()
    work = partial(run_trial, dataset_name=dataset, overwrite=options.overwrite)
    with tqdm(total=sweep.total, desc="sweep", unit="run", disable=None) as bar:
        bar.update(len(sweep.trials) - len(sweep.waiting))
        for trial, end in run_trials(sweep.next, work, options.jobs, options.engine, options.ray_address):
            sweep.record(trial, end)
            bar.update(not end.stopped)
    if len(sweep.seeds) > 1:
        for trials in sweep.finished_cells():
            _conclude_cell(trials, option_file, sweep.seeds)
    print(f"\n{sweep.write_summary()}")
    print(f"results       {sweep.folder}: {SUMMARY}, {RESULTS}, and the runs of each cell in its own folder")
    if sweep.stopped:
        print("stopped; the same command continues from here")
        return EXIT_INTERRUPTED
    return 1 if sweep.errors else 0


def run_trial(trial: "Trial", dataset_name: str, overwrite: bool) -> "TrialEnd":
    """Train, from the last saved state if there is one; the output goes to ``train.log`` in the run's folder."""
    from clipfusionvad.engine.run_folder import states_in
    from clipfusionvad.tools.sweep.sweep import TrialEnd

    dataset = find_dataset(dataset_name)
    resume = bool(states_in(trial.folder)) and not overwrite
    try:
        args = option_file_of(dataset).parse_args([*trial.flags, "--use-checkpoint" if resume else "--overwrite"])
        trial.folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with open(trial.folder / "train.log", "a", encoding="utf-8") as log:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                code = train(args, dataset, "repeat the command of the sweep")
    except (UserError, OSError) as error:
        return TrialEnd(error=" ".join(str(error).split()))
    except KeyboardInterrupt:
        return TrialEnd(stopped=True)
    if code == EXIT_INTERRUPTED:
        return TrialEnd(stopped=True)
    trial.finish(time.perf_counter() - start)
    return TrialEnd()


def _conclude_cell(trials: "list[Trial]", option_file: OptionFile, seeds: Sequence[int]) -> None:
    """Write into a cell's folder what a training with --seeds leaves there."""
    from clipfusionvad.cli.training import write_summary
    from clipfusionvad.engine.run_folder import BEST, DATA
    from clipfusionvad.io.provenance import Sources

    folder = trials[0].folder.parent
    places = ["--output-dir", str(folder), "--model-path", str(folder / BEST)]
    args = option_file.parse_args([*trials[0].flags, *places, "--seeds", *map(str, seeds)])
    write_summary(settings_of(args, option_file.DATASET), folder, Sources.read(trials[0].folder / DATA))
