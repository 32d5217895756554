"""DSANet against the released program."""

import numpy as np
import pytest
import torch
from baselines import BaselineCase, training_config
from originals import dataset_of, each_case, targets_of

from clipfusionvad.engine.checkpoint import load_weights, read_model_file
from clipfusionvad.engine.optimizer import BranchedAdamW, StableAdamW, make_optimizer
from clipfusionvad.models import create_model

TERMS = {
    "loss1_bce": "coarse",
    "loss2_align": "fine",
    "loss3_text": "separation",
    "loss4_event": "event",
    "loss5_background": "background",
    "consistency": "consistency",
    "gather": "gather",
}
LOGITS = {"logits1": "coarse_logits", "logits2": "fine_logits", "text_features": "text_features"}


@pytest.fixture(scope="module")
def original(case):
    return BaselineCase(case)


def build(original):
    config = original.config
    args = dict(config["args"])
    # The original takes these and does not use them, or uses them outside the model.
    for unused in ("num_class", "prompt_prefix", "prompt_postfix", "lr"):
        args.pop(unused)
    names = {"t_w": "adapter_share", "temp": "score_temperature", "loss2_weight": "fine_weight"}
    names |= {"normal_selection_ratio": "normal_share", "refiner_total_iters": "refiner_steps"}
    options = {names.get(name, name): value for name, value in args.items()}
    prompts = [prompt for _, prompt in config["label_map"]]
    model = create_model("dsanet", prompts, str(original.folder / config["clip"]), **options)
    file = original.folder / "checkpoint.pth"
    assert read_model_file(file).method == "dsanet"
    load_weights(model, file)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items() if not key.startswith("clipmodel.")}
    assert shapes == {k: v for k, v in config["state_dict"].items() if "clipmodel." not in k}
    return model


def losses_of(original, model, visual, lengths, labels):
    out = model(visual, lengths)
    found = model.losses(out, targets_of(original.config, labels), lengths)
    terms = {name: found[ours] for name, ours in TERMS.items()}
    terms["loss2_align"] = terms["loss2_align"] / model.fine_weight
    return out, {**terms, "total": sum(found.values())}


def check_logits(original, group, out):
    for name, field in LOGITS.items():
        original.check(f"{group}/{name}", getattr(out, field))
    original.check(f"{group}/logits3", out.event_logits[:, None])
    original.check(f"{group}/logits4", out.background_logits[:, None])


@each_case("dsanet_")
def test_outputs_of_every_part(original):
    model, seen = build(original).eval(), {}
    branch = model.video_anomaly_refiner

    def keep(name):
        return lambda _, __, out: seen.update({name: out})

    branch.dnp_extractor.register_forward_hook(keep("extractor"))
    branch.dnp_extractor[0].register_forward_hook(keep("dynamic_normal_patterns"))
    branch.bottleneck.register_forward_hook(keep("bottleneck"))
    branch.decoder[-1].register_forward_hook(keep("reconstructed_features"))
    model.linear.register_forward_hook(keep("visual_features"))
    out = model(original.input("visual"), torch.from_numpy(original.inputs["lengths"]).long())
    check_logits(original, "eval", out)
    for name in ("dynamic_normal_patterns", "bottleneck", "reconstructed_features", "visual_features"):
        original.check(f"eval/{name}", seen[name])
    original.check("eval/recon_error", out.error)
    original.check("eval/gather", out.distance.mean())


@each_case("dsanet_")
def test_scores_of_a_whole_video(original):
    model = build(original).eval()
    count = int(original.inputs["video_n"])
    anomaly, classes = scores_of(original, model)
    original.check_all("video", {**scored(anomaly, classes), "lengths": original.outputs["video/lengths"]})
    assert len(anomaly[0]) == count
    video = original.input("video").flatten(0, 1)[:count]
    found = model.score_video(video)
    assert np.allclose(found[0], anomaly[0], atol=1e-6) and np.allclose(found[1], classes, atol=1e-6)


