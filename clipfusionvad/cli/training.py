"""Run a training from its settings: set-up, resuming, the trainer, the test of the final weights, the report.

Separate from the command, whose --help must not wait for the imports of this file.
"""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipfusionvad.data.lists import Entry
from clipfusionvad.engine.checkpoint import run_of
from clipfusionvad.engine.config import Settings
from clipfusionvad.engine.device import deterministic, pick_device
from clipfusionvad.engine.distributed import distributed_context, exit_if_lost, gather_objects, local_main_first
from clipfusionvad.engine.model_setup import result_environment
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
from clipfusionvad.engine.training_setup import (
    TrainingData,
    build_trainer,
    evaluate_final_weights,
    read_training_data,
    start_run,
)
from clipfusionvad.io.errors import EXIT_INTERRUPTED, UserError, warn
from clipfusionvad.io.files import check_writable, link_or_copy, remove_leftovers, write_json
from clipfusionvad.io.foreign_checkpoints import Damaged, read_checkpoint
from clipfusionvad.io.locks import hold
from clipfusionvad.io.provenance import Sources, environment
from clipfusionvad.io.rank import is_main, rank_info
from clipfusionvad.report import PAGE
from clipfusionvad.report.plots import draw_score_curves, draw_training
from clipfusionvad.report.results import RUN_SCORES
from clipfusionvad.report.run_page import write_report
from clipfusionvad.report.scores import save_scores
from clipfusionvad.report.seeds import seeds_table, summarise_seeds
from clipfusionvad.report.table import metrics_table, published


def run_training(settings: Settings) -> int:
    """Run one training, or one for each of ``--seeds``; return the exit code."""
    with distributed_context(settings.device.device) as device, deterministic(settings.device.deterministic):
        if settings.training.seeds and rank_info().world_size > 1:
            raise UserError("--seeds trains all seeds in one process: start it without torchrun")
        # One process reads all files.
        settings = replace(settings, data=replace(settings.data, check=settings.data.check and is_main()))
        if settings.run.demo:
            from clipfusionvad.tools.demo import make_demo

            with local_main_first():
                make_demo(settings.dataset)
        data = read_training_data(settings, device)
        return _train_seeds(settings, data) if settings.training.seeds else _train_one(settings, data)


def write_summary(settings: Settings, folder: Path, sources: Sources) -> dict[str, Any]:
    """Write metrics.json and the page of the runs of several seeds in a folder; return the metrics."""
    summary = summarise_seeds(folder, settings.training.seeds or (), settings.training.select)
    record_run(folder, settings.record(), environment(pick_device(settings.device.device)), sources)
    record_dataset(folder, settings.dataset)
    write_json(folder / METRICS, summary)
    write_report(folder)
    return summary


def _train_one(settings: Settings, data: TrainingData) -> int:
    run = settings.run
    trainer, entries = build_trainer(settings, data)
    for path in filter(None, (run.model_path, run.checkpoint_path, run.metrics_json)):
        check_writable(path)
    with contextlib.ExitStack() as locks:
        # The folder that rank 0 has taken.
        folder = gather_objects(_take_folder(settings, locks) if is_main() else None)[0]
        return _train_in(folder, settings, data, trainer, entries)


def _take_folder(settings: Settings, locks: contextlib.ExitStack) -> Path:
    """Return the folder of the run, or of the runs of several seeds, locked against other processes."""
    run, seeds = settings.run, settings.training.seeds
    may_be_taken = run.use_checkpoint or run.overwrite
    stem = f"{settings.dataset.name}_{settings.model.method}" + "_seeds" * bool(seeds)
    folder = choose_folder(run.output_dir, stem, run.use_checkpoint)
    check_writable(folder / (METRICS if seeds else LAST))
    locks.enter_context(hold(folder))
    if seeds:
        check_seeds_folder(folder, may_be_taken, seeds)
        for seed in seeds:
            locks.enter_context(hold(seed_folder(folder, seed)))
    else:
        check_folder(folder, may_be_taken)
    for path in map(Path, filter(None, (run.model_path, run.checkpoint_path, run.metrics_json))):
        remove_leftovers(path.parent, path.name)
    return folder


def _train_in(folder: Path, settings: Settings, data: TrainingData, trainer: Trainer, entries: list[Entry]) -> int:
    checkpoint_path = Path(settings.run.checkpoint_path)
    if settings.run.use_checkpoint:
        _resume(trainer, folder, checkpoint_path)
    start_run(settings, data, trainer, entries, folder)
    _announce(settings, data, len(entries), folder)
    try:
        trainer.fit(folder, checkpoint_path)
        results = _conclude(settings, data, trainer, folder)
    except Stopped:
        return _say_stopped(folder)
    except KeyboardInterrupt:
        # While the weights were tested. Of several processes, the others must be told.
        if rank_info().world_size > 1:
            raise
        return _say_stopped(folder)
    except RuntimeError as error:
        exit_if_lost(error, lambda: _saved(folder))
        raise
    if is_main():
        print(metrics_table(results, _published(settings)))
        print(f"\nfinal model   {settings.run.model_path}")
        print(f"run folder    {folder}: {PAGE}, scores.png, training.png, {METRICS}, tensorboard/")
    return 0


