"""The file formats of an exported model, by the suffix of the file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipfusionvad.engine.checkpoint import model_content, released_state, state_without_clip
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import atomic_write, write_torch
from clipfusionvad.io.foreign_checkpoints import SAFETENSORS, WEIGHTS, pack_safetensors, unpack_safetensors
from clipfusionvad.io.provenance import code
from clipfusionvad.models import Method
from clipfusionvad.models.clip import ClipWeights
from clipfusionvad.tools.export import graph
from clipfusionvad.tools.export.graph import Checked, Run
from clipfusionvad.tools.export.scorer import VideoScorer


@dataclass(frozen=True)
class TrainedModel:
    """What is exported: a model, its CLIP, its hyper-parameters, and its test metrics, if known."""

    model: Method
    clip: ClipWeights | None
    hparams: Mapping[str, Any]
    metrics: Mapping[str, Any] | None


@dataclass(frozen=True)
class Form:
    """``write`` leaves a file that was checked, or none; for a graph it returns the result of the check."""

    title: str
    write: Callable[[Path, TrainedModel], Checked | None]


def _write_graph(
    path: Path, trained: TrainedModel, to_bytes: Callable[..., bytes], load: Callable[[bytes, VideoScorer], Run]
) -> Checked:
    about = {**trained.hparams, "metrics": trained.metrics, "code": code()}
    with graph.clear_errors(trained.model):
        scorer = VideoScorer(trained.model)
        content = to_bytes(graph.export_program(scorer), scorer, about)
        checked = graph.check_graph(load(content, scorer), scorer, trained.model)
    with atomic_write(path) as file:
        file.write(content)
    return checked


def _write_weights(path: Path, trained: TrainedModel) -> None:
    state = state_without_clip(trained.model)
    content = pack_safetensors(model_content(trained.hparams, state, metrics=trained.metrics))
    read = unpack_safetensors(content, path)[WEIGHTS]
    if read.keys() != state.keys() or not all(torch.equal(read[key], state[key]) for key in state):
        raise UserError(f"safetensors changes the weights: {path} not written")
    with atomic_write(path) as file:
        file.write(content)


RELEASED = Form("released form", lambda path, trained: write_torch(path, released_state(trained.model, trained.clip)))
FORMS = {
    ".onnx": Form("ONNX", lambda path, model: _write_graph(path, model, graph.onnx_bytes, graph.run_onnx)),
    ".pt2": Form("torch.export", lambda path, model: _write_graph(path, model, graph.pt2_bytes, graph.run_pt2)),
    SAFETENSORS: Form("safetensors", _write_weights),
    ".pth": RELEASED,
    ".pt": RELEASED,
}


def form_of(path: str | Path) -> Form:
    """Return the form of a file's suffix; ``UserError`` for an unknown one."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMS:
        known = ", ".join(f"{suffix} ({form.title})" for suffix, form in FORMS.items())
        raise UserError(f"--output {path}: unknown suffix; the suffixes are {known}")
    return FORMS[suffix]
