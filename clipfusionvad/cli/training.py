"""Run a training from its settings: set-up, resuming, the trainer, the test of the final weights, the report.

Separate from the command, whose --help must not wait for the imports of this file.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipfusionvad.data.lists import Entry, check_overlap, split_holdout
from clipfusionvad.data.loaders import BagDataset, BalancedBatchSampler, PackedBatches, ShuffledBatchSampler
from clipfusionvad.engine import run_folder, setup
from clipfusionvad.engine.checkpoint import (
    centroid_content,
    check_replaceable,
    copy_buffers,
    is_ours,
    make_hparams,
    model_content,
    model_file_in,
    read_model_file,
    state_without_clip,
)
from clipfusionvad.engine.config import AUTO, LAST_WEIGHTS, Settings
from clipfusionvad.engine.device import compile_model, count_cores, deterministic, pick_device
from clipfusionvad.engine.distributed import (
    barrier,
    distributed_context,
    exit_if_lost,
    gather_objects,
    local_main_first,
)
from clipfusionvad.engine.evaluator import (
    VideoDataset,
    choose_smoothing,
    evaluate,
    evaluate_classes,
    evaluate_videos,
    score_dataset,
    smooth_videos,
    with_reasons,
)
from clipfusionvad.engine.run_folder import BEST, LAST, METRICS, NORMAL_CENTROID, seed_folder, states_in
from clipfusionvad.engine.trainer import Stopped, Trainer
from clipfusionvad.io import files
from clipfusionvad.io.errors import EXIT_INTERRUPTED, UserError, warn
from clipfusionvad.io.foreign_checkpoints import Damaged, read_checkpoint
from clipfusionvad.io.provenance import Sources, environment
from clipfusionvad.io.rank import is_main, rank_info
from clipfusionvad.models import Method, find_method
from clipfusionvad.models.clip import ClipWeights
from clipfusionvad.report import PAGE
from clipfusionvad.report.page import write_report
from clipfusionvad.report.plots import draw_score_curves, draw_training
from clipfusionvad.report.results import RUN_SCORES, seeds_table, summarise_seeds
from clipfusionvad.report.scores import save_scores
from clipfusionvad.report.table import metrics_table, published_beside

#: Options that name files which a training reads beside features.
FILE_OPTIONS = ("train_list", "test_list", "gt_path", "gt_segment_path", "gt_label_path", "clip", "normal_centroid")


@dataclass
class TrainingData:
    """What the trainings of several seeds share, read and checked once.

    ``from_store`` says whether the training features are packed, ``packed`` gathers batches from their store.
    ``sources`` are all files that were read; ``parts`` is that of ``make_hparams``. ``clip``, only the text tower,
    comes with the first model.
    """

    device: torch.device
    entries: list[Entry]
    test_set: VideoDataset
    from_store: bool
    packed: PackedBatches | None
    sources: Sources
    parts: int | None
    clip: ClipWeights | None = None


def run_training(settings: Settings, to_continue: str | None = None) -> int:
    """Run one training, or one for each of ``--seeds``; return the exit code. ``to_continue``: see ``cli.train``."""
    run, seeds = settings.run, settings.training.seeds
    with distributed_context(settings.device.device) as device, deterministic(settings.device.deterministic):
        if seeds and rank_info().world_size > 1:
            raise UserError("--seeds trains all seeds in one process: start it without torchrun")
        if run.init_from:
            run = replace(run, init_from=str(model_file_in(run.init_from)))
            settings = replace(settings, run=run)
        # One process reads all files.
        settings = replace(settings, data=replace(settings.data, check=settings.data.check and is_main()))
        if run.demo:
            from clipfusionvad.tools.demo import make_demo

            with local_main_first():
                make_demo(settings.dataset)
        data = read_training_data(settings, device)
        # Options that do not fit end it before anything is written.
        trainer, entries = (None, data.entries) if seeds else build_trainer(settings, data)
        for path in filter(None, (run.model_path, None if seeds else run.checkpoint_path, run.metrics_json)):
            files.check_writable(path)
        if run.metrics_json and Path(run.metrics_json).exists():
            files.read_json(run.metrics_json, "--metrics-json")
        with contextlib.ExitStack() as locks:
            # The folder that rank 0 has taken.
            folder = gather_objects(_take_folder(settings, locks) if is_main() else None)[0]
            print(
                f"{settings.model.method} on {settings.dataset.title}: {len(entries)} training rows, "
                f"{len(data.test_set.entries)} test videos, {device}\nrun folder: {folder}"
            )
            try:
                if trainer:
                    _train_one(settings, data, trainer, entries, folder)
                else:
                    _train_seeds(settings, data, folder)
            except (Stopped, KeyboardInterrupt) as stop:
                # Interrupted while it tested the weights, a process must tell the others.
                if isinstance(stop, KeyboardInterrupt) and rank_info().world_size > 1:
                    raise
                command = to_continue or f"repeat the command with --use-checkpoint --output-dir {folder}"
                print(f"stopped; to go on: {command}")
                return EXIT_INTERRUPTED
            except RuntimeError as error:
                exit_if_lost(error, lambda: _saved(folder))
                raise
    return 0


def read_training_data(settings: Settings, device: torch.device) -> TrainingData:
    """Read and check the lists, features and truth that the options name."""
    dataset, model, data, sources = settings.dataset, settings.model, settings.data, Sources()
    entries, store = setup.open_list(data.train_list, dataset, model, data, training=True)
    part = "training features"
    counts = setup.check_list(data.train_list, entries, store, model.feature_width, data.check, part, sources)
    if (kind := setup.absent_kind(entries, dataset)) is not None:
        raise UserError(f"{data.train_list} has no {kind} video, but training needs both kinds: use the complete list")
    parts = None if data.stride else counts[0] if len(set(counts)) == 1 else 0
    test_set = setup.read_test_set(dataset, model, data, sources)
    sources.add_options(settings.options(), (*FILE_OPTIONS, "init_from"))
    check_overlap(entries, test_set.entries)
    try:
        setup.check_stride(entries, store, data.stride)
    except UserError as error:
        warn(f"training features: {error}")
    is_random = find_method(model.method).sampling_of(model.options).is_random
    # Averages of whole videos are made video by video.
    packed = PackedBatches(store, device) if store and (is_random or not store.whole) else None
    return TrainingData(device, entries, test_set, store is not None, packed, sources, parts)


def build_trainer(settings: Settings, data: TrainingData) -> tuple[Trainer, list[Entry]]:
    """Return the trainer that the options describe, and the entries that it trains on."""
    dataset, training, device = settings.dataset, settings.training, data.device
    width, seed, precision = settings.model.feature_width, training.seed, settings.device.precision
    with local_main_first():
        start = read_model_file(settings.run.init_from) if settings.run.init_from else None
        model, clip = setup.build_model(settings.model, dataset, seed, start, data.clip)
    if start:
        setup.load_initial_weights(model, settings, start, clip)
    data.clip = clip and clip.text_tower
    if not model.trained:
        # Its model file and its run are written all the same, so that it is tested and compared like any other.
        print(f"{model.name} has nothing to train: it is tested as it is")
        training = replace(training, max_epoch=0, select=LAST_WEIGHTS)
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
            setup.check_list(path, selection_set.entries, None, width, read, "held-out features", data.sources)
        judge = evaluate_videos
    normal, size = bags.targets[rows, 0] > 0, training.batch_size
    if model.paired and not training.balanced:
        raise UserError(f"{model.name} pairs normal with anomalous videos: train it with --balanced")
    plan: BalancedBatchSampler | ShuffledBatchSampler = ShuffledBatchSampler(rows, size, seed)
    if training.balanced:
        plan = BalancedBatchSampler(rows[normal], rows[~normal], size, seed, training.cycle)

    sigma = 0.0 if training.smooth == AUTO else float(training.smooth)

    def score(model: Method) -> dict[str, Any]:
        return judge(smooth_videos(score_dataset(model, selection_set, device, precision), sigma), selection_set)

    workers = settings.data.workers
    if workers is None:
        # None beside a model on the CPU.
        workers = 0 if device.type == "cpu" else min(8, count_cores() - 1)
    hparams = make_hparams(model, clip, dataset, settings.options(), data.parts)
    trainer = Trainer(model, bags, plan, training, score, hparams, device, precision, workers)
    trainer.trackers, trainer.selection_set = settings.run.track or (), selection_set
    return trainer, [data.entries[row] for row in rows]


def _take_folder(settings: Settings, locks: contextlib.ExitStack) -> Path:
    """Return the folder of the run, or of the runs of several seeds, locked against other processes."""
    run, seeds = settings.run, settings.training.seeds or ()
    stem = f"{settings.dataset.name}_{settings.model.method}" + "_seeds" * bool(seeds)
    folder = run_folder.choose_folder(run.output_dir, stem, run.use_checkpoint)
    files.check_writable(folder / (METRICS if seeds else LAST))
    locks.enter_context(files.hold(folder))
    run_folder.check_folder(folder, run.use_checkpoint or run.overwrite, seeds)
    check_replaceable(run.model_path, "--model-path")
    if not (seeds or run.use_checkpoint):
        check_replaceable(run.checkpoint_path, "--checkpoint-path")
    for seed in seeds:
        locks.enter_context(files.hold(seed_folder(folder, seed)))
    for path in map(Path, filter(None, (run.model_path, run.checkpoint_path, run.metrics_json))):
        files.remove_leftovers(path.parent, path.name)
    return folder


def _train_one(settings: Settings, data: TrainingData, trainer: Trainer, entries: list[Entry], folder: Path) -> None:
    checkpoint_path: Path | None = Path(settings.run.checkpoint_path)
    if settings.run.use_checkpoint:
        _resume(trainer, folder, checkpoint_path)
        if checkpoint_path and checkpoint_path.is_file() and not is_ours(checkpoint_path):
            unknown = f"{checkpoint_path} was not written by this program, or is damaged, and is not replaced"
            print(f"{unknown}; the state is in {folder / LAST}")
            checkpoint_path = None
    results = _train(settings, data, trainer, entries, folder, checkpoint_path)
    if is_main():
        print(metrics_table(results, *published_beside(settings.record(), data.test_set.judged)))
        print(f"\nfinal model   {settings.run.model_path}")
        curves = "training.png, " if trainer.model.trained else ""
        print(f"run folder    {folder}: {PAGE}, scores.png, {curves}{METRICS}, tensorboard/")


def _train_seeds(settings: Settings, data: TrainingData, folder: Path) -> None:
    """Train one seed after another, each into its own folder, and summarise their metrics."""
    run = settings.run
    for seed in settings.training.seeds or ():
        own = seed_folder(folder, seed)
        alone = replace(
            settings,
            training=replace(settings.training, seed=seed, seeds=None),
            run=replace(run, output_dir=str(own), model_path=str(own / BEST), metrics_json=None),
        )
        trainer, entries = build_trainer(alone, data)
        trainer.label = f"seed {seed}, "
        # A stop leaves seeds that have not begun.
        if run.use_checkpoint and states_in(own):
            _resume(trainer, own)
            # All that follows training must have been written since.
            paths = [own / name for name in (LAST, METRICS, RUN_SCORES, PAGE)]
            times = [path.stat().st_mtime_ns if path.is_file() else 0 for path in paths]
            if trainer.progress.epoch >= trainer.config.max_epoch and min(times) == times[0] > 0:
                print(f"seed {seed} is finished already")
                continue
        _train(alone, data, trainer, entries, own)
    summary = write_summary(settings, folder, data.sources)
    if run.metrics_json:
        files.write_json(run.metrics_json, summary)
    seed, by = summary["model_seed"], summary["model_by"]
    files.link_or_copy(seed_folder(folder, seed) / BEST, Path(run.model_path))
    print(seeds_table(summary, *published_beside(settings.record(), data.test_set.judged)))
    print(f"\nfinal model   {run.model_path}: that of seed {seed}, the median by {by}")
    print(f"run folder    {folder}: {PAGE}, {METRICS}, and the run of each seed in a folder of its own")


def write_summary(settings: Settings, folder: Path, sources: Sources) -> dict[str, Any]:
    """Write metrics.json and the page of the runs of several seeds in a folder; return the metrics."""
    summary = summarise_seeds(folder, settings.training.seeds or (), settings.training.select)
    about = environment(pick_device(settings.device.device))
    run_folder.record_run(folder, settings.dataset, settings.record(), about, sources)
    files.write_json(folder / METRICS, summary)
    write_report(folder)
    return summary


def _train(
    settings: Settings,
    data: TrainingData,
    trainer: Trainer,
    entries: list[Entry],
    folder: Path,
    checkpoint_path: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Train in a folder, test the final weights, and write all files of the run; return metrics by weights."""
    start_run(settings, data, trainer, entries, folder)
    states = dict(zip(("last", "best"), trainer.fit(folder, checkpoint_path), strict=True))
    if settings.run.demo:
        # What chance would give, for a reader who does not know this data.
        untrained = setup.build_model(settings.model, settings.dataset, settings.training.seed, clip=data.clip)[0]
        statistics = copy_buffers(trainer.model, trainer.model.data_buffers)
        states = {"untrained": state_without_clip(untrained) | statistics, **states}
    sigma, asked = settings.training.smooth, bool(settings.training.smooth)
    if sigma == AUTO:
        sigma = _choose_smoothing(settings, trainer, states["best"])
    results = {}
    for name, state in states.items():
        trainer.model.load_state_dict(state, strict=False)
        scored = score_dataset(trainer.model, data.test_set, data.device, settings.device.precision)
        scores = smooth_videos(scored, float(sigma))
        results[name] = evaluate(scores, data.test_set, settings.training.protocol)
        results[name] = with_reasons(results[name] | evaluate_classes(scores, data.test_set), data.test_set)
        results[name] |= {"smooth": sigma} if asked else {}
    if is_main():
        metrics = files.without_nan(results["best"])
        hparams = {**trainer.hparams, **({"smooth": sigma} if asked else {})}
        # The model has the best weights, which were scored last.
        final = model_content(hparams, states["best"], trainer.model, step=trainer.progress.best_step, metrics=metrics)
        for path in (folder / BEST, Path(settings.run.model_path)):
            files.write_torch(path, final)
        files.write_json(folder / METRICS, results)
        if settings.run.metrics_json:
            files.write_json(settings.run.metrics_json, results["best"])
        draw_score_curves(folder / "scores.png", scores, data.test_set)
        draw_training(folder / "training.png", folder)
        here = setup.result_environment(trainer.hparams, data.device)
        save_scores(folder / RUN_SCORES, scores, data.test_set, settings.record() | {"smooth": sigma}, here)
        write_report(folder)
    return results


