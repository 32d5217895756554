"""Model files: ours, released ones, and what does not fit."""

from __future__ import annotations

import pytest
import torch

from clipfusionvad import create_model, load_weights
from clipfusionvad.datasets import XD
from clipfusionvad.engine.checkpoint import (
    make_hparams,
    model_content,
    read_model_file,
    released_state,
    state_without_clip,
)
from clipfusionvad.io.errors import UserError
from clipfusionvad.models.clip import load_clip

PROMPTS = ["normal", "fighting", "car accident"]
OPTIONS = {"embed_dim": 64, "visual_width": 64, "visual_length": 16, "attn_window": 8}


def build(method="clipfusionvad", seed=0, **options):
    torch.manual_seed(seed)
    return create_model(method, PROMPTS, clip="toy", **{**OPTIONS, **options})


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def clip():
    return load_clip("toy", 64)


@pytest.mark.parametrize("method", ["clipfusionvad", "vadclip"])
@pytest.mark.parametrize("form", ["ours", "bare", "training checkpoint", "released"])
def test_every_form_restores_the_weights(method, form, clip, tmp_path):
    trained, other = build(method, seed=1), build(method, seed=2)
    content = {
        "ours": model_content(make_hparams(trained, clip, XD, OPTIONS), state_without_clip(trained)),
        "bare": trained.state_dict(),
        "training checkpoint": {"epoch": 3, "model_state_dict": trained.state_dict(), "ap": 0.5},
        "released": released_state(trained, clip),
    }[form]
    torch.save(content, tmp_path / "model.pth")
    assert not same(trained, other)
    load_weights(other, tmp_path / "model.pth")
    assert same(trained, other)


def test_the_released_form_has_the_whole_of_clip_and_no_wrapper(clip):
    state = released_state(build(), clip)
    assert {key.removeprefix("clipmodel.") for key in state if key.startswith("clipmodel.")} == set(clip.state)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert {"disAdj.sigma", "gc1.residual.weight", "temporal.resblocks.0.attn.in_proj_weight"} <= set(state)


def test_clip_inside_a_file_replaces_the_models(tmp_path):
    trained, other = build(seed=1), build(seed=2)
    state = dict(trained.state_dict())
    state["clipmodel.text_projection"] = state["clipmodel.text_projection"] + 1
    torch.save(state, tmp_path / "model.pth")
    load_weights(other, tmp_path / "model.pth")
    assert torch.equal(other.clipmodel.text_projection, state["clipmodel.text_projection"])


MISFITS = {
    "missing linear.weight": lambda s: s.pop("linear.weight"),
    "unknown extra.weight": lambda s: s.update({"extra.weight": torch.ones(1)}),
    "classifier.weight is .1, 65. in the file and .1, 64.": lambda s: s.update(
        {"classifier.weight": torch.ones(1, 65)}
    ),
    "not finite, first in linear.bias": lambda s: s["linear.bias"].fill_(float("nan")),
}


@pytest.mark.parametrize("message", MISFITS)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(message, tmp_path):
    state = dict(build(seed=1).state_dict())
    MISFITS[message](state)
    torch.save(state, tmp_path / "model.pth")
    model, before = build(seed=2), build(seed=2)
    with pytest.raises(UserError, match=message):
        load_weights(model, tmp_path / "model.pth")
    assert same(model, before)


@pytest.mark.parametrize("content", [torch.ones(2), {}, {"model_state_dict": {}}, {"weight": "text"}, [1, 2]])
def test_files_without_weights(content, tmp_path):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        read_model_file(tmp_path / "model.pth")
