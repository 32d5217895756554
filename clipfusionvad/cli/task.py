"""A training in the making: what trainings of several seeds share, and what each of them does before and after."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipfusionvad.cli.options import record
from clipfusionvad.cli.prepare import (
    about,
    check_list,
    find_normal_centroid,
    open_list,
    prepare_model,
    prepare_test_set,
)
from clipfusionvad.data.checks import check_overlap
from clipfusionvad.data.holdout import split_holdout
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.loaders import BagDataset, make_batch_sampler
from clipfusionvad.data.packed.batches import PackedBatches, make_packed_batches
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.checkpoint import centroid_content, make_hparams, model_content, state_without_clip
from clipfusionvad.engine.device import compile_model, pick_workers
from clipfusionvad.engine.distributed import barrier, local_main_first
from clipfusionvad.engine.evaluator import VideoDataset, evaluate, evaluate_classes, evaluate_videos, score_dataset
from clipfusionvad.engine.optim import Schedule
from clipfusionvad.engine.run_folder import BEST, METRICS, NORMAL_CENTROID, clear_run, record_dataset, record_run
from clipfusionvad.engine.trainer import Trainer
from clipfusionvad.io.files import without_nan, write_json, write_torch
from clipfusionvad.io.provenance import Sources
from clipfusionvad.io.rank import is_main
from clipfusionvad.models import Method, find_method
from clipfusionvad.models.clip import ClipWeights
from clipfusionvad.report.plots import draw_score_curves, draw_training
from clipfusionvad.report.results import RUN_SCORES
from clipfusionvad.report.run_page import write_report
from clipfusionvad.report.scores import save_scores

#: Options that name files which a training reads beside features.
TRAINED_FROM = ("train_list", "test_list", "gt_path", "gt_segment_path", "gt_label_path", "clip", "normal_centroid")


@dataclass
class Task:
    """What the trainings of all seeds share, read and checked once.

    ``from_store`` says whether the training features are packed, ``packed`` gathers batches from their store.
    ``sources`` are all files that were read. ``clip``, the text tower alone, comes with the first model.
    """

    dataset: Dataset
    device: torch.device
    entries: list[Entry]
    test_set: VideoDataset
    from_store: bool
    packed: PackedBatches | None
    sources: Sources
    clip: ClipWeights | None = None


def read_task(args: argparse.Namespace, dataset: Dataset, device: torch.device) -> Task:
    """Read and check the lists, features and truth that the options name."""
    sources = Sources()
    entries, store = open_list(args, args.train_list, dataset, training=True)
    check_list(args, args.train_list, "training features", entries, store, sources)
    test_set = prepare_test_set(args, dataset, sources)
    sources.add_options(vars(args), TRAINED_FROM)
    check_overlap(entries, test_set.entries)
    packed = make_packed_batches(store, find_method(args.method).sampling_of(vars(args)), device)
    return Task(dataset, device, entries, test_set, store is not None, packed, sources)


def make_trainer(args: argparse.Namespace, task: Task) -> tuple[Trainer, list[Entry]]:
    """The training that the options make_hparams, and the entries that it trains on."""
    dataset, entries, device = task.dataset, task.entries, task.device
    with local_main_first():
        model, clip = prepare_model(args, dataset, clip=task.clip)
    task.clip = clip and clip.text_tower
    compile_model(model, args.compile)
    bags = BagDataset(entries, dataset, model.sampling, args.visual_width, args.seed, task.packed)
    rows = np.arange(len(entries))
    selection_set = task.test_set
    judge: Callable[..., dict[str, Any]] = partial(evaluate, protocol=args.protocol)
    if args.protocol == "clean":
        rows, held_out = split_holdout(entries, bags.targets[:, 0] > 0, args.holdout, args.seed)
        selection_set = VideoDataset([entries[row] for row in held_out], dataset, args.visual_width)
        if task.from_store and selection_set.entries[0].packed is None:
            check_list(args, args.train_list, "held-out features", selection_set.entries, None, task.sources)
        judge = evaluate_videos
    plan = make_batch_sampler(bags.targets, rows, args.batch_size, args.balanced, args.seed, args.cycle)

    def score(model: Method) -> dict[str, Any]:
        return judge(score_dataset(model, selection_set, device, args.precision), selection_set)

    workers = pick_workers(args.workers, device)
    hparams = make_hparams(model, clip, dataset, vars(args))
    trainer = Trainer(model, bags, plan, _schedule(args), score, hparams, device, args.precision, workers)
    trainer.trackers = args.track or ()
    return trainer, [entries[row] for row in rows]


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


def begin(args: argparse.Namespace, task: Task, trainer: Trainer, entries: list[Entry], folder: Path) -> None:
    """What comes between making a training, or resuming it, and its first step."""
    # Nothing is written before every process has looked for a state to resume.
    barrier()
    if is_main():
        find_normal_centroid(trainer.model, args, entries, task.dataset)
        if not args.use_checkpoint:
            clear_run(folder)
        if trainer.model.centroid_buffers:
            write_torch(folder / NORMAL_CENTROID, centroid_content(trainer.model))
        record_run(folder, record(args), about(trainer.hparams, task.device), task.sources)
        record_dataset(folder, task.dataset)


def finish(args: argparse.Namespace, task: Task, trainer: Trainer, folder: Path) -> dict[str, dict[str, Any]]:
    """Test the last and the best weights, write the final model and all that the folder keeps; the metrics.

    Of several processes only rank 0 writes.
    """
    last_state, best_state = trainer.final_states
    results = {}
    states = {"last": last_state, "best": best_state}
    if args.demo:
        # What the numbers would be by chance, for a reader who does not know this data.
        untrained = state_without_clip(prepare_model(args, task.dataset, clip=task.clip)[0]) | centroid_content(
            trainer.model
        )
        states = {"untrained": untrained, **states}
    for name, state in states.items():
        trainer.model.load_state_dict(state, strict=False)
        scores = score_dataset(trainer.model, task.test_set, trainer.device, args.precision)
        results[name] = evaluate(scores, task.test_set, args.protocol) | evaluate_classes(scores, task.test_set)
    if not is_main():
        return results
    final = model_content(
        trainer.hparams, best_state, step=trainer.progress.best_step, metrics=without_nan(results["best"])
    )
    for path in (folder / BEST, Path(args.model_path)):
        write_torch(path, final)
    write_json(folder / METRICS, results)
    if args.metrics_json:
        write_json(args.metrics_json, results["best"])
    draw_score_curves(folder / "scores.png", scores, task.test_set)
    draw_training(folder / "training.png", folder)
    save_scores(folder / RUN_SCORES, scores, task.test_set, record(args), about(trainer.hparams, task.device))
    write_report(folder)
    return results
