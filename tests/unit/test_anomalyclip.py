"""AnomalyCLIP against plain formulas: forward pass, class order, normal centroid, prompts; and its released files."""

import math

import numpy as np
import pytest
import torch
from small_anomalyclip import CLASSES, FRAMES, TARGETS, E, S, clip_under_prefix, small_model, toy_clip
from small_anomalyclip import small_batch as visual_batch
from torch import nn

from clipfusionvad.datasets import find_dataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.models.clip import clip_in_checkpoint, tokenize


@pytest.fixture
def visual():
    return visual_batch()


def test_forward_equals_the_plain_formulas(visual):
    model = small_model()
    norm = model.selector_model["bn_layer"]
    nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    with torch.no_grad():
        out, text, centre = model(visual), model.encode_text(), model.ncentroid
        alphabetical = ["abuse", "car accident", "riot", "shooting"]
        for ours, prompt in enumerate(CLASSES[1:]):
            released = alphabetical.index(prompt)
            direction = text[CLASSES.index(prompt)] - centre
            direction = direction / direction.norm()
            for b, t in ((0, 0), (4, 7)):
                projected = (visual[b, t] - centre) @ direction
                expected = (projected - norm.running_mean[released]) / (norm.running_var[released] + 1e-5).sqrt()
                torch.testing.assert_close(out.similarity[b, t, ours], expected, atol=1e-4, rtol=1e-4)
        # From the similarities on: the temporal model and the joint probabilities.
        temporal = model.temporal_model
        grid = temporal.projection(visual - centre).view(5, S, FRAMES, E).permute(0, 3, 1, 2)
        logits = temporal.classifier(temporal.axial_attn(grid).permute(0, 2, 3, 1)).view(5, S * FRAMES)
        scores = model.scores(out)
    torch.testing.assert_close(out.coarse_logits[..., 0], logits)
    s = torch.sigmoid(logits)
    torch.testing.assert_close(scores.anomaly[0], s)
    torch.testing.assert_close(scores.classes[..., 0], 1 - s)
    torch.testing.assert_close(scores.classes[..., 1:], s[..., None] * out.similarity.softmax(-1))
    torch.testing.assert_close(out.fine_logits.softmax(-1), scores.classes)


# Class names in the order of their ids, which is that of the released parameters.
RELEASED = {
    "ucf": (
        "Abuse, Arrest, Arson, Assault, Burglary, Explosion, Fighting, Normal, RoadAccidents, Robbery, Shooting, "
        "Shoplifting, Stealing, Vandalism"
    ),
    "xd": "Abuse, Car_accident, Explosion, Fighting, Normal, Riot, Shooting",
}


@pytest.mark.parametrize("dataset", RELEASED)
def test_parameters_have_the_released_order_whatever_that_of_the_classes(dataset):
    released = [name.replace("_", " ") for name in RELEASED[dataset].split(", ")]
    prompts = find_dataset(dataset).prompts
    model = small_model(prompts)
    tokens = model.prompt_learner.tokens
    expected = tokenize([" ".join(["X"] * 8) + f" {name}." for name in released])
    assert torch.equal(tokens, expected[:, : tokens.shape[1]]) and not expected[:, tokens.shape[1] :].any()
    places = [[name.lower() for name in released].index(prompt.lower()) for prompt in prompts]
    assert model.rank.tolist() == places
    # Tensors of the anomalous classes alone have no column for the normal one.
    assert model.columns.tolist() == [place - (place > places[0]) for place in places[1:]]


def test_the_normal_centroid_is_the_mean_of_all_rows_and_the_model_needs_it(visual):
    rng = np.random.default_rng(0)
    videos = [(100 + rng.standard_normal((n, 64))).astype(np.float16) for n in (1, 40, 7)]
    model = small_model(centred=False)
    with pytest.raises(UserError, match=r"mean feature of the normal training videos.*set_normal_centroid\(\)"):
        model(visual)
    with pytest.raises(UserError, match="normal training videos, but there are none"):
        model.set_normal_centroid([])
    assert not model.has_normal_centroid
    model.set_normal_centroid(iter(videos))
    assert model.has_normal_centroid
    np.testing.assert_allclose(model.ncentroid, np.concatenate(videos).astype(np.float64).mean(axis=0), rtol=1e-6)


