"""DeepMIL against both released programs."""

import pytest
import torch
from baselines import BaselineCase
from originals import each_case


@pytest.fixture(scope="module")
def original(case):
    return BaselineCase(case)


def build(original):
    config = original.config
    first, second = config["args"]["hidden"]
    return original.build(
        visual_width=config["args"]["n_features"],
        hidden_width=first,
        second_width=second,
        dropout=config["args"]["dropout"],
        score_dropout=config["dropout_on_the_score"],
        second_relu=config["relu_between_fc2_and_fc3"],
        norm_weight=config["loss"]["l2_norm_weight_per_layer"] or 0.0,
    )


def terms(model, original, visual):
    return model.losses(model(visual), original.targets, torch.full((len(visual),), visual.shape[1]))


@each_case("deepmil_")
def test_scores_of_a_whole_video(original):
    model = build(original).eval()
    crops = [torch.from_numpy(model.score_video(crop)[0]) for crop in original.input("eval_visual")]
    original.check("eval/crop_scores", torch.stack(crops))
    original.check("eval/scores", torch.stack(crops).mean(dim=0))


@each_case("deepmil_")
@pytest.mark.parametrize("group", ["train", "masked"])
def test_losses_and_gradients(original, group):
    model = build(original).train()
    with original.dropout(group == "masked"):
        out = model(original.input("visual"))
        found = model.losses(out, original.targets, torch.full((6,), 32))
    original.check(f"{group}/scores", out.scores)
    total = sum(found.values())
    names = {"ranking": found["ranking"], "smooth_unweighted": found["smoothness"] / model.smoothness_weight}
    names |= {"sparsity_unweighted": found["sparsity"] / model.sparsity_weight, "total": total}
    if "norms" in found:
        names |= {"objective": total - found["norms"], "l2_norms": found["norms"]}
    original.check_all(f"{group}_loss", names)
    total.backward()
    original.check_all("grad" if group == "train" else "masked_grad", original.gradients(model))


@each_case("deepmil_")
def test_three_steps(original):
    model, visual = build(original).train(), original.input("steps_visual")
    with original.dropout(masked=False):
        found = original.steps(model, lambda step: terms(model, original, visual[step]))
    original.check("steps_losses", torch.tensor([sum(step.values()) for step in found]))
    original.check_final(model)
