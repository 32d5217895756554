"""AnomalyCLIP's released files, there and back."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_anomalyclip import FRAMES, E, S, clip_under_prefix, small_batch, small_model, toy_clip
from torch import nn

from clipfusionvad.io.errors import UserError
from clipfusionvad.models.clip import ClipWeights, clip_in_checkpoint, tokenize


def released_shapes(classes, width, context, e, depth):
    """Names and shapes of a released file: CLIP's towers under names of their own, and the method's parts."""
    shapes = {
        "prompt_learner.ctx": (classes, context, width),
        "prompt_learner.token_prefix": (classes, 1, width),
        "prompt_learner.token_suffix": (classes, 76 - context, width),
        "selector_model.bn_layer.running_mean": (classes - 1,),
        "selector_model.bn_layer.running_var": (classes - 1,),
        "selector_model.bn_layer.num_batches_tracked": (),
        "temporal_model.projection.weight": (e, width),
        "temporal_model.projection.bias": (e,),
        "temporal_model.axial_attn.pos_emb.param_0": (1, e, S, 1),
        "temporal_model.axial_attn.pos_emb.param_1": (1, e, 1, FRAMES),
        "temporal_model.classifier.layer_norm.weight": (e,),
        "temporal_model.classifier.layer_norm.bias": (e,),
        "temporal_model.classifier.linear.weight": (1, e),
        "temporal_model.classifier.linear.bias": (1,),
    }
    places = {
        "visual": "image_encoder",
        "token_embedding": "token_embedding",
        "logit_scale": "selector_model.logit_scale",
    }
    for key, value in toy_clip().state.items():
        top, _, rest = key.partition(".")
        name = f"{places[top]}.{rest}".rstrip(".") if top in places else f"text_encoder.{key}"
        shapes[name] = tuple(value.shape)
    for unit, side in itertools.product(range(depth), "fg"):
        attention = f"temporal_model.axial_attn.layers.blocks.{2 * unit}.{side}.net.fn"
        ff = f"temporal_model.axial_attn.layers.blocks.{2 * unit + 1}.{side}.net"
        shapes |= {
            f"{attention}.norm.weight": (e,),
            f"{attention}.norm.bias": (e,),
            f"{attention}.fn.to_q.weight": (e, e),
            f"{attention}.fn.to_kv.weight": (2 * e, e),
            f"{attention}.fn.to_out.weight": (e, e),
            f"{attention}.fn.to_out.bias": (e,),
            f"{ff}.0.g": (1, e, 1, 1),
            f"{ff}.0.b": (1, e, 1, 1),
            f"{ff}.1.weight": (4 * e, e, 3, 3),
            f"{ff}.1.bias": (4 * e,),
            f"{ff}.3.weight": (e, 4 * e, 3, 3),
            f"{ff}.3.bias": (e,),
        }
    return shapes


@pytest.fixture
def released():
    model = small_model(depth=2)
    nn.init.normal_(model.text_encoder["text_projection"])
    return model, model.to_released(model.state_dict() | clip_under_prefix())


def test_released_names_and_shapes(released):
    _, state = released
    expected = released_shapes(classes=5, width=64, context=8, e=E, depth=2)
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())


def test_released_tokens_are_those_of_the_prompts(released):
    _, state = released
    texts = [f"X X X X X X X X {name}." for name in ("abuse", "car accident", "normal", "riot", "shooting")]
    words = toy_clip().state["token_embedding.weight"][tokenize(texts)]
    torch.testing.assert_close(state["prompt_learner.token_prefix"], words[:, :1])
    torch.testing.assert_close(state["prompt_learner.token_suffix"], words[:, 9:])


@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_released_file_gives_the_model_and_the_clip_in_it(released, prefix):
    visual = small_batch()
    model, state = released
    state = {prefix + key: value for key, value in state.items()}
    assert model.matches_state_dict(state) and not model.matches_state_dict({"u_head_video.weight": torch.zeros(1)})
    back = type(model).from_released(state)
    inside = clip_in_checkpoint(back, "file")
    assert isinstance(inside, ClipWeights) and inside.state.keys() == toy_clip().state.keys()
    for key, value in toy_clip().state.items():
        # The file's projection is the fine-tuned one.
        tuned = key == "text_projection"
        expected = model.text_encoder["text_projection"] if tuned else value
        assert torch.equal(inside.state[key], expected), key
    other = small_model(depth=2, seed=9)
    missing, unknown = other.load_state_dict(back, strict=False)
    assert missing == ["ncentroid"]
    assert all(key.startswith(("clipmodel.visual.", "clipmodel.logit_scale")) for key in unknown)
    with torch.no_grad():
        assert torch.equal(model(visual).fine_logits, other(visual).fine_logits)


def test_what_released_code_cannot_load_is_not_exported():
    whole = clip_under_prefix()
    for options in ({"prompts": "direct"}, {"prompts": "fixed"}, {"temporal": "long"}, {"recentre": False}):
        model = small_model(**options)
        with pytest.raises(UserError, match="none of the ablations"):
            model.to_released(model.state_dict() | whole)
    model = small_model()
    with pytest.raises(UserError, match="vision transformer"):
        model.to_released(model.state_dict())