def test_without_recentring_similarity_is_a_cosine(visual):
    model = small_model(recentre=False, centred=False)
    with torch.no_grad():
        out, text = model(visual), model.encode_text()
        cosine = nn.functional.cosine_similarity(visual[:, :, None], text[1:], dim=-1)
        raw = model.temporal_model(visual, model.grid)
    torch.testing.assert_close(out.similarity, cosine / math.sqrt(1 + 1e-5), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.coarse_logits, raw)
    model.set_normal_centroid([np.ones((3, 64))])
    with torch.no_grad():
        torch.testing.assert_close(model(visual).coarse_logits, raw)


def test_context_may_start_as_words():
    model = small_model(ctx_init="a_photo_of_a", n_ctx=99)
    embedding = toy_clip().state["token_embedding.weight"]
    words = embedding[tokenize(["a photo of a"])[0, 1:5]]
    assert torch.equal(model.prompt_learner.ctx, words.expand(5, 4, 64))
    fixed = small_model(prompts="fixed", prompt_template="a photo of a {}.")
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(), fixed.encode_text())


def test_shared_context_is_one_for_all_classes():
    shared, own = small_model(shared_context=True, n_ctx=3), small_model(n_ctx=3)
    assert shared.prompt_learner.ctx.shape == (3, 64) and own.prompt_learner.ctx.shape == (5, 3, 64)
    with torch.no_grad():
        own.prompt_learner.ctx.copy_(shared.prompt_learner.ctx.expand(5, 3, 64))
        torch.testing.assert_close(shared.encode_text(), own.encode_text())


def test_frozen_projection_and_fixed_prompts_do_not_learn(visual):
    for options, learned in (
        ({"learn_projection": False}, {"prompt_learner.ctx"}),
        ({"prompts": "fixed"}, {"text_encoder.text_projection"}),
        ({"prompts": "fixed", "learn_projection": False}, set()),
        ({"prompts": "direct"}, {"prompt_learner.vectors"}),
    ):
        model = small_model(**options)
        sum(model.losses(model(visual), TARGETS, None).values()).backward()
        with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert {name for name in with_gradient if not name.startswith("temporal_model.")} == learned


def test_directions_may_be_learned_without_any_text(visual):
    model = small_model(prompts="direct")
    with torch.no_grad():
        out = model(visual)
        for column, place in enumerate(model.rank[1:]):
            direction = nn.functional.normalize(model.prompt_learner.vectors[place], dim=0)
            expected = (visual - model.ncentroid) @ direction / math.sqrt(1 + 1e-5)
            torch.testing.assert_close(out.similarity[..., column], expected, atol=1e-4, rtol=1e-4)


def test_another_text_width_is_named():
    with pytest.raises(UserError, match="--embed-dim 512, but CLIP toy has text width 64"):
        small_model(embed_dim=512)


@pytest.fixture
def released():
    model = small_model(depth=2)
    nn.init.normal_(model.text_encoder["text_projection"])
    return model, model.to_released(model.state_dict() | clip_under_prefix())


def test_released_names_and_tokens(released):
    _, state = released
    clip = {key for key in toy_clip().state if key.startswith("token_embedding.")} | {"selector_model.logit_scale"}
    clip |= {key.replace("visual", "image_encoder") for key in toy_clip().state if key.startswith("visual.")}
    clip |= {f"text_encoder.{key}" for key in toy_clip().state if key.startswith(("pos", "tr", "ln_", "text_"))}
    assert clip <= state.keys()
    parts = {"prompt_learner", "selector_model.bn_layer", "temporal_model"}
    assert all(key.startswith(tuple(parts)) for key in state.keys() - clip)
    assert state["temporal_model.axial_attn.layers.blocks.3.g.net.3.weight"].shape == (E, 4 * E, 3, 3)
    assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())
    texts = [f"X X X X X X X X {name}." for name in ("abuse", "car accident", "normal", "riot", "shooting")]
    words = toy_clip().state["token_embedding.weight"][tokenize(texts)]
    torch.testing.assert_close(state["prompt_learner.token_prefix"], words[:, :1])
    torch.testing.assert_close(state["prompt_learner.token_suffix"], words[:, 9:])


def test_a_released_file_gives_the_model_and_the_clip_in_it(released, visual):
    model, state = released
    assert model.matches_state_dict(state) and not model.matches_state_dict({"u_head_video.weight": torch.zeros(1)})
    back = type(model).from_released(state)
    inside = clip_in_checkpoint(back, "file")
    assert inside.state.keys() == toy_clip().state.keys()
    # The file's projection is the fine-tuned one.
    for key, value in (toy_clip().state | {"text_projection": model.text_encoder["text_projection"]}).items():
        assert torch.equal(inside.state[key], value), key
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
