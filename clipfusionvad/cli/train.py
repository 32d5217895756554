"""Train a method on a dataset."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from clipfusionvad.cli.option_files import find_option_file
from clipfusionvad.cli.options import record
from clipfusionvad.cli.task import Task, begin, finish, make_trainer, read_task
from clipfusionvad.data.lists import Entry
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.checkpoint import run_of
from clipfusionvad.engine.device import deterministic, pick_device
from clipfusionvad.engine.distributed import broadcast_object, distributed_context, local_main_first, resumable
from clipfusionvad.engine.run_folder import (
    BEST,
    LAST,
    METRICS,
    check_folder,
    check_seeds_folder,
    choose_folder,
    record_dataset,
    record_run,
    seed_folder,
    states_in,
)
from clipfusionvad.engine.trainer import Stopped, Trainer
from clipfusionvad.io.errors import EXIT_INTERRUPTED, UserError, warn
from clipfusionvad.io.files import check_writable, link_or_copy, remove_leftovers, write_json
from clipfusionvad.io.foreign_checkpoints import Damaged, read_checkpoint
from clipfusionvad.io.locks import hold
from clipfusionvad.io.provenance import Sources, environment
from clipfusionvad.io.rank import is_main, rank_info
from clipfusionvad.report.results import RUN_SCORES
from clipfusionvad.report.run_page import PAGE, write_report
from clipfusionvad.report.seeds import seeds_table, summarise_seeds
from clipfusionvad.report.table import metrics_table, published
from clipfusionvad.tools.demo import make_demo


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("train", argv)
    return train(option_file.parse_args(rest), option_file.DATASET)


def train(args: argparse.Namespace, dataset: Dataset) -> int:
    """Run one training, or one for each of ``--seeds``, from checked options; returns the exit code."""
    with distributed_context(args.device) as device, deterministic(args.deterministic):
        if args.seeds and rank_info().world_size > 1:
            raise UserError("--seeds trains all seeds in one process: start it without torchrun")
        # One process reads all files.
        args.check = args.check and is_main()
        if args.demo:
            with local_main_first():
                make_demo(dataset)
        task = read_task(args, dataset, device)
        return _train_seeds(args, task) if args.seeds else _train_one(args, task)


def _train_one(args: argparse.Namespace, task: Task) -> int:
    trainer, entries = make_trainer(args, task)
    for path in filter(None, (args.model_path, args.checkpoint_path, args.metrics_json)):
        check_writable(path)
    with contextlib.ExitStack() as held:
        folder = broadcast_object(lambda: _take_folder(args, task, held))
        return _train_in(folder, args, task, trainer, entries)


def _take_folder(args: argparse.Namespace, task: Task, held: contextlib.ExitStack) -> Path:
    """The folder of the run, or of those of several seeds, held against other processes from here on."""
    several, may_be_taken = bool(args.seeds), args.use_checkpoint or args.overwrite
    stem = f"{task.dataset.name}_{args.method}" + "_seeds" * several
    folder = choose_folder(args.output_dir, stem, args.use_checkpoint)
    check_writable(folder / (METRICS if several else LAST))
    held.enter_context(hold(folder))
    if several:
        check_seeds_folder(folder, may_be_taken, args.seeds)
        for seed in args.seeds:
            held.enter_context(hold(seed_folder(folder, seed)))
    else:
        check_folder(folder, may_be_taken)
    for path in map(Path, filter(None, (args.model_path, args.checkpoint_path, args.metrics_json))):
        remove_leftovers(path.parent, path.name)
    return folder


def _train_in(folder: Path, args: argparse.Namespace, task: Task, trainer: Trainer, entries: list[Entry]) -> int:
    checkpoint_path = Path(args.checkpoint_path)
    if args.use_checkpoint:
        _resume(trainer, folder, checkpoint_path)
    begin(args, task, trainer, entries, folder)
    _announce(args, task, len(entries), folder)
    try:
        with resumable(lambda: _saved(folder)):
            trainer.fit(folder, checkpoint_path)
            results = finish(args, task, trainer, folder)
    except Stopped:
        return _say_stopped(folder)
    except KeyboardInterrupt:
        # While the weights were tested. Of several processes, the others must be told.
        if rank_info().world_size > 1:
            raise
        return _say_stopped(folder)
    if is_main():
        print(metrics_table(results, _published(args, task)))
        print(f"\nfinal model   {args.model_path}")
        print(f"run folder    {folder}: {PAGE}, scores.png, training.png, {METRICS}, tensorboard/")
    return 0


def _saved(folder: Path) -> str:
    """What there is of a run, and how it is taken up."""
    for path in states_in(folder):
        with contextlib.suppress(Damaged):
            step = read_checkpoint(path, "checkpoint")["progress"]["step"]
            return f"the state of step {step} is in {path}; start again with --use-checkpoint --output-dir {folder}"
    return "nothing is saved yet; start again"


def _train_seeds(args: argparse.Namespace, task: Task) -> int:
    """Train one seed after another, each into a folder of its own, and summarise their metrics."""
    for path in filter(None, (args.model_path, args.metrics_json)):
        check_writable(path)
    with contextlib.ExitStack() as held:
        return _train_seeds_in(_take_folder(args, task, held), args, task)


def _train_seeds_in(folder: Path, args: argparse.Namespace, task: Task) -> int:
    _announce(args, task, len(task.entries), folder)
    try:
        for seed in args.seeds:
            _train_seed(_options_of(args, seed, folder), task)
    except (Stopped, KeyboardInterrupt):
        return _say_stopped(folder)
    summary = conclude_seeds(args, folder, task.dataset, task.sources)
    if args.metrics_json:
        write_json(args.metrics_json, summary)
    link_or_copy(seed_folder(folder, summary["model_seed"]) / BEST, Path(args.model_path))
    print(seeds_table(summary, _published(args, task)))
    print(
        f"\nfinal model   {args.model_path}: that of seed {summary['model_seed']}, the median by {summary['model_by']}"
    )
    print(f"run folder    {folder}: {PAGE}, {METRICS}, and the run of each seed in a folder of its own")
    return 0


def conclude_seeds(args: argparse.Namespace, folder: Path, dataset: Dataset, sources: Sources) -> dict[str, Any]:
    """Write what the trainings of several seeds in a folder have in common, and its page; returns ``metrics.json``."""
    summary = summarise_seeds(folder, args.seeds, args.select)
    record_run(folder, record(args), environment(pick_device(args.device)), sources)
    record_dataset(folder, dataset)
    write_json(folder / METRICS, summary)
    write_report(folder)
    return summary


def _options_of(args: argparse.Namespace, seed: int, folder: Path) -> argparse.Namespace:
    """One seed's options, as if it were trained alone in its part of the folder."""
    own = seed_folder(folder, seed)
    changed: dict[str, Any] = {"seed": seed, "seeds": None, "metrics_json": None}
    changed |= {"output_dir": str(own), "model_path": str(own / BEST)}
    return argparse.Namespace(**{**vars(args), **changed})


