"""Train a method on a dataset."""

from __future__ import annotations

import argparse
import threading
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from clipfusionvad.commands.prepare import find_option_file
from clipfusionvad.commands.task import Task, begin, finish, make_trainer, read_task
from clipfusionvad.datasets import Dataset
from clipfusionvad.demo import make_demo
from clipfusionvad.engine.checkpoint import run_of
from clipfusionvad.engine.device import GRAPH_MODES
from clipfusionvad.engine.distributed import join
from clipfusionvad.engine.seeds import Lane, Member, fit_together, share_frozen
from clipfusionvad.engine.trainer import Stopped, Trainer
from clipfusionvad.errors import EXIT_INTERRUPTED, UserError, warn
from clipfusionvad.files import check_writable, link_or_copy, read_torch, write_json
from clipfusionvad.options import record
from clipfusionvad.origin import environment
from clipfusionvad.report.run_folder import RUN_SCORES
from clipfusionvad.report.run_page import PAGE, write_report
from clipfusionvad.report.seeds import seeds_table, summarise_seeds
from clipfusionvad.report.table import metrics_table, published
from clipfusionvad.runs import (
    BEST,
    LAST,
    METRICS,
    choose_folder,
    choose_seeds_folder,
    clear_run,
    record_dataset,
    record_run,
    seed_folder,
)


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("train", argv)
    return train(option_file.parse_args(rest), option_file.DATASET)


def train(args: argparse.Namespace, dataset: Dataset) -> int:
    """Run one training, or one for each of ``--seeds``, from checked options; returns the exit code."""
    with join(args.device, args.deterministic) as (team, device):
        if args.seeds and team.size > 1:
            raise UserError("--seeds trains all seeds in one process: start it without torchrun")
        # One process reads all files.
        args.check = args.check and team.is_main
        if args.demo:
            with team.in_turn():
                make_demo(dataset)
        task = read_task(args, dataset, team, device)
        return _train_seeds(args, task) if args.seeds else _train_one(args, task)


def _train_one(args: argparse.Namespace, task: Task) -> int:
    team = task.team
    trainer, entries = make_trainer(args, task)
    for path in filter(None, (args.model_path, args.checkpoint_path, args.metrics_json)):
        check_writable(path)
    stem = f"{task.dataset.name}_{args.method}"
    folder = team.tell(lambda: choose_folder(args.output_dir, stem, args.use_checkpoint, args.overwrite))
    checkpoint_path = Path(args.checkpoint_path)
    check_writable(folder / LAST)
    if args.use_checkpoint:
        _resume(trainer, folder, checkpoint_path)
    begin(args, task, trainer, entries, folder)
    _announce(args, task, len(entries), folder)
    try:
        with team.resumable(lambda: _saved(folder)):
            trainer.fit(folder, checkpoint_path)
            results = finish(args, task, trainer, folder)
    except Stopped:
        return _say_stopped(folder)
    if team.is_main:
        print(metrics_table(results, _published(args, task)))
        print(f"\nfinal model   {args.model_path}")
        print(f"run folder    {folder}: {PAGE}, scores.png, training.png, {METRICS}, tensorboard/")
    return 0


def _saved(folder: Path) -> str:
    """What there is of a run, and how it is taken up."""
    if not (folder / LAST).is_file():
        return "nothing is saved yet; start again"
    step = read_torch(folder / LAST, "checkpoint")["progress"]["step"]
    return f"the state of step {step} is in {folder / LAST}; start again with --use-checkpoint --output-dir {folder}"


def _train_seeds(args: argparse.Namespace, task: Task) -> int:
    """Train every seed into a folder of its own, side by side, and report what they have in common."""
    stem = f"{task.dataset.name}_{args.method}_seeds"
    folder = choose_seeds_folder(args.output_dir, stem, args.use_checkpoint, args.overwrite, args.seeds)
    for path in filter(None, (args.model_path, args.metrics_json, folder / METRICS)):
        check_writable(path)
    _announce(args, task, len(task.entries), folder)
    stop = threading.Event()
    frozen: dict[str, Tensor] = {}
    made = (_make_member(_options_of(args, seed, folder), task, stop, frozen) for seed in args.seeds)
    try:
        fit_together(filter(None, made), len(args.seeds), stop, task.device)
    except Stopped:
        return _say_stopped(folder)
    summary = summarise_seeds(folder, args.seeds, args.select)
    record_run(folder, record(args), environment(task.device), task.sources)
    record_dataset(folder, task.dataset)
    for path in filter(None, (folder / METRICS, args.metrics_json)):
        write_json(path, summary)
    link_or_copy(seed_folder(folder, summary["model_seed"]) / BEST, Path(args.model_path))
    page = write_report(folder)
    print(seeds_table(summary, _published(args, task)))
    print(
        f"\nfinal model   {args.model_path}: that of seed {summary['model_seed']}, the median by {summary['model_by']}"
    )
    print(f"run folder    {folder}: {page.name}, {METRICS}, and the run of each seed in a folder of its own")
    return 0


def _options_of(args: argparse.Namespace, seed: int, folder: Path) -> argparse.Namespace:
    """One seed's options, as if it were trained alone in its part of the folder."""
    own = seed_folder(folder, seed)
    changed: dict[str, Any] = {"seed": seed, "seeds": None, "metrics_json": None}
    changed |= {"output_dir": str(own), "model_path": str(own / BEST)}
    return argparse.Namespace(**{**vars(args), **changed})


def _make_member(
    args: argparse.Namespace, task: Task, stop: threading.Event, frozen: dict[str, Tensor]
) -> Member | None:
    """The training of one seed; None where it is finished already."""
    folder, lane = Path(args.output_dir), Lane(task.device, own_stream=args.compile not in GRAPH_MODES)
    with lane.taken():
        trainer, entries = make_trainer(args, task)
        trainer.stop, trainer.label = stop, f"seed {args.seed}, "
        if args.use_checkpoint:
            _resume(trainer, folder, folder / LAST)
            if _is_finished(trainer, folder):
                print(f"seed {args.seed} is finished already")
                return None
        else:
            clear_run(folder)
        share_frozen(trainer.model, frozen)
        begin(args, task, trainer, entries, folder)
    return Member(trainer, folder, lane, partial(finish, args, task, trainer, folder))


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


def _resume(trainer: Trainer, folder: Path, checkpoint_path: Path) -> None:
    """Continue from the run folder's state, else from ``--checkpoint-path``, else from the start."""
    path = folder / LAST
    if not path.is_file():
        path = checkpoint_path
        if path.is_file() and (run := run_of(path)) not in (None, str(folder.resolve())):
            warn(f"{path} is the state of the run {run}, to be continued with --output-dir; not used here")
            return
    if not path.is_file():
        places = dict.fromkeys(map(str, (folder / LAST, checkpoint_path)))
        warn(f"nothing to resume: no {' and no '.join(places)}; starting anew")
        return
    trainer.resume(path)
    print(f"resuming from {path} at epoch {trainer.progress.epoch + 1}, step {trainer.progress.step}")


def _published(args: argparse.Namespace, task: Task) -> dict[str, float]:
    """The paper's figures; none beside made-up data."""
    return {} if args.demo else published(args.method, task.dataset.name, args.protocol)
