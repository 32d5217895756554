"""How parity cases describe a model of the original projects, in our terms."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipfusionvad import create_model
from clipfusionvad.engine.checkpoint import ModelFile, load_model_file
from clipfusionvad.engine.device import compile_model
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.models import Method

METHODS = {"ClipFusionVAD": "clipfusionvad", "CLIPVAD": "vadclip"}


def read_config(case: Path) -> dict[str, Any]:
    return json.loads((case / "config.json").read_text())


def model_options(config: dict[str, Any]) -> dict[str, Any]:
    args = config.get("model_args", config["args"])
    return {key: value for key, value in args.items() if key != "num_class"}


def separation(config: dict[str, Any]) -> tuple[float, bool]:
    """Weight of the separation loss, and whether the recorded loss3 contains it.

    The cases say so in words: "loss3 = sum/13*1e-1 (weight included …)", "loss3*1e-4; … (weight not included …)".
    """
    text = config["loss"].lower()
    return float(re.search(r"\*\s*([\d.e+-]+)", text).group(1)), "not included" not in text


def load_original(case: Path, config: dict[str, Any], checkpoint: Path) -> Method:
    """Our model with the original's weights."""
    clip = checkpoint if config["clip"] is None else case / config["clip"]
    weight, _ = separation(config) if "loss" in config else (0.1, True)
    model = create_model(
        METHODS[config["model_class"]],
        [prompt for _, prompt in config["label_map"]],
        clip=str(clip),
        separation_weight=weight,
        **model_options(config),
    )
    load_model_file(model, ModelFile(str(checkpoint), read_checkpoint(checkpoint, "checkpoint")))
    return compiled(model)


def compiled(model: Method) -> Method:
    """The model; made by torch.compile, which takes minutes, where the environment has COMPILE=default."""
    compile_model(model, os.environ.get("COMPILE"))
    return model


def difference(ours: torch.Tensor | np.ndarray, theirs: np.ndarray) -> float:
    ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else ours
    return float(np.abs(ours - theirs).max())


def relative(ours: torch.Tensor, theirs: np.ndarray) -> float:
    """Largest difference in units of the largest true value."""
    return difference(ours, theirs) / max(float(np.abs(theirs).max()), 1e-30)
