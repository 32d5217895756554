"""A paper's table from features and annotations: what is trained on what, its cost, and the table at the end."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from clipfusionvad.data.features import read_shape, recorded_frames
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.loaders import load_batches
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.config import Settings
from clipfusionvad.engine.evaluator import VideoDataset, score_dataset
from clipfusionvad.engine.trainer import Trainer
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import walk_files
from clipfusionvad.models import find_method
from clipfusionvad.report.formatting import Table
from clipfusionvad.report.table import AP_NOTE, published, published_figures
from clipfusionvad.tools.tables import BEST, RESAMPLES
from clipfusionvad.tools.tables.build import TITLES, metric_rows
from clipfusionvad.tools.tables.collect import Setting
from clipfusionvad.tools.tables.compare import Resampler

#: A CSV with the columns video,frames, which --segments equal needs.
LENGTHS = "lengths.csv"
# Training steps that are timed, after a first one, and snippets of test videos.
_STEPS, _SNIPPETS = 3, 2000
# Weights in the files of a run: best.pt, and last.pt and previous.pt with the best and last ones and Adam's averages.
_COPIES = 11


def find_annotations(folder: str, dataset: Dataset) -> tuple[list[Path], list[Path]]:
    """Return a benchmark's annotation files and split files below a folder, by their official names.

    Raises ``UserError`` for a dataset without such names, and where a file is missing.
    """
    if not dataset.annotation_files:
        raise UserError(f"{dataset.name} has no published figures, so there is nothing to reproduce")
    if not Path(folder).is_dir():
        raise UserError(f"annotation folder not found: {folder}")
    found = {path.name: path for path in reversed(list(walk_files(folder, "")))}
    annotations = []
    for names in dataset.annotation_files:
        there = [found[name] for name in names if name in found]
        if not there:
            raise UserError(f"--annotations {folder} lacks {' or '.join(names)} of {dataset.title}")
        annotations.append(there[0])
    splits = [found[name] for name in dataset.split_files if name in found]
    if dataset.split_required and not splits:
        needed = " or ".join(dataset.split_files)
        raise UserError(f"--annotations {folder} lacks {needed}, which names the test videos of {dataset.title}")
    lengths = [found[LENGTHS]] if LENGTHS in found else []
    return [*annotations, *lengths], splits[:1] if dataset.split_required else splits


def published_methods(dataset: str) -> list[str]:
    """Return the methods with published figures on a dataset, in the order of ``published.csv``."""
    return list(dict.fromkeys(figure.method for figure in published_figures() if figure.dataset == dataset))


def feature_folder(features: str, settings: Settings) -> Path:
    """Return the folder of the features that a method's lists name: of its first stream, where it reads several."""
    streams = find_method(settings.model.method).streams
    first = (settings.data.stream_folders or streams)[0]
    return Path(features, first) if len(streams) > 1 else Path(features)


def misfit(features: str, settings: Settings) -> str:
    """Return why a method cannot use the features, by their folders, width and manifest; "" if it may."""
    folder = feature_folder(features, settings)
    first = next(walk_files(folder, ".npy"), None)
    if first is None:
        return f"no feature files (.npy) below {folder}"
    width, wanted = read_shape(first)[1], settings.model.feature_width
    if width != wanted:
        return f"{first} has dim {width}, and its options say {wanted}"
    used = settings.data.stride
    if used and (made := recorded_frames([first]).get(first, used)) != used:
        return f"{first} was extracted with a row per {made} frames, and its options say {used}"
    return ""


@dataclass(frozen=True)
class Estimate:
    """What training a method is likely to cost: seconds of a run with its tests, bytes of memory and of disk.

    ``memory`` is None where the system does not report it.
    """

    method: str
    steps: int
    seconds: float
    memory: int | None
    packed: int
    run: int