def scores_of(original, model, text=None):
    count, windows = int(original.inputs["video_n"]), original.inputs["video"].astype(np.float32)
    lengths = original.outputs["video/lengths"].astype(np.int64)
    anomaly, classes = model.score_windows(windows, lengths, *([] if text is None else [text]))
    return anomaly[:, :count], classes[:count]


def scored(anomaly, classes):
    return {"scores": anomaly[0], "scores2": anomaly[1], "class_probabilities": classes}


@each_case("dsanet_")
def test_losses_and_gradients(original):
    model = build(original).train()
    lengths = torch.from_numpy(original.inputs["lengths"]).long()
    out, terms = losses_of(original, model, original.input("visual"), lengths, original.config["labels"])
    check_logits(original, "train", out)
    assert np.array_equal(targets_of(original.config, original.config["labels"]), original.outputs["labels"])
    original.check_all("train_loss", terms)
    terms["total"].backward()
    original.check_all("grad", {name: parameter.grad for name, parameter in model.named_parameters()})


@each_case("dsanet_")
@pytest.mark.parametrize("group", ["steps", "fast"])
def test_three_steps_of_both_optimizers(original, monkeypatch, group):
    """The weights of adaptive steps on gradients near zero are noise: losses, and how far each tensor moved."""
    model = build(original).train()
    with torch.no_grad():
        stale = model.encode_text()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = original.config["optimizer"]["main"]
    if group == "fast":
        config = config | {"lr": 1e-3}
        monkeypatch.setattr(StableAdamW, "factor", staticmethod(lambda step, total: 1.0))
    optimizer = make_optimizer(model, training_config(config), model.stable_branch, model.stable_steps)
    assert isinstance(optimizer, BranchedAdamW)
    columns, rows = original.config["steps_losses_columns"], []
    for step, visual in enumerate(original.input("steps_visual")):
        lengths = torch.from_numpy(original.inputs["steps_lengths"][step]).long()
        _, terms = losses_of(original, model, visual, lengths, original.config["steps_labels"][step])
        rows.append([float(terms[name].detach()) for name in columns])
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
    original.check(f"{group}_losses", torch.tensor(rows, dtype=torch.float64))
    if group == "fast":
        for name in (key.partition("/")[2] for key in original.outputs.files if key.startswith("fast_movement_norm/")):
            # The bias of keys has no true gradient.
            if name.endswith(("in_proj_bias", "kv.bias")):
                continue
            moved = (model.state_dict()[name] - before[name]).norm()
            recorded = original.outputs[f"fast_movement_norm/{name}"]
            assert abs(moved - recorded) <= 2e-3 * recorded + 1e-6, name
        model.eval()
        # The original keeps the text features of its first evaluation.
        for cache, text in (("stale", stale), ("fresh", model.encode_text().detach())):
            for name, value in scored(*scores_of(original, model, text)).items():
                original.check(f"fast_{cache}_cache/{name}", value)
        return
    state = model.state_dict()
    lr = config["lr"]
    for name in (key.partition("/")[2] for key in original.outputs.files if key.startswith("final/")):
        if not name.endswith(("in_proj_bias", "kv.bias")):
            off = (state[name] - torch.from_numpy(original.outputs[f"final/{name}"])).abs()
            assert off.max() <= 2 * lr and off.mean() <= 0.02 * lr, name


@each_case("dsanet_")
def test_rate_of_the_normality_branch(original):
    recorded = original.outputs["schedule_250_iterations"]
    lr = original.config["optimizer"]["refiner"]["lr"]
    ours = [lr * StableAdamW.factor(step, 250) for step in range(len(recorded))]
    assert np.allclose(ours, recorded, rtol=1e-5, atol=1e-12)
    total = original.config["args"]["refiner_total_iters"]
    first = [lr * StableAdamW.factor(step, total) for step in range(3)]
    assert np.allclose(first, original.outputs["steps_refiner_lr"], rtol=1e-5)


@each_case("dsanet_")
def test_class_names_are_those_of_the_original(original):
    prompts = [prompt.lower() for prompt in dataset_of(original.config).prompts]
    assert prompts == original.config["prompt_text_encoded"]
