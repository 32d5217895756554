"""Checks of the folder of a run: complete, finite, and made with what is used now."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch

from clipfusionvad.engine.checkpoint import ModelFile, check_clip, check_method, read_model_file
from clipfusionvad.engine.config import Settings
from clipfusionvad.engine.run_folder import BEST, ENVIRONMENT, LAST, LOSSES, METRICS, NORMAL_CENTROID, OPTIONS
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_json
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.io.provenance import environment
from clipfusionvad.models import find_method
from clipfusionvad.models.clip import TOY, load_clip
from clipfusionvad.tools.doctor import ERROR, NOTE, WARNING, Finding

_RESUME = "repeat the command with --use-checkpoint"


class RunFolder:
    """A folder of a run; ``parse`` reads its options as training would.

    ``settings`` are None, with the reason in ``problem``, if they cannot be read; ``models`` those that can be read.
    """

    def __init__(self, folder: Path, parse: Callable[[Path], Settings]) -> None:
        self.folder, self.problem = folder, ""
        self.settings: Settings | None = None
        self.models: list[ModelFile] = []
        try:
            self.settings = parse(folder / OPTIONS)
        except UserError as error:
            self.problem = str(error)
        for name in (BEST, LAST):
            with contextlib.suppress(UserError):
                self.models.append(read_model_file(folder / name))

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def finding(self, level: str, what: str, name: str, advice: str = "", row: int | None = None) -> Finding:
        return Finding(level, what, advice, str(self.folder / name), row)


def run_files(run: RunFolder) -> Iterator[Finding]:
    """Files of the run are missing or damaged, or it has not ended."""
    missing = {name: (ERROR, "it is missing", "train again") for name in (OPTIONS, ENVIRONMENT, LAST)}
    missing[BEST] = WARNING, "it is missing", _RESUME
    missing[METRICS] = WARNING, "it is missing: the training has not ended", _RESUME
    for name, (level, what, advice) in missing.items():
        if not run.has(name):
            yield run.finding(level, what, name, advice)
    for name in (METRICS, ENVIRONMENT, LAST, BEST, NORMAL_CENTROID):
        if run.has(name):
            try:
                (read_json if name.endswith(".json") else read_checkpoint)(run.folder / name, "run's file")
            except UserError as error:
                yield Finding(ERROR, str(error), "train again, or put a copy back")
    for leftover in run.folder.glob(".*.tmp"):
        yield run.finding(NOTE, "it was being written when a run was killed", leftover.name, "delete it")


def run_options(run: RunFolder) -> Iterator[Finding]:
    """The recorded options cannot be read, or are unknown here."""
    if run.has(OPTIONS) and run.problem:
        yield Finding(ERROR, run.problem, "it is not a valid --config any more: correct or restore it")


def run_data(run: RunFolder) -> Iterator[Finding]:
    """Lists, truth or normal centroid of the run do not exist any more."""
    if run.settings is None:
        return
    for option in ("train_list", "test_list", "gt_path"):
        path = getattr(run.settings.data, option)
        if path.endswith((".csv", ".npy", ".json")) and not Path(path).is_file():
            what = f"--{option.replace('_', '-')} {path} does not exist"
            advice = "a test or a resumed training needs it: put it back, or start from the same folder"
            yield run.finding(WARNING, what, OPTIONS, advice)
    if find_method(run.settings.model.method).centroid_buffers and not run.has(NORMAL_CENTROID):
        advice = "train again, or copy it from a run on the same list"
        yield run.finding(ERROR, "it is missing, and the method needs it", NORMAL_CENTROID, advice)


def run_models(run: RunFolder) -> Iterator[Finding]:
    """A model in the folder is of another method or dataset than the options, or holds values that are not finite."""
    for file in run.models:
        centroid = find_method(file.method).centroid_buffers if file.method else ()
        for key, value in file.state.items():
            if value.is_floating_point() and key not in centroid and not torch.isfinite(value).all():
                yield Finding(ERROR, f"{key} holds NaN or infinity", "train again with a lower --lr", file.path)
                break
        if run.settings is None:
            continue
        try:
            check_method(file, run.settings.model.method)
        except UserError as error:
            yield Finding(ERROR, str(error))
        trained_on = file.hparams.get("dataset")
        if trained_on and trained_on != run.settings.dataset.name:
            what = f"it was trained on {trained_on}, but the options say {run.settings.dataset.name}"
            yield Finding(ERROR, what, "give the model of this dataset", file.path)


def run_clip(run: RunFolder) -> Iterator[Finding]:
    """The CLIP that the options name is not the one that the model was trained with."""
    if run.settings is None or not run.models or not find_method(run.settings.model.method).needs_clip:
        return
    source = run.settings.model.clip
    # Others would be downloaded.
    if source == TOY or Path(source).is_file():
        clip = load_clip(source, width=run.settings.model.embed_dim)
        for file in run.models:
            try:
                check_clip(file, clip)
            except UserError as error:
                yield Finding(ERROR, str(error))


def run_losses(run: RunFolder) -> Iterator[Finding]:
    """Losses are not finite, or steps are missing."""
    path = run.folder / LOSSES
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        table = pd.read_csv(path)
        steps, losses = table["step"], table["loss"].astype(float)
    except (ValueError, KeyError, OSError) as error:
        yield run.finding(ERROR, f"not readable as a log: {error}", LOSSES)
        return
    bad = ~losses.abs().lt(float("inf"))
    if bad.any():
        what = f"{int(bad.sum())} losses are not finite, the first at step {steps[bad.idxmax()]}"
        yield run.finding(ERROR, what, LOSSES, "train again with a lower --lr", int(bad.idxmax()) + 2)
    if (gap := steps.diff().iloc[1:].ne(1)).any():
        row = int(gap.idxmax())
        yield run.finding(WARNING, f"steps jump to {steps[row]}", LOSSES, "lines were lost or doubled", row + 2)


def run_environment(run: RunFolder) -> Iterator[Finding]:
    """The run was made with other versions than those installed now."""
    try:
        then, now = read_json(run.folder / ENVIRONMENT, "environment"), environment()
    except UserError:
        return
    packages = then.get("packages")
    recorded = packages if isinstance(packages, dict) else {}
    pairs = {name: (version, now["packages"].get(name)) for name, version in recorded.items()}
    pairs["python"] = (then.get("python"), now["python"])
    changed = [f"{name} was {old} and is {new}" for name, (old, new) in pairs.items() if old and old != new]
    if changed:
        yield run.finding(WARNING, ", ".join(changed), ENVIRONMENT, "numbers may differ in their last digits")
    if then.get("commit") and then["commit"] != now["commit"]:
        yield run.finding(NOTE, f"the code was at {then['commit']} and is at {now['commit']}", ENVIRONMENT)
