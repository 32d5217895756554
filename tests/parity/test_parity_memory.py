"""UR-DMU and BN-WVAD, which share a transformer, against the released programs."""

import numpy as np
import pytest
import torch
from baselines import BaselineCase
from originals import each_case

from clipfusionvad.data.sampling import SegmentSampling
from clipfusionvad.models.urdmu import URDMU

TERMS = {
    "video_bce": "coarse",
    "normal_memory_on_anomalous": "normal_on_anomalous",
    "anomaly_memory_on_anomalous": "anomaly_on_anomalous",
    "normal_memory_on_normal": "normal_on_normal",
    "anomaly_memory_on_normal": "anomaly_on_normal",
    "triplet": "triplet",
    "kl": "kl",
    "distance": "distance",
}


@pytest.fixture(scope="module")
def original(case):
    return BaselineCase(case)


def build(original):
    args = original.config["args"]
    options = {"visual_width": args["input_size"], "hidden_width": args["hidden"], "visual_layers": args["layers"]}
    options |= {"visual_head": args["heads"], "head_width": args["dim_head"], "mlp_width": args["mlp_dim"]}
    options |= {"visual_length": original.inputs["visual"].shape[1]}
    if original.config["method"] == "urdmu":
        options |= {"classifier_width": args["classifier_hidden"], "dropout": args["dropout"]}
        return original.build(**options, anomaly_slots=args["a_nums"], normal_slots=args["n_nums"])
    options |= {"sample_ratio": args["ratio_sample"], "batch_ratio": args["ratio_batch"]}
    first, second = args["ratios"]
    return original.build(**options, first_ratio=first, second_ratio=second, kernels=tuple(args["kernel_sizes"]))


def watch(model):
    """Record what the shared modules return, under the names of the case."""
    seen = {}

    def keep(name):
        return lambda _, __, out: seen.update({name: out})

    model.embedding.register_forward_hook(keep("embedding"))
    model.selfatt.register_forward_hook(keep("selfatt"))
    for number, (attention, perceptron) in enumerate(model.selfatt.layers):
        attention.register_forward_hook(keep(f"layer{number}_attention_branch"))
        perceptron.register_forward_hook(keep(f"layer{number}_feedforward_branch"))
    return seen


@each_case("urdmu_", "bnwvad_")
@pytest.mark.parametrize("video", ["long", "short"])
def test_sampling(original, video):
    sampling = SegmentSampling(original.inputs["visual"].shape[1])
    original.check(f"resample/{video}", sampling.sample(original.inputs[f"resample_{video}"], None)[0])


@each_case("urdmu_")
def test_scores_of_a_whole_video_with_two_memories(original):
    model = build(original).eval()
    seen = watch(model)
    with torch.no_grad():
        out = model(original.input("eval_visual"))
        memories = {"A": model.Amemory(out.hidden), "N": model.Nmemory(out.hidden)}
    for name, (match, augmented) in memories.items():
        seen |= {f"{name}_att": match, f"{name}_aug": augmented}
    scores = model.scores(out).anomaly[0]
    seen |= {"mu_of_A_aug": out.anomaly_mu, "mu_of_N_aug": out.normal_mu}
    original.check_all("eval", {**seen, "crop_scores": scores, "scores": scores.mean(dim=0)})


@each_case("urdmu_")
@pytest.mark.parametrize("group", ["train", "masked"])
def test_losses_and_gradients_with_two_memories(original, monkeypatch, group):
    monkeypatch.setattr(URDMU, "noise", staticmethod(lambda mu: original.input("eps")))
    model = build(original).train()
    with original.dropout(group == "masked"):
        out = model(original.input("visual"))
        found = model.losses(out, original.targets, None)
    half = len(out.hidden) // 2
    seen = {"A_att": out.anomaly_match[half:], "A_Natt": out.anomaly_match[:half]}
    seen |= {"N_att": out.normal_match[:half], "N_Aatt": out.normal_match[half:]}
    for name, value in seen.items():
        original.check(f"{group}/{name}", value)
    for name in ("A_att", "N_att", "N_Aatt"):
        top = seen[name].topk(seen[name].shape[1] // 16 + 1, dim=1).indices.sort(dim=1).values
        assert np.array_equal(top, original.outputs[f"{group}/top_index_{name}"])
    weights = {name: original.config["loss"]["weights"][name] for name in TERMS}
    terms = {name: found[ours] / weights[name] for name, ours in TERMS.items()}
    original.check_all(f"{group}_loss", {**terms, "total": sum(found.values())})
    sum(found.values()).backward()
    original.check_all("grad" if group == "train" else "masked_grad", original.gradients(model))


@each_case("urdmu_")
def test_three_steps_with_two_memories(original, monkeypatch):
    draws = iter(original.input("steps_eps"))
    monkeypatch.setattr(URDMU, "noise", staticmethod(lambda mu: next(draws)))
    model, visual = build(original).train(), original.input("steps_visual")
    with original.dropout(masked=False):
        found = original.steps(model, lambda step: model.losses(model(visual[step]), original.targets, None))
    original.check("steps_losses", torch.tensor([sum(step.values()) for step in found]))
    original.check_final(model)


@each_case("bnwvad_")
def test_scores_of_a_whole_video_by_distance(original):
    model = build(original).eval()
    seen, head = watch(model), model.normal_head
    for name, module in (("bn1", head.bn1), ("bn2", head.bn2), ("features1", head.conv1), ("features2", head.conv2)):
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    head.conv3.register_forward_hook(lambda _, __, out: seen.update(logits=out))
    with torch.no_grad():
        out = model(original.input("eval_visual"))
    scores = out.coarse_logits.exp().squeeze(-1)
    seen |= {"distance1": out.first, "distance2": out.second, "classifier_scores": out.scores, "crop_scores": scores}
    averaged = (out.first.mean(dim=0) + out.second.mean(dim=0)) * out.scores.mean(dim=0)
    original.check_all("eval", {**seen, "scores": scores.mean(dim=0), "scores_4d_input": averaged})
    bounded = model.scores(out).anomaly[0]
    assert torch.allclose(bounded, scores / (1 + scores), atol=1e-6)


@each_case("bnwvad_")
def test_losses_and_gradients_by_distance(original):
    model = build(original).train()
    out = model(original.input("visual"))
    found = model.losses(out, original.targets, None)
    half = len(out.scores) // 2
    original.check("train/normal_scores", out.scores[:half])
    for number, distances in enumerate((out.first, out.second), start=1):
        original.check(f"train/distance{number}", distances)
        assert np.array_equal(model.select(distances[half:]), original.outputs[f"train/selected_abnormal{number}"])
        norm = getattr(model.normal_head, f"bn{number}")
        original.check(f"train/running_mean_after{number}", norm.running_mean)
        original.check(f"train/running_var_after{number}", norm.running_var)
    terms = {"normal": found["normal"], "mpp": found["first"] + found["second"], "total": sum(found.values())}
    terms |= {f"triplet{n}_unweighted": found[k] / w for n, k, w in ((1, "first", 5), (2, "second", 20))}
    original.check_all("train_loss", terms)
    sum(found.values()).backward()
    original.check_all("grad", original.gradients(model))


@each_case("bnwvad_")
def test_three_clipped_steps_by_distance(original):
    model, visual = build(original).train(), original.input("steps_visual")
    found = original.steps(model, lambda step: model.losses(model(visual[step]), original.targets, None), clip=1.0)
    original.check("steps_losses", torch.tensor([sum(step.values()) for step in found]))
    original.check_final(model)
