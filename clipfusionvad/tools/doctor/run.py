"""Checks of the folder of a run, and of model files: whole, finite, and made with what is used now."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.checkpoint import ModelFile, check_clip, check_method, read_model_file
from clipfusionvad.engine.run_folder import BEST, ENVIRONMENT, LAST, LOSSES, METRICS, NORMAL_CENTROID, OPTIONS
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_json
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.io.provenance import environment
from clipfusionvad.models import find_method
from clipfusionvad.models.clip import TOY, load_clip
from clipfusionvad.tools.doctor.findings import ERROR, NOTE, WARNING, Finding


@dataclass
class RunFolder:
    """A folder of a run; ``parse`` reads its options as training would, and gives them with the dataset."""

    folder: Path
    parse: Callable[[Path], tuple[Namespace, Dataset]]
    now: Mapping[str, Any] = field(default_factory=environment)

    @cached_property
    def options(self) -> Namespace | None:
        """None where they cannot be read, which is another check's to say."""
        try:
            return self.parse(self.folder / OPTIONS)[0]
        except UserError:
            return None

    @cached_property
    def models(self) -> list[ModelFile]:
        """The model files that can be read."""
        found = []
        for name in (BEST, LAST):
            if (path := self.folder / name).is_file():
                try:
                    found.append(read_model_file(path))
                except UserError:
                    continue
        return found

    def place(self, name: str) -> str:
        return str(self.folder / name)


def run_files(run: RunFolder) -> Iterator[Finding]:
    """Files of the run are missing or damaged, or it has not ended."""
    for name in (OPTIONS, ENVIRONMENT, LAST, BEST):
        if not (run.folder / name).is_file():
            again = "repeat the command with --use-checkpoint" if name == BEST else "train again"
            yield Finding(WARNING if name == BEST else ERROR, "it is missing", run.place(name), advice=again)
    if not (run.folder / METRICS).is_file():
        advice = "repeat the command with --use-checkpoint"
        yield Finding(WARNING, "it is missing: the training has not ended", run.place(METRICS), advice=advice)
    readers = dict.fromkeys((METRICS, ENVIRONMENT), read_json) | dict.fromkeys(
        (LAST, BEST, NORMAL_CENTROID), read_checkpoint
    )
    for name, read in readers.items():
        if (run.folder / name).is_file():
            try:
                read(run.folder / name, "run's file")
            except UserError as error:
                yield Finding(ERROR, str(error), advice="train again, or put a copy back")
    for leftover in run.folder.glob(".*.tmp"):
        yield Finding(NOTE, "it was being written when a run was killed", str(leftover), advice="delete it")


def run_options(run: RunFolder) -> Iterator[Finding]:
    """The recorded options cannot be read, or are unknown here."""
    if (run.folder / OPTIONS).is_file():
        try:
            run.parse(run.folder / OPTIONS)
        except UserError as error:
            yield Finding(ERROR, str(error), advice="it is no valid --config any more: correct or restore it")


def run_data(run: RunFolder) -> Iterator[Finding]:
    """Lists, truth or normal centroid of the run do not exist any more."""
    if run.options is None:
        return
    for option in ("train_list", "test_list", "gt_path"):
        path = str(getattr(run.options, option))
        if path.endswith((".csv", ".npy", ".json")) and not Path(path).is_file():
            advice = "a test or a resumed training needs it: put it back, or start from the same folder"
            yield Finding(
                WARNING, f"--{option.replace('_', '-')} {path} is not there", run.place(OPTIONS), advice=advice
            )
    if find_method(run.options.method).centroid_buffers and not (run.folder / NORMAL_CENTROID).is_file():
        advice = "train again, or take it from a run on the same list"
        yield Finding(ERROR, "it is missing, and the method needs it", run.place(NORMAL_CENTROID), advice=advice)


def run_models(run: RunFolder) -> Iterator[Finding]:
    """A model in the folder is of another method or dataset than the options, or holds values that are not finite."""
    for file in run.models:
        centroid = find_method(file.method).centroid_buffers if file.method else ()
        for key, value in file.state.items():
            if value.is_floating_point() and key not in centroid and not torch.isfinite(value).all():
                yield Finding(ERROR, f"{key} holds NaN or infinity", file.path, advice="train again with a lower --lr")
                break
        if run.options is not None:
            yield from _misfits(file, run.options)


def run_clip(run: RunFolder) -> Iterator[Finding]:
    """The CLIP that the options name is not the one that the model was trained with."""
    if run.options is None or not run.models or not find_method(run.options.method).needs_clip:
        return
    source = run.options.clip
    # Others would be downloaded.
    if source == TOY or Path(source).is_file():
        clip = load_clip(source, width=run.options.embed_dim)
        for file in run.models:
            try:
                check_clip(file, clip)
            except UserError as error:
                yield Finding(ERROR, str(error))


def run_losses(run: RunFolder) -> Iterator[Finding]:
    """Losses that are not finite, or steps that are missing."""
    path = run.folder / LOSSES
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        table = pd.read_csv(path)
        steps, losses = table["step"], table["loss"].astype(float)
    except (ValueError, KeyError, OSError) as error:
        yield Finding(ERROR, f"not readable as a log: {error}", str(path))
        return
    bad = ~losses.abs().lt(float("inf"))
    if bad.any():
        what = f"{int(bad.sum())} losses are not finite, the first at step {steps[bad.idxmax()]}"
        yield Finding(ERROR, what, str(path), int(bad.idxmax()) + 2, "train again with a lower --lr")
    if (gap := steps.diff().iloc[1:].ne(1)).any():
        at = int(gap.idxmax())
        yield Finding(WARNING, f"steps jump to {steps[at]}", str(path), at + 2, "lines have been lost or doubled")


def run_environment(run: RunFolder) -> Iterator[Finding]:
    """The run was made with other versions than those installed now."""
    path = run.folder / ENVIRONMENT
    try:
        then = read_json(path, "environment") if path.is_file() else {}
    except UserError:
        return
    packages = then.get("packages")
    known = packages if isinstance(packages, dict) else {}
    pairs = {name: (version, run.now["packages"].get(name)) for name, version in known.items()}
    pairs["python"] = (then.get("python"), run.now["python"])
    changed = [f"{name} was {old} and is {new}" for name, (old, new) in pairs.items() if old and old != new]
    if changed:
        yield Finding(WARNING, ", ".join(changed), str(path), advice="numbers may differ in their last digits")
    if then.get("commit") and then["commit"] != run.now["commit"]:
        yield Finding(NOTE, f"the code was at {then['commit']} and is at {run.now['commit']}", str(path))


def _misfits(file: ModelFile, options: Namespace) -> Iterator[Finding]:
    try:
        check_method(file, options.method)
    except UserError as error:
        yield Finding(ERROR, str(error))
    trained_on = file.made.get("dataset")
    if trained_on and trained_on != Path(options.dataset).stem:
        what = f"it was trained on {trained_on}, but the options say {options.dataset}"
        yield Finding(ERROR, what, file.path, advice="give the model of this dataset")


CHECKS = (run_files, run_options, run_data, run_models, run_clip, run_losses, run_environment)
