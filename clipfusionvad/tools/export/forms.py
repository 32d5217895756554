"""The forms in which a trained model is exported, by the suffix of the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipfusionvad.engine.checkpoint import model_content, own_state, released_state
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import atomic_write, write_torch
from clipfusionvad.io.foreign_checkpoints import SAFETENSORS, WEIGHTS, pack_safetensors, unpack_safetensors
from clipfusionvad.io.provenance import code
from clipfusionvad.models import Method
from clipfusionvad.models.clip import ClipWeights
from clipfusionvad.tools.export.check import Checked, check_graph
from clipfusionvad.tools.export.graph import export_program, followed, onnx_bytes, pt2_bytes, run_onnx, run_pt2
from clipfusionvad.tools.export.scorer import VideoScorer


@dataclass(frozen=True)
class Subject:
    """What is exported: a model, its CLIP, what ``checkpoint.describe`` says of it, and its test metrics, if known."""

    model: Method
    clip: ClipWeights | None
    made: Mapping[str, Any]
    metrics: Mapping[str, Any] | None

    @property
    def about(self) -> dict[str, Any]:
        """What a graph says of itself in its file."""
        return {**self.made, "metrics": self.metrics, "code": code()}


@dataclass(frozen=True)
class Form:
    """``write`` leaves a file that was checked, or none; it gives what the check found, if the form is a graph."""

    title: str
    write: Callable[[Path, Subject], Checked | None]


def _write_onnx(path: Path, subject: Subject) -> Checked:
    with followed(subject.model):
        scorer = VideoScorer(subject.model)
        content = onnx_bytes(export_program(scorer), scorer, subject.about)
        checked = check_graph(run_onnx(content), scorer, subject.model)
    return _keep(path, content, checked)


def _write_pt2(path: Path, subject: Subject) -> Checked:
    with followed(subject.model):
        scorer = VideoScorer(subject.model)
        content = pt2_bytes(export_program(scorer), subject.about)
        checked = check_graph(run_pt2(content, scorer), scorer, subject.model)
    return _keep(path, content, checked)


def _keep(path: Path, content: bytes, checked: Checked) -> Checked:
    with atomic_write(path) as file:
        file.write(content)
    return checked


def _write_weights(path: Path, subject: Subject) -> None:
    state = own_state(subject.model)
    content = pack_safetensors(model_content(subject.made, state, metrics=subject.metrics))
    found = unpack_safetensors(content, path)[WEIGHTS]
    if found.keys() != state.keys() or not all(torch.equal(found[key], state[key]) for key in state):
        raise UserError(f"safetensors does not give back the weights that it was given: {path} not written")
    with atomic_write(path) as file:
        file.write(content)


def _write_released(path: Path, subject: Subject) -> None:
    write_torch(path, released_state(subject.model, subject.clip))


RELEASED = Form("released form", _write_released)
FORMS = {
    ".onnx": Form("ONNX", _write_onnx),
    ".pt2": Form("torch.export", _write_pt2),
    SAFETENSORS: Form("safetensors", _write_weights),
    ".pth": RELEASED,
    ".pt": RELEASED,
}


def form_of(path: str | Path) -> Form:
    """The form that a file's suffix says; ``UserError`` for another one."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMS:
        known = ", ".join(f"{suffix} ({form.title})" for suffix, form in FORMS.items())
        raise UserError(f"--output {path}: its suffix says no form to export to; there are {known}")
    return FORMS[suffix]
