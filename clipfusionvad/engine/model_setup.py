"""Builds the model that the options describe, and loads the weights of a checkpoint into it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from clipfusionvad.data.features import load_entry
from clipfusionvad.data.lists import Entry
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.checkpoint import ModelFile, check_clip, load_centroid, load_model_file
from clipfusionvad.engine.config import Settings
from clipfusionvad.engine.data_setup import open_list
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.provenance import environment
from clipfusionvad.models import Method, build_method, find_method
from clipfusionvad.models.clip import ClipWeights, clip_in_checkpoint, load_clip
from clipfusionvad.models.config import ModelConfig


def build_model(
    config: ModelConfig,
    dataset: Dataset,
    seed: int,
    file: ModelFile | None = None,
    clip: ClipWeights | None = None,
) -> tuple[Method, ClipWeights | None]:
    """Build a model and return it with its CLIP: ``clip``, else that inside a checkpoint, else ``config.clip``."""
    method = find_method(config.method)
    if method.needs_clip and clip is None:
        clip = clip_in_checkpoint(file.state, file.path) if file else None
        clip = clip or load_clip(config.clip, width=config.embed_dim)
    torch.manual_seed(seed)
    return build_method(config.method, dataset.prompts, clip, **config.options), clip


def load_model(settings: Settings, file: ModelFile) -> tuple[Method, ClipWeights | None]:
    """Build the model that the options describe with the weights of a checkpoint, on the CPU."""
    model, clip = build_model(settings.model, settings.dataset, settings.training.seed, file)
    check_clip(file, clip)
    load_model_file(model, file)
    if model.has_normal_centroid:
        return model, clip
    # Released files of some methods lack it.
    path, data, entries = settings.run.normal_centroid, settings.data, []
    if not path:
        if not Path(data.train_list).is_file():
            raise UserError(
                f"{file.path} does not hold {', '.join(model.centroid_buffers)}, the mean of the normal training "
                f"videos: give the training list with --train-list, or the file of a run with --normal-centroid"
            )
        entries = open_list(data.train_list, settings.dataset, settings.model, data)[0]
    find_normal_centroid(model, entries, settings.dataset, path)
    return model, clip


def find_normal_centroid(model: Method, entries: Sequence[Entry], dataset: Dataset, path: str | None = None) -> None:
    """Fill a model's normal centroid from a file, else from the normal videos of ``entries``."""
    if model.has_normal_centroid:
        return
    if path:
        load_centroid(model, path)
        return
    normal = [entry for entry in entries if dataset.is_normal(entry.label)]
    if not normal:
        raise UserError(f"{model.name} learns what is normal from normal training videos, but the list has none")
    progress = tqdm(normal, "normal videos", disable=None, leave=False)
    model.set_normal_centroid(load_entry(entry, model.visual_width) for entry in progress)


def class_weight(settings: Settings, file: ModelFile) -> str | None:
    """Return the first weight of the model whose shape depends on the number of classes, if there is one."""
    dataset, seed = settings.dataset, settings.training.seed
    more = replace(dataset, classes={**dataset.classes, "one more": "something else"})
    here, there = (build_model(settings.model, known, seed, file)[0].state_dict() for known in (dataset, more))
    return next((name for name in here if here[name].shape != there[name].shape), None)


def result_environment(hparams: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the environment of a result, with the CLIP of its model."""
    return environment(device) | {"clip": hparams["clip"], "clip_fingerprint": hparams["clip_fingerprint"]}
