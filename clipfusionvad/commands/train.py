"""Train a method on a dataset."""

from __future__ import annotations

import argparse
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipfusionvad.clip import ClipWeights
from clipfusionvad.commands.prepare import calibrate, find_option_file, prepare_model, prepare_test_set, read_entries
from clipfusionvad.data.checks import check_features, check_overlap
from clipfusionvad.data.holdout import split_holdout
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.loaders import Bags, make_plan
from clipfusionvad.datasets import Dataset
from clipfusionvad.demo import make_demo
from clipfusionvad.engine.checkpoint import calibration_content, describe, model_content, own_state, run_of
from clipfusionvad.engine.device import pick_device
from clipfusionvad.engine.evaluator import VideoSet, evaluate, evaluate_classes, evaluate_videos, score_videos
from clipfusionvad.engine.schedule import Schedule
from clipfusionvad.engine.seeds import Lane, Member, fit_together, share_frozen
from clipfusionvad.engine.trainer import Stopped, Trainer
from clipfusionvad.errors import EXIT_INTERRUPTED, warn
from clipfusionvad.files import check_writable, link_or_copy, without_nan, write_json, write_torch
from clipfusionvad.models import Method
from clipfusionvad.options import record
from clipfusionvad.report.plots import draw_score_curves, draw_training
from clipfusionvad.report.run_folder import RUN_SCORES
from clipfusionvad.report.run_page import PAGE, write_report
from clipfusionvad.report.scores import save_scores
from clipfusionvad.report.seeds import seeds_table, summarise_seeds
from clipfusionvad.report.table import metrics_table, published
from clipfusionvad.runs import (
    BEST,
    CALIBRATION,
    LAST,
    METRICS,
    choose_folder,
    choose_seeds_folder,
    clear_run,
    record_run,
    seed_folder,
)


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("train", argv)
    return train(option_file.parse_args(rest), option_file.DATASET)


@dataclass
class Task:
    """What the trainings of all seeds share, read and checked once; ``clip`` comes with the first model."""

    dataset: Dataset
    device: torch.device
    entries: list[Entry]
    test_set: VideoSet
    clip: ClipWeights | None = None


def train(args: argparse.Namespace, dataset: Dataset) -> int:
    """Run one training, or one for each of ``--seeds``, from checked options; returns the exit code."""
    device = pick_device(args.device)
    if args.demo:
        make_demo(dataset)
    entries = read_entries(args, args.train_list, dataset)
    check_features(entries, args.visual_width, args.train_list, read=args.check)
    test_set = prepare_test_set(args, dataset)
    check_overlap(entries, test_set.entries)
    task = Task(dataset, device, entries, test_set)
    return _train_seeds(args, task) if args.seeds else _train_one(args, task)


def _train_one(args: argparse.Namespace, task: Task) -> int:
    trainer, entries = _make_trainer(args, task)
    for path in filter(None, (args.model_path, args.checkpoint_path, args.metrics_json)):
        check_writable(path)
    folder = choose_folder(args.output_dir, f"{task.dataset.name}_{args.method}", args.use_checkpoint, args.overwrite)
    checkpoint_path = Path(args.checkpoint_path)
    check_writable(folder / LAST)
    if args.use_checkpoint:
        _resume(trainer, folder, checkpoint_path)
    _begin(args, task, trainer, entries, folder)
    _announce(args, task, len(entries), folder)
    try:
        trainer.fit(folder, checkpoint_path)
    except Stopped:
        return _say_stopped(folder)
    results = _finish(args, task, trainer, folder)
    print(metrics_table(results, _published(args, task)))
    print(f"\nfinal model   {args.model_path}")
    print(f"run folder    {folder}: {PAGE}, scores.png, training.png, {METRICS}, tensorboard/")
    return 0


def _train_seeds(args: argparse.Namespace, task: Task) -> int:
    """Train every seed into a folder of its own, side by side, and report what they have in common."""
    stem = f"{task.dataset.name}_{args.method}_seeds"
    folder = choose_seeds_folder(args.output_dir, stem, args.use_checkpoint, args.overwrite, args.seeds)
    for path in filter(None, (args.model_path, args.metrics_json, folder / METRICS)):
        check_writable(path)
    _announce(args, task, len(task.entries), folder)
    stop, frozen = threading.Event(), {}
    made = (_make_member(_options_of(args, seed, folder), task, stop, frozen) for seed in args.seeds)
    try:
        fit_together(filter(None, made), len(args.seeds), stop, task.device)
    except Stopped:
        return _say_stopped(folder)
    summary = summarise_seeds(folder, args.seeds, args.select)
    record_run(folder, record(args))
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
    changed = {"seed": seed, "seeds": None, "metrics_json": None}
    changed |= {"output_dir": str(own), "model_path": str(own / BEST)}
    return argparse.Namespace(**{**vars(args), **changed})