def estimate(trainer: Trainer, entries: Sequence[Entry], tests: VideoDataset) -> Estimate:
    """Time a few training steps and the scoring of a few test videos, and scale them to a whole run.

    Sizes come from the features' headers. The trainer cannot be used afterwards: its weights have changed.
    """
    on_gpu, config, model = trainer.device.type == "cuda", trainer.config, trainer.model
    batches, marks = trainer.batch_sampler.epoch(0), list[float]()
    few = (batches * (_STEPS + 1))[: _STEPS + 1]
    trainer.model.train()
    for batch, bags in zip(load_batches(trainer.bags, few, 0), few, strict=True):
        visual, lengths, targets = (tensor.to(trainer.device) for tensor in batch)
        losses = trainer.training_step(visual, lengths, targets, len(bags), 0)
        trainer.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        trainer.optimizer.step()
        marks.append(_now(on_gpu))
    step = (marks[-1] - marks[0]) / _STEPS
    rows = [read_shape(entry.path)[0] for entry in tests.entries]
    order = sorted(range(len(rows)), key=lambda index: abs(rows[index] - sum(rows) / len(rows)))
    sample = list(islice(order, max(1, _SNIPPETS * len(rows) // sum(rows))))
    some = VideoDataset([tests.entries[index] for index in sample], tests.dataset, tests.width)
    start = _now(on_gpu)
    score_dataset(model, some, trainer.device)
    scoring = (_now(on_gpu) - start) * sum(rows) / sum(rows[index] for index in sample)
    due = sum(trainer.evaluation_due(index, len(bags)) for index, bags in enumerate(batches))
    steps = len(batches) * config.max_epoch
    seconds = steps * step + (max(1, due) * config.max_epoch + 2) * scoring

    streams, sampling = len(find_method(model.name).streams), model.sampling
    trained = (
        sum(read_shape(entry.path)[0] for entry in entries) if sampling.is_random else len(entries) * sampling.length
    )
    packed = 2 * streams * tests.width * (trained + sum(rows))
    weights = sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
    return Estimate(model.name, steps, seconds, _peak_memory(on_gpu), packed, _COPIES * weights)


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_memory(on_gpu: bool) -> int | None:
    """Return the bytes that this process has used at most, on the GPU or in main memory."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def estimate_table(found: Sequence[Estimate], seeds: int) -> Table:
    """Return a row for each method and one for all."""
    rows = [
        (one.method, str(seeds), str(one.steps), f"{one.seconds / 60:.1f}", f"{seeds * one.seconds / 3600:.2f}",
         "-" if one.memory is None else f"{one.memory / 1e9:.2f}", f"{(one.packed + seeds * one.run) / 1e9:.2f}")
        for one in found
    ]  # fmt: skip
    hours = sum(seeds * one.seconds for one in found) / 3600
    disk = sum(one.packed + seeds * one.run for one in found) / 1e9
    rows.append(("together", str(seeds * len(found)), "", "", f"{hours:.2f}", "", f"{disk:.2f}"))
    header = ("estimate", "runs", "steps a run", "minutes a run", "hours", "memory, GB", "disk, GB")
    note = f"An estimate from {_STEPS} training steps and a few test videos on this machine, one run at a time."
    return Table(header, rows, note=note)


def reproduction_table(
    settings: Sequence[Setting], dataset: Dataset, changed: Mapping[str, str], made_up: bool
) -> Table:
    """Return published figures beside what was measured here, with intervals over test videos.

    ``changed`` says, by method, which options differ from the published ones; ``made_up``: the features are made up.
    Only the published metrics are shown, of the best weights: mean ± sample standard deviation over the seeds, in
    percent. The published figures are left out where ``no_comparison`` gives a reason.
    The interval is the middle 95 % over resamples of the test videos of the mean over the seeds.
    """
    figures = [one for one in published_figures() if one.dataset == dataset.name]
    first = {(one.method, one.metric): one for one in reversed(figures)}
    reason = "the features are made up" if made_up else next(filter(None, (one.no_comparison for one in settings)), "")
    resampler, lines, sources = Resampler(metrics=[one.metric for one in figures]), [], dict[str, None]()
    for setting in settings:
        comparable = published(setting.method, dataset.name, setting.protocol)
        metrics = list(dict.fromkeys(one.metric for one in figures if one.metric in comparable))
        for row in metric_rows([setting], [BEST], metrics):
            figure = first[row.method, row.metric]
            bounds = resampler.interval([result.folder for result in setting.results], row.metric)
            inside = "-"
            if bounds and not reason:
                inside = "inside" if bounds[0] <= figure.percent <= bounds[1] else "outside"
            here = f"{row.mean:.2f}" + ("" if row.std is None else f" ± {row.std:.2f}")
            interval = f"[{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "-"
            title = TITLES.get(row.metric, row.metric.replace("map@", "detection mAP@"))
            paper = "-" if reason else f"{figure.percent:.2f}"
            lines.append((row.method, title, paper, here, str(row.n), interval, inside))
            sources[f"{row.method}: {figure.source}"] = None
    title = f"{dataset.title}: published and reproduced, in percent"
    notes = ["here: mean ± standard deviation over n seeds."]
    notes.append(
        f"95 %: of that mean over {RESAMPLES} resamples of the test videos; inside: the paper's figure lies in it."
    )
    if reason:
        title += " (NO COMPARISON WITH PAPERS)"
        notes.insert(0, f"The papers' figures are not shown: {reason}.")
    if changed:
        title += " (OTHER OPTIONS THAN PUBLISHED)"
        options = "; ".join(f"{method}: {text}" for method, text in changed.items())
        notes.insert(0, f"Options differ from the published ones: {options}.")
    notes += [f"{AP_NOTE}.", f"Sources: {'; '.join(sources)}."]
    return Table(
        ("method", "metric", "paper", "here", "n", "95 %", "paper's figure"), lines, title, 2, "\n".join(notes)
    )
