"""RTFM and CLIP-TSA against the released programs."""

import numpy as np
import pytest
import torch
from baselines import BaselineCase
from originals import each_case

from clipfusionvad.models.cliptsa import HardAttention, _SelectedShare

BLOCKS = ("conv_1", "conv_2", "conv_3", "conv_4", "non_local", "conv_5")
# The names of loss terms by method; those that are recorded without their weight.
TERMS = {"rtfm": {"bce": "bce", "smooth": "smoothness", "sparsity": "sparsity"}}
TERMS["cliptsa"] = {"cls" if name == "bce" else name: ours for name, ours in TERMS["rtfm"].items()}


@pytest.fixture(scope="module")
def original(case):
    return BaselineCase(case)


def build(original):
    args, config = original.config["args"], original.config
    if config["method"] == "cliptsa":
        sampling = {"selected_share": args["k"], "samples": args["num_samples"], "sigma": args["sigma"]}
        return original.build(visual_width=args["n_features"], **sampling)
    first, second = args["fc"]
    widths = {"first_width": first, "second_width": second, "branch_width": args["conv_width"]}
    return original.build(visual_width=args["n_features"], dropout=args["dropout"], **widths)


@pytest.fixture
def noise(monkeypatch):
    """Let the selection of CLIP-TSA take recorded draws: a list of arrays, one for each forward."""
    draws = []
    monkeypatch.setattr(HardAttention, "noise", lambda self, scores: draws.pop(0).to(scores))
    return draws


def losses_of(original, model, out):
    found = model.losses(out, original.targets, torch.full((len(out.scores),), out.scores.shape[1]))
    names = {name: found[ours] for name, ours in TERMS[original.config["method"]].items()}
    return {**names, "magnitude_unweighted": found["magnitude"] / model.magnitude_weight, "total": sum(found.values())}


@each_case("rtfm_")
def test_whole_videos_and_their_crops(original):
    model, seen = build(original).eval(), {}
    for name in BLOCKS:
        block = getattr(model.Aggregate, name)
        block.register_forward_hook(lambda _, __, out, name=name: seen.update({f"Aggregate.{name}": out}))
    model.Aggregate.register_forward_hook(lambda _, __, out: seen.update(Aggregate=out))
    with torch.no_grad():
        out = model(original.input("eval_visual")[None])
    original.check_all("eval", {**seen, "scores": out.scores[0], "magnitudes": out.magnitudes[0]})
    assert np.array_equal(model.score_video(original.input("eval_visual"))[0], out.scores[0])
    with torch.no_grad():
        out = model(original.input("eval_crops_visual")[None])
    original.check_all("eval_crops", {"scores": out.scores[0], "magnitudes": out.magnitudes[0]})


@each_case("rtfm_", "cliptsa_")
@pytest.mark.parametrize("group", ["train", "masked", "crops"])
def test_losses_and_gradients(original, noise, group):
    if not any(key.startswith(f"{group}/") for key in original.outputs.files):
        pytest.skip("the case records no training on several crops")
    model = build(original).train()
    if "noise_train" in original.inputs:
        noise.append(original.input("noise_train"))
    with original.dropout(group == "masked"):
        out = model(original.input("crops_visual" if group == "crops" else "visual"))
        found = losses_of(original, model, out)
    original.check(f"{group}/scores", out.scores)
    original.check(f"{group}/magnitudes", out.magnitudes)
    original.check_all(f"{group}_loss", found)
    found["total"].backward()
    if group != "crops":
        original.check_all("grad" if group == "train" else "masked_grad", original.gradients(model))
    if group == "train":
        buffers = {name: value for name, value in model.named_buffers()}
        original.check_all("train_buffer_after", buffers)
        original.check_all("buffers_after_train", buffers)


@each_case("rtfm_", "cliptsa_")
def test_selected_features_are_those_of_the_original(original, noise):
    model = build(original).train()
    if "noise_train" in original.inputs:
        noise.append(original.input("noise_train"))
    with original.dropout(masked=False), torch.no_grad():
        out = model(original.input("visual"))
        half = len(out.scores) // 2
        halves = {"normal": slice(None, half), "abnormal": slice(half, None)}
        chosen = {kind: model.select(out.magnitudes[rows]) for kind, rows in halves.items()}
    short = original.config["method"] == "cliptsa"
    for kind, rows in halves.items():
        features = out.features[rows, 0].gather(1, chosen[kind][..., None].expand(-1, -1, out.features.shape[3]))
        original.check(f"train/{'feat' if short else 'selected_features'}_{kind}", features)
        scores = out.scores[rows].gather(1, chosen[kind]).mean(dim=1)
        original.check(f"train/{'score' if short else 'top_scores'}_{kind}", scores)


@each_case("rtfm_", "cliptsa_")
def test_three_steps(original, noise):
    model, visual = build(original).train(), original.input("steps_visual")
    if "steps_noise" in original.inputs:
        noise.extend(original.input("steps_noise"))
    columns, rows = original.config["steps_losses_columns"], []

    def losses(step):
        found = losses_of(original, model, model(visual[step]))
        rows.append([float(found[name].detach()) for name in columns])
        return {"total": found["total"]}

    with original.dropout(masked=False):
        original.steps(model, losses)
    original.check("steps_losses", torch.tensor(rows, dtype=torch.float64))
    original.check_final(model)


@each_case("cliptsa_")
@pytest.mark.parametrize("draw", ["eval", "eval_second_noise", "eval_without_attention"])
def test_scores_of_a_whole_video(original, noise, draw):
    model = build(original).eval()
    if draw == "eval_without_attention":
        model.hard_attention = torch.nn.Identity()
    else:
        noise.append(original.input("noise_eval" if draw == "eval" else "noise_eval_second"))
    seen = {}
    for name, part in {"attended": model.hard_attention, "aggregated": model.Aggregate}.items():
        part.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        out = model(original.input("eval_visual")[0])
    if draw != "eval_without_attention":
        scorer = model.hard_attention.scorer
        hidden = torch.relu(scorer["fc1"](original.input("eval_visual")[0]))
        seen["importance"] = torch.sigmoid(scorer["fc2"](hidden)).squeeze(-1)
    original.check_all(draw, {**seen, "scores": out.scores[0], "magnitudes": out.magnitudes})


@each_case("cliptsa_")
def test_the_selection_and_its_released_gradient(original):
    """The original's whole operation, slot by slot, gives the recorded arrays, and ours its sum over slots."""
    scores, noise, upstream = (original.input(f"op_{name}") for name in ("scores", "noise", "upstream"))
    sigma, k = original.config["args"]["sigma"], upstream.shape[1]
    order = (scores[:, None] + sigma * noise).topk(k, dim=-1).indices.sort(dim=-1).values
    slots = torch.nn.functional.one_hot(order, scores.shape[1]).float()
    original.check("op/indicator", slots.mean(dim=1))

    def released(upstream):
        return torch.einsum("bskd,bse,bke->bd", slots, noise, upstream) / (noise.shape[1] * sigma)

    original.check("op/grad", released(upstream))
    same = upstream[:, :1].expand(-1, k, -1)
    given = scores.requires_grad_()
    share = _SelectedShare.apply(given, noise, sigma, torch.tensor(k), False)
    assert torch.allclose(share, slots.mean(dim=1).sum(dim=1), atol=1e-6)
    (share * upstream[:, 0]).sum().backward()
    assert torch.allclose(given.grad, released(same), rtol=1e-5, atol=1e-4 * released(same).abs().max())