def _choose_smoothing(settings: Settings, trainer: Trainer, state: dict[str, torch.Tensor]) -> float:
    """Return the sigma with which the scores of some weights tell the held-out videos apart best."""
    trainer.model.load_state_dict(state, strict=False)
    scores = score_dataset(trainer.model, trainer.selection_set, trainer.device, settings.device.precision)
    select = settings.training.select
    found = choose_smoothing(scores, trainer.selection_set, 1 if select == LAST_WEIGHTS else int(select[-1]))
    sigma, tried = next(iter(found)), ", ".join(f"{sigma:g}: {100 * auc:.2f}" for sigma, auc in sorted(found.items()))
    print(f"{trainer.label}scores are smoothed with --smooth {sigma:g}; AUC of the held-out videos by sigma: {tried}")
    return sigma


def start_run(settings: Settings, data: TrainingData, trainer: Trainer, entries: list[Entry], folder: Path) -> None:
    """Find the normal centroid and write the run's records, before the first step or after resuming."""
    # Nothing is written before every process has looked for a state to resume.
    barrier()
    if not is_main():
        return
    setup.find_feature_statistics(trainer.model, entries)
    setup.find_normal_centroid(trainer.model, entries, settings.dataset, settings.run.normal_centroid)
    if not settings.run.use_checkpoint:
        run_folder.clear_run(folder)
    if trainer.model.centroid_buffers:
        files.write_torch(folder / NORMAL_CENTROID, centroid_content(trainer.model))
    about = setup.result_environment(trainer.hparams, data.device)
    run_folder.record_run(folder, settings.dataset, settings.record(), about, data.sources)