def _conclude(settings: Settings, data: TrainingData, trainer: Trainer, folder: Path) -> dict[str, dict[str, Any]]:
    """Test the final weights and write the figures, scores and page of a run; return its metrics."""
    results, scores = evaluate_final_weights(settings, data, trainer, folder)
    if is_main():
        draw_score_curves(folder / "scores.png", scores, data.test_set)
        draw_training(folder / "training.png", folder)
        here = result_environment(trainer.hparams, data.device)
        save_scores(folder / RUN_SCORES, scores, data.test_set, settings.record(), here)
        write_report(folder)
    return results


def _saved(folder: Path) -> str:
    """What has been saved of a run, and how to continue it."""
    for path in states_in(folder):
        with contextlib.suppress(Damaged):
            step = read_checkpoint(path, "checkpoint")["progress"]["step"]
            return f"the state of step {step} is in {path}; start again with --use-checkpoint --output-dir {folder}"
    return "nothing is saved yet; start again"


def _train_seeds(settings: Settings, data: TrainingData) -> int:
    """Train one seed after another, each into its own folder, and summarise their metrics."""
    run = settings.run
    for path in filter(None, (run.model_path, run.metrics_json)):
        check_writable(path)
    with contextlib.ExitStack() as locks:
        folder = _take_folder(settings, locks)
        _announce(settings, data, len(data.entries), folder)
        try:
            for seed in settings.training.seeds or ():
                own = seed_folder(folder, seed)
                _train_seed(settings.for_seed(seed, own, own / BEST), data, own)
        except (Stopped, KeyboardInterrupt):
            return _say_stopped(folder)
        summary = write_summary(settings, folder, data.sources)
        if run.metrics_json:
            write_json(run.metrics_json, summary)
        seed, by = summary["model_seed"], summary["model_by"]
        link_or_copy(seed_folder(folder, seed) / BEST, Path(run.model_path))
    print(seeds_table(summary, _published(settings)))
    print(f"\nfinal model   {run.model_path}: that of seed {seed}, the median by {by}")
    print(f"run folder    {folder}: {PAGE}, {METRICS}, and the run of each seed in a folder of its own")
    return 0


def _train_seed(settings: Settings, data: TrainingData, folder: Path) -> None:
    """Train and test one seed, unless that has been done already."""
    seed = settings.training.seed
    trainer, entries = build_trainer(settings, data)
    trainer.label = f"seed {seed}, "
    # A stop leaves seeds that have not begun.
    if settings.run.use_checkpoint and states_in(folder):
        _resume(trainer, folder)
        if _is_finished(trainer, folder):
            print(f"seed {seed} is finished already")
            return
    start_run(settings, data, trainer, entries, folder)
    trainer.fit(folder)
    _conclude(settings, data, trainer, folder)


def _is_finished(trainer: Trainer, folder: Path) -> bool:
    """Whether nothing is left to train, and all that follows training has been written since."""
    paths = [folder / name for name in (LAST, METRICS, RUN_SCORES, PAGE)]
    if trainer.progress.epoch < trainer.schedule.max_epoch or not all(map(Path.is_file, paths)):
        return False
    return all(path.stat().st_mtime_ns >= paths[0].stat().st_mtime_ns for path in paths)


def _announce(settings: Settings, data: TrainingData, rows: int, folder: Path) -> None:
    videos = len(data.test_set.entries)
    title = f"{settings.model.method} on {settings.dataset.title}"
    print(f"{title}: {rows} training rows, {videos} test videos, {data.device}")
    print(f"run folder: {folder}")


def _say_stopped(folder: Path) -> int:
    print(f"stopped; to go on, repeat the command with --use-checkpoint --output-dir {folder}")
    return EXIT_INTERRUPTED


def _resume(trainer: Trainer, folder: Path, checkpoint_path: Path | None = None) -> None:
    """Continue from the newest undamaged state in the folder, else from ``--checkpoint-path``, else from the start."""
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
            warn(f"{reason}; continuing from the previous state, {path}")
        print(f"resuming from {path} at epoch {trainer.progress.epoch + 1}, step {trainer.progress.step}")
        return
    if damaged:
        raise UserError(f"{' and '.join(map(str, damaged))}; start anew with --overwrite in place of --use-checkpoint")
    places = dict.fromkeys(map(str, filter(None, (folder / LAST, checkpoint_path))))
    warn(f"nothing to resume: no {' and no '.join(places)}; starting anew")


def _published(settings: Settings) -> dict[str, float]:
    """The paper's figures; none for synthetic data."""
    if settings.run.demo:
        return {}
    return published(settings.model.method, settings.dataset.name, settings.training.protocol)
