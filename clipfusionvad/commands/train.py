"""Train a method on a dataset."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipfusionvad.commands.prepare import calibrate, find_option_file, prepare_model, prepare_test_set, read_entries
from clipfusionvad.data.checks import check_features, check_overlap
from clipfusionvad.data.holdout import split_holdout
from clipfusionvad.data.loaders import Bags, make_plan
from clipfusionvad.datasets import Dataset
from clipfusionvad.demo import make_demo
from clipfusionvad.engine.checkpoint import calibration_content, describe, model_content, own_state, run_of
from clipfusionvad.engine.distributed import Team, join
from clipfusionvad.engine.evaluator import VideoSet, evaluate, evaluate_classes, evaluate_videos, score_together
from clipfusionvad.engine.schedule import Schedule
from clipfusionvad.engine.trainer import Stopped, Trainer
from clipfusionvad.errors import EXIT_INTERRUPTED, warn
from clipfusionvad.files import check_writable, read_torch, without_nan, write_json, write_torch
from clipfusionvad.models import Method
from clipfusionvad.options import record
from clipfusionvad.report.plots import draw_score_curves, draw_training
from clipfusionvad.report.run_folder import RUN_SCORES
from clipfusionvad.report.run_page import write_report
from clipfusionvad.report.scores import save_scores
from clipfusionvad.report.table import metrics_table, published
from clipfusionvad.runs import BEST, CALIBRATION, LAST, choose_folder, record_run


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("train", argv)
    return train(option_file.parse_args(rest), option_file.DATASET)


def train(args: argparse.Namespace, dataset: Dataset) -> int:
    """Run one training from checked options; returns the exit code."""
    with join(args.device) as (team, device):
        return _train(args, dataset, team, device)


def _train(args: argparse.Namespace, dataset: Dataset, team: Team, device: torch.device) -> int:
    # One process reads all files.
    args.check = args.check and team.is_main
    if args.demo:
        with team.in_turn():
            make_demo(dataset)
    entries = read_entries(args, args.train_list, dataset)
    check_features(entries, args.visual_width, args.train_list, read=args.check)
    test_set = prepare_test_set(args, dataset)
    check_overlap(entries, test_set.entries)
    with team.in_turn():
        model, clip = prepare_model(args, dataset)
    bags = Bags(entries, dataset, model.sampling, args.visual_width, args.seed)
    rows = np.arange(len(entries))
    selection_set, judge = test_set, partial(evaluate, protocol=args.protocol)
    if args.protocol == "clean":
        rows, held_out = split_holdout(entries, bags.targets[:, 0] > 0, args.holdout, args.seed)
        selection_set = VideoSet([entries[row] for row in held_out], dataset, args.visual_width)
        judge = evaluate_videos
    plan = make_plan(bags.targets, rows, args.batch_size, args.balanced, args.seed, args.cycle)

    def score(model: Method) -> dict[str, Any]:
        scores = score_together(team, model, selection_set, device, args.precision)
        return team.tell(lambda: judge(scores, selection_set))

    made = describe(model, clip, dataset, vars(args))
    trainer = Trainer(model, bags, plan, _schedule(args), score, made, device, args.precision, args.workers, team)
    for path in filter(None, (args.model_path, args.checkpoint_path, args.metrics_json)):
        check_writable(path)
    stem = f"{dataset.name}_{args.method}"
    folder = team.tell(lambda: choose_folder(args.output_dir, stem, args.use_checkpoint, args.overwrite))
    checkpoint_path = Path(args.checkpoint_path)
    check_writable(folder / LAST)
    if args.use_checkpoint:
        _resume(trainer, folder, checkpoint_path)
    team.wait()
    if team.is_main:
        calibrate(model, args, [entries[row] for row in rows], dataset)
        if model.calibration:
            write_torch(folder / CALIBRATION, calibration_content(model))
        record_run(folder, record(args))
    team.spread(model)
    print(f"{args.method} on {dataset.title}: {len(rows)} training rows, {len(test_set.entries)} test videos, {device}")
    print(f"run folder: {folder}")
    try:
        with team.resumable(lambda: _saved(folder)):
            trainer.fit(folder, checkpoint_path)
            _finish(args, dataset, trainer, test_set, folder)
    except Stopped:
        print(f"stopped; to go on, repeat the command with --use-checkpoint --output-dir {folder}")
        return EXIT_INTERRUPTED
    return 0


def _saved(folder: Path) -> str:
    """What there is of a run, and how it is taken up."""
    if not (folder / LAST).is_file():
        return "nothing is saved yet; start again"
    step = read_torch(folder / LAST, "checkpoint")["progress"]["step"]
    return f"the state of step {step} is in {folder / LAST}; start again with --use-checkpoint --output-dir {folder}"


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
        warn(f"nothing to resume: neither {folder / LAST} nor {checkpoint_path} exists; starting anew")
        return
    trainer.resume(path)
    print(f"resuming from {path} at epoch {trainer.progress.epoch + 1}, step {trainer.progress.step}")


def _finish(args: argparse.Namespace, dataset: Dataset, trainer: Trainer, test_set: VideoSet, folder: Path) -> None:
    """Test the last and the best weights, write the final model and say where everything is."""
    best_state = trainer.best_state or trainer.last_state
    results = {}
    states = {"last": trainer.last_state, "best": best_state}
    if args.demo:
        # What the numbers would be by chance, for a reader who does not know this data.
        untrained = own_state(prepare_model(args, dataset)[0]) | calibration_content(trainer.model)
        states = {"untrained": untrained, **states}
    for name, state in states.items():
        trainer.model.load_state_dict(state, strict=False)
        scores = score_together(trainer.team, trainer.model, test_set, trainer.device, args.precision)
        if scores is not None:
            results[name] = evaluate(scores, test_set, args.protocol) | evaluate_classes(scores, test_set)
    if not trainer.team.is_main:
        return
    final = model_content(
        trainer.made, best_state, step=trainer.progress.best_step, metrics=without_nan(results["best"])
    )
    write_torch(folder / BEST, final)
    write_torch(args.model_path, final)
    write_json(folder / "metrics.json", results)
    if args.metrics_json:
        write_json(args.metrics_json, results["best"])
    draw_score_curves(folder / "scores.png", scores, test_set)
    draw_training(folder / "training.png", folder)
    save_scores(folder / RUN_SCORES, scores, test_set, record(args))
    page = write_report(folder)
    print(metrics_table(results, {} if args.demo else published(args.method, dataset.name, args.protocol)))
    print(f"\nfinal model   {args.model_path}")
    print(f"run folder    {folder}: {page.name}, scores.png, training.png, metrics.json, tensorboard/")