def _train_seed(args: argparse.Namespace, task: Task) -> None:
    """Train and test one seed, unless that has been done already."""
    folder = Path(args.output_dir)
    trainer, entries = make_trainer(args, task)
    trainer.label = f"seed {args.seed}, "
    if args.use_checkpoint:
        _resume(trainer, folder)
        if _is_finished(trainer, folder):
            print(f"seed {args.seed} is finished already")
            return
    begin(args, task, trainer, entries, folder)
    trainer.fit(folder)
    finish(args, task, trainer, folder)


def _is_finished(trainer: Trainer, folder: Path) -> bool:
    """Whether nothing is left to train, and all that follows training has been written since."""
    paths = [folder / name for name in (LAST, METRICS, RUN_SCORES, PAGE)]
    if trainer.progress.epoch < trainer.schedule.max_epoch or not all(map(Path.is_file, paths)):
        return False
    return all(path.stat().st_mtime_ns >= paths[0].stat().st_mtime_ns for path in paths)


def _announce(args: argparse.Namespace, task: Task, rows: int, folder: Path) -> None:
    videos = len(task.test_set.entries)
    print(f"{args.method} on {task.dataset.title}: {rows} training rows, {videos} test videos, {task.device}")
    print(f"run folder: {folder}")


def _say_stopped(folder: Path) -> int:
    print(f"stopped; to go on, repeat the command with --use-checkpoint --output-dir {folder}")
    return EXIT_INTERRUPTED


def _resume(trainer: Trainer, folder: Path, checkpoint_path: Path | None = None) -> None:
    """Continue from the run folder's newest good state, else from ``--checkpoint-path``, else from the start."""
    found, damaged = states_in(folder), []
    if not found and checkpoint_path and checkpoint_path.is_file():
        if (run := run_of(checkpoint_path)) not in (None, str(folder.resolve())):
            warn(f"{checkpoint_path} is the state of the run {run}, to be continued with --output-dir; not used here")
            return
        found = [checkpoint_path]
    for path in found:
        try:
            trainer.resume(path)
        except Damaged as error:
            damaged.append(error)
            continue
        for reason in damaged:
            warn(f"{reason}; going on from the state before, {path}")
        print(f"resuming from {path} at epoch {trainer.progress.epoch + 1}, step {trainer.progress.step}")
        return
    if damaged:
        raise UserError(f"{' and '.join(map(str, damaged))}; start anew with --overwrite in place of --use-checkpoint")
    places = dict.fromkeys(map(str, filter(None, (folder / LAST, checkpoint_path))))
    warn(f"nothing to resume: no {' and no '.join(places)}; starting anew")


def _published(args: argparse.Namespace, task: Task) -> dict[str, float]:
    """The paper's figures; none beside made-up data."""
    return {} if args.demo else published(args.method, task.dataset.name, args.protocol)
