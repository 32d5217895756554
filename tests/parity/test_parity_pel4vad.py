"""PEL4VAD against the released program."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from baselines import BaselineCase
from originals import each_case

NAMES = {"mil": "coarse", "pel": "text"}


@pytest.fixture(scope="module")
def original(case):
    return BaselineCase(case)


def build(original, **options):
    args = original.config["args"]
    texts = original.input("text_table")
    model = original.build(
        embed_dim=texts.shape[1],
        visual_width=args["feat_dim"],
        hidden_width=args["hid_dim"],
        output_width=args["out_dim"],
        attn_window=args["win_size"],
        causal_width=args["t_step"],
        dropout=args["dropout"],
        attention_norm="time" if args["norm"] else "none",
        text_weight=original.config["lamda"],
        **options,
    )
    # A random stand-in for the texts, as in the case.
    model.texts = F.normalize(texts, dim=-1)
    return model


def lengths_of(visual):
    return (visual != 0).any(dim=-1).sum(dim=1)


def losses_of(model, out, classes, lengths):
    targets = F.one_hot(torch.as_tensor(classes).long(), len(model.texts)).float()
    return model.losses(out, targets, lengths)


@each_case("pel4vad_")
def test_scores_of_a_whole_video(original):
    model, seen, visual = build(original).eval(), {}, original.input("eval_visual")
    attention = model.self_attention
    attention.self_attn.register_forward_hook(lambda _, __, out: seen.update({"self_attention.self_attn": out}))
    attention.norm.register_forward_hook(lambda _, __, out: seen.update({"self_attention.norm": out}))
    with torch.no_grad():
        out = model(visual)
    crops = model.scores(out).anomaly[0]
    seen["self_attention.loc_adj"] = attention.loc_adj(visual.shape[1])
    seen["window_mask"] = attention.self_attn.in_window(visual.shape[1], visual.device).float()
    seen |= {"context": out.context.transpose(1, 2), "crop_scores": crops, "scores": crops.mean(dim=0)}
    for kind in ("slide", "fixed"):
        model.score_smoothing, model.kappa = kind, original.config["kappa"]
        seen[f"scores_{kind}"] = model.scores(out).anomaly[0].mean(dim=0)
    original.check_all("eval", seen)


@each_case("pel4vad_")
@pytest.mark.parametrize("group", ["train", "masked"])
def test_losses_and_gradients(original, group):
    model, visual = build(original).train(), original.input("visual")
    lengths = lengths_of(visual)
    assert np.array_equal(lengths, original.outputs["train/lengths"])
    with original.dropout(group == "masked"):
        out = model(visual, lengths)
    found = losses_of(model, out, original.inputs["classes"], lengths)
    longest = int(lengths.max())
    original.check(f"{group}/scores", torch.sigmoid(out.coarse_logits).squeeze(-1)[:, :longest])
    original.check(f"{group}/context", out.context.transpose(1, 2)[..., :longest])
    terms = {name: found[ours] for name, ours in NAMES.items()}
    terms["pel"] = terms["pel"] / model.text_weight
    original.check_all(f"{group}_loss", {**terms, "total": sum(found.values())})
    sum(found.values()).backward()
    # The slope of the square root at 0 has no bound: what rounding makes of it depends on the processor.
    relative = 1e-4 if original.config["args"]["norm"] else 0
    original.check_all("grad" if group == "train" else "masked_grad", original.gradients(model), relative)


@each_case("pel4vad_")
def test_three_steps(original):
    """The second of the ucf batches is padded: its longest video is shorter than T."""
    model, visual, rows = build(original).train(), original.input("steps_visual"), []

    def losses(step):
        lengths = lengths_of(visual[step])
        found = losses_of(model, model(visual[step], lengths), original.inputs["steps_classes"][step], lengths)
        rows.append([float(found["coarse"]), float(found["text"]) / model.text_weight, float(sum(found.values()))])
        return found

    with original.dropout(masked=False):
        original.steps(model, losses)
    assert original.config["steps_losses_columns"] == ["mil", "pel", "total"]
    original.check("steps_losses", torch.tensor(rows, dtype=torch.float64))
    original.check_final(model)