def _resume(trainer: Trainer, folder: Path, checkpoint_path: Path | None = None) -> None:
    """Continue from the newest undamaged state in the folder, else from ``--checkpoint-path``, else from the start."""
    found, damaged = states_in(folder), []
    if not found and checkpoint_path and checkpoint_path.is_file():
        content = read_checkpoint(checkpoint_path, "checkpoint")
        run = content.get("run") if isinstance(content, dict) else None
        if run not in (None, str(folder.resolve())):
            warn(f"{checkpoint_path} is not used, because it is of another run; to continue that: --output-dir {run}")
            return
        found = [checkpoint_path]
    for path in found:
        try:
            trainer.resume(path)
        except Damaged as error:
            damaged.append(error)
            continue
        for reason in damaged:
            warn(f"{reason}; continuing from the previous state, {path}")
        print(f"resuming from {path} at epoch {trainer.progress.epoch + 1}, step {trainer.progress.step}")
        return
    if damaged:
        raise UserError(f"{' and '.join(map(str, damaged))}; start anew with --overwrite in place of --use-checkpoint")
    places = dict.fromkeys(map(str, filter(None, (folder / LAST, checkpoint_path))))
    warn(f"nothing to resume: no {' and no '.join(places)}; starting anew")


def _saved(folder: Path) -> str:
    """What has been saved of a run, and how to continue it."""
    for path in states_in(folder):
        with contextlib.suppress(Damaged):
            step = read_checkpoint(path, "checkpoint")["progress"]["step"]
            return f"the state of step {step} is in {path}; start again with --use-checkpoint --output-dir {folder}"
    return "nothing is saved yet; start again"
