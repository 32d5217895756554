"""Reads the data of a training and builds its trainer; writes what surrounds the training steps into the run folder."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipfusionvad.data.lists import Entry, check_overlap, split_holdout
from clipfusionvad.data.loaders import (
    BagDataset,
    BalancedBatchSampler,
    BatchSampler,
    PackedBatches,
    ShuffledBatchSampler,
    make_packed_batches,
)
from clipfusionvad.engine.checkpoint import centroid_content, make_hparams, model_content, state_without_clip
from clipfusionvad.engine.config import Settings, TrainingConfig
from clipfusionvad.engine.data_setup import check_list, open_list, read_test_set
from clipfusionvad.engine.device import compile_model, pick_workers
from clipfusionvad.engine.distributed import barrier, local_main_first
from clipfusionvad.engine.evaluator import (
    VideoDataset,
    VideoScores,
    evaluate,
    evaluate_classes,
    evaluate_videos,
    score_dataset,
)
from clipfusionvad.engine.model_setup import build_model, find_normal_centroid, result_environment
from clipfusionvad.engine.optim import Schedule
from clipfusionvad.engine.run_folder import BEST, METRICS, NORMAL_CENTROID, clear_run, record_dataset, record_run
from clipfusionvad.engine.trainer import Trainer
from clipfusionvad.io.files import without_nan, write_json, write_torch
from clipfusionvad.io.provenance import Sources
from clipfusionvad.io.rank import is_main
from clipfusionvad.models import Method, find_method
from clipfusionvad.models.clip import ClipWeights

#: Options that name files which a training reads beside features.
FILE_OPTIONS = ("train_list", "test_list", "gt_path", "gt_segment_path", "gt_label_path", "clip", "normal_centroid")


@dataclass
class TrainingData:
    """What the trainings of several seeds share, read and checked once.

    ``from_store`` says whether the training features are packed, ``packed`` gathers batches from their store.
    ``sources`` are all files that were read. ``clip``, only the text tower, comes with the first model.
    """

    device: torch.device
    entries: list[Entry]
    test_set: VideoDataset
    from_store: bool
    packed: PackedBatches | None
    sources: Sources
    clip: ClipWeights | None = None


def read_training_data(settings: Settings, device: torch.device) -> TrainingData:
    """Read and check the lists, features and truth that the options name."""
    dataset, model, data, sources = settings.dataset, settings.model, settings.data, Sources()
    entries, store = open_list(data.train_list, dataset, model, data, training=True)
    check_list(data.train_list, entries, store, model.visual_width, data.check, "training features", sources)
    test_set = read_test_set(dataset, model, data, sources)
    sources.add_options(settings.options(), FILE_OPTIONS)
    check_overlap(entries, test_set.entries)
    packed = make_packed_batches(store, find_method(model.method).sampling_of(model.options), device)
    return TrainingData(device, entries, test_set, store is not None, packed, sources)


def build_trainer(settings: Settings, data: TrainingData) -> tuple[Trainer, list[Entry]]:
    """Return the trainer that the options describe, and the entries that it trains on."""
    dataset, training, device = settings.dataset, settings.training, data.device
    width, seed, precision = settings.model.visual_width, training.seed, settings.device.precision
    with local_main_first():
        model, clip = build_model(settings.model, dataset, seed, clip=data.clip)
    data.clip = clip and clip.text_tower
    compile_model(model, settings.device.compile)
    bags = BagDataset(data.entries, dataset, model.sampling, width, seed, data.packed)
    rows = np.arange(len(data.entries))
    selection_set = data.test_set
    judge: Callable[..., dict[str, Any]] = partial(evaluate, protocol=training.protocol)
    if training.protocol == "clean":
        rows, held_out = split_holdout(data.entries, bags.targets[:, 0] > 0, training.holdout, seed)
        selection_set = VideoDataset([data.entries[row] for row in held_out], dataset, width)
        if data.from_store and selection_set.entries[0].packed is None:
            path, read = settings.data.train_list, settings.data.check
            check_list(path, selection_set.entries, None, width, read, "held-out features", data.sources)
        judge = evaluate_videos
    normal, size = bags.targets[rows, 0] > 0, training.batch_size
    plan: BatchSampler = ShuffledBatchSampler(rows, size, seed)
    if training.balanced:
        plan = BalancedBatchSampler(rows[normal], rows[~normal], size, seed, training.cycle)

    def score(model: Method) -> dict[str, Any]:
        return judge(score_dataset(model, selection_set, device, precision), selection_set)

    workers = pick_workers(settings.data.workers, device)
    hparams = make_hparams(model, clip, dataset, settings.options())
    trainer = Trainer(model, bags, plan, _schedule(training), score, hparams, device, precision, workers)
    trainer.trackers = settings.run.track or ()
    return trainer, [data.entries[row] for row in rows]


def _schedule(training: TrainingConfig) -> Schedule:
    return Schedule(
        max_epoch=training.max_epoch,
        lr=training.lr,
        eval_every=training.eval_every,
        select=training.select,
        paper=training.protocol == "paper",
        optimizer=training.optimizer,
        betas=training.betas,
        weight_decay=training.weight_decay,
        lr_schedule=training.lr_schedule,
        milestones=training.scheduler_milestones,
        rate=training.scheduler_rate,
        warmup_epochs=training.warmup_epochs,
    )


def start_run(settings: Settings, data: TrainingData, trainer: Trainer, entries: list[Entry], folder: Path) -> None:
    """Find the normal centroid and write the run's records, before the first step or after resuming."""
    # Nothing is written before every process has looked for a state to resume.
    barrier()
    if not is_main():
        return
    find_normal_centroid(trainer.model, entries, settings.dataset, settings.run.normal_centroid)
    if not settings.run.use_checkpoint:
        clear_run(folder)
    if trainer.model.centroid_buffers:
        write_torch(folder / NORMAL_CENTROID, centroid_content(trainer.model))
    record_run(folder, settings.record(), result_environment(trainer.hparams, data.device), data.sources)
    record_dataset(folder, settings.dataset)


def evaluate_final_weights(
    settings: Settings, data: TrainingData, trainer: Trainer, folder: Path
) -> tuple[dict[str, dict[str, Any]], list[VideoScores]]:
    """Test the last and the best weights; return metrics by name, and the scores of the best. Rank 0 writes both.

    The demo also tests untrained weights, for a reader who does not know what chance would give on its data.
    """
    last_state, best_state = trainer.final_states
    states, results = {"last": last_state, "best": best_state}, {}
    if settings.run.demo:
        untrained = build_model(settings.model, settings.dataset, settings.training.seed, clip=data.clip)[0]
        states = {"untrained": state_without_clip(untrained) | centroid_content(trainer.model), **states}
    for name, state in states.items():
        trainer.model.load_state_dict(state, strict=False)
        scores = score_dataset(trainer.model, data.test_set, trainer.device, settings.device.precision)
        results[name] = evaluate(scores, data.test_set, settings.training.protocol)
        results[name] |= evaluate_classes(scores, data.test_set)
    if is_main():
        step, metrics = trainer.progress.best_step, without_nan(results["best"])
        final = model_content(trainer.hparams, best_state, step=step, metrics=metrics)
        for path in (folder / BEST, Path(settings.run.model_path)):
            write_torch(path, final)
        write_json(folder / METRICS, results)
        if settings.run.metrics_json:
            write_json(settings.run.metrics_json, results["best"])
    return results, scores