def _make_member(
    args: argparse.Namespace, task: Task, stop: threading.Event, frozen: dict[str, Tensor]
) -> Member | None:
    """The training of one seed; None where it is finished already."""
    folder, lane = Path(args.output_dir), Lane(task.device)
    with lane.taken():
        trainer, entries = _make_trainer(args, task)
        trainer.stop, trainer.label = stop, f"seed {args.seed}, "
        if args.use_checkpoint:
            _resume(trainer, folder, folder / LAST)
            if _is_finished(trainer, folder):
                print(f"seed {args.seed} is finished already")
                return None
        else:
            clear_run(folder)
        share_frozen(trainer.model, frozen)
        _begin(args, task, trainer, entries, folder)
    return Member(trainer, folder, lane, partial(_finish, args, task, trainer, folder))


def _is_finished(trainer: Trainer, folder: Path) -> bool:
    """Whether nothing is left to train, and all that follows training has been written since."""
    paths = [folder / name for name in (LAST, METRICS, RUN_SCORES, PAGE)]
    if trainer.progress.epoch < trainer.schedule.max_epoch or not all(map(Path.is_file, paths)):
        return False
    return all(path.stat().st_mtime_ns >= paths[0].stat().st_mtime_ns for path in paths)


def _make_trainer(args: argparse.Namespace, task: Task) -> tuple[Trainer, list[Entry]]:
    """The training that the options describe, and the entries that it trains on."""
    dataset, entries, test_set = task.dataset, task.entries, task.test_set
    model, task.clip = prepare_model(args, dataset, clip=task.clip)
    bags = Bags(entries, dataset, model.sampling, args.visual_width, args.seed)
    rows = np.arange(len(entries))
    selection_set, judge = test_set, partial(evaluate, protocol=args.protocol)
    if args.protocol == "clean":
        rows, held_out = split_holdout(entries, bags.targets[:, 0] > 0, args.holdout, args.seed)
        selection_set = VideoSet([entries[row] for row in held_out], dataset, args.visual_width)
        judge = evaluate_videos
    plan = make_plan(bags.targets, rows, args.batch_size, args.balanced, args.seed, args.cycle)

    def score(model: Method) -> dict[str, Any]:
        return judge(score_videos(model, selection_set.features, task.device, args.precision), selection_set)

    made = describe(model, task.clip, dataset, vars(args))
    trainer = Trainer(model, bags, plan, _schedule(args), score, made, task.device, args.precision, args.workers)
    return trainer, [entries[row] for row in rows]


def _begin(args: argparse.Namespace, task: Task, trainer: Trainer, entries: list[Entry], folder: Path) -> None:
    """What comes between making a training, or resuming it, and its first step."""
    calibrate(trainer.model, args, entries, task.dataset)
    if trainer.model.calibration:
        write_torch(folder / CALIBRATION, calibration_content(trainer.model))
    record_run(folder, record(args))


def _announce(args: argparse.Namespace, task: Task, rows: int, folder: Path) -> None:
    videos = len(task.test_set.entries)
    print(f"{args.method} on {task.dataset.title}: {rows} training rows, {videos} test videos, {task.device}")
    print(f"run folder: {folder}")


def _say_stopped(folder: Path) -> int:
    print(f"stopped; to go on, repeat the command with --use-checkpoint --output-dir {folder}")
    return EXIT_INTERRUPTED


def _schedule(args: argparse.Namespace) -> Schedule:
    return Schedule(
        max_epoch=args.max_epoch,
        lr=args.lr,
        eval_every=args.eval_every,
        select=args.select,
        paper=args.protocol == "paper",
        optimizer=args.optimizer,
        betas=tuple(args.betas),
        weight_decay=args.weight_decay,
        lr_schedule=args.lr_schedule,
        milestones=tuple(args.scheduler_milestones),
        rate=args.scheduler_rate,
        warmup_epochs=args.warmup_epochs,
    )


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


def _finish(args: argparse.Namespace, task: Task, trainer: Trainer, folder: Path) -> dict[str, dict[str, Any]]:
    """Test the last and the best weights, write the final model and all that the folder keeps; the metrics."""
    best_state = trainer.best_state or trainer.last_state
    results = {}
    states = {"last": trainer.last_state, "best": best_state}
    if args.demo:
        # What the numbers would be by chance, for a reader who does not know this data.
        untrained = own_state(prepare_model(args, task.dataset, clip=task.clip)[0]) | calibration_content(trainer.model)
        states = {"untrained": untrained, **states}
    for name, state in states.items():
        trainer.model.load_state_dict(state, strict=False)
        scores = score_videos(trainer.model, task.test_set.features, trainer.device, args.precision)
        results[name] = evaluate(scores, task.test_set, args.protocol) | evaluate_classes(scores, task.test_set)
    final = model_content(
        trainer.made, best_state, step=trainer.progress.best_step, metrics=without_nan(results["best"])
    )
    for path in (folder / BEST, Path(args.model_path)):
        write_torch(path, final)
    write_json(folder / METRICS, results)
    if args.metrics_json:
        write_json(args.metrics_json, results["best"])
    draw_score_curves(folder / "scores.png", scores, task.test_set)
    draw_training(folder / "training.png", folder)
    save_scores(folder / RUN_SCORES, scores, task.test_set, record(args))
    write_report(folder)
    return results


def _published(args: argparse.Namespace, task: Task) -> dict[str, float]:
    """The paper's figures; none beside made-up data."""
    return {} if args.demo else published(args.method, task.dataset.name, args.protocol)
