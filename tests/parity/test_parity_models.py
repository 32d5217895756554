"""Forward passes, losses, gradients and eight optimizer steps against the original models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cases import cases, parity_dir
from originals import difference, load_original, read_config, relative, separation

from clipfusionvad.datasets import multi_hot
from clipfusionvad.models.layers.graph import similarity_adjacency

FOLDERS = list(itertools.chain(cases("clipfusion_"), cases("vadclip_")))
NONE = pytest.param(None, marks=pytest.mark.skip(reason=f"no model cases in {parity_dir()}; set PARITY_DIR"))
each_model = pytest.mark.parametrize("case", FOLDERS or [NONE], ids=lambda case: case.name if case else "none")


class Case:
    def __init__(self, folder):
        self.config = read_config(folder)
        self.model = load_original(folder, self.config, folder / "checkpoint.pth")
        self.inputs, self.outputs = np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")
        self.visual = torch.from_numpy(self.inputs["visual"]).float()
        self.lengths = torch.from_numpy(self.inputs["lengths"])
        self.targets = self.encode(self.config["labels"])

    def encode(self, labels):
        classes = [label for label, _ in self.config["label_map"]]
        return torch.from_numpy(multi_hot(labels, classes, multi_label=len(classes) == 7))


@pytest.fixture(scope="module")
def loaded(request):
    return {}


@pytest.fixture
def original(case, loaded):
    """A case with its model as loaded; optimizer steps work on one of their own."""
    if case not in loaded:
        loaded.clear()
        loaded[case] = Case(case)
    loaded[case].model.zero_grad()
    return loaded[case]


@each_model
def test_eval_forward(case, original):
    model, outputs = original.model.eval(), original.outputs
    with torch.no_grad():
        out = model(original.visual, original.lengths)
        free = model(original.visual)
        temporal = model.encode_temporal(original.visual)
        encoded = model.encode_video(original.visual, original.lengths)
        stages = {
            "eval_mid_temporal": temporal,
            "eval_mid_encode_video": encoded,
            "eval_adj": similarity_adjacency(temporal, original.lengths),
        }
        if "eval_mid_gam" in outputs:
            stages["eval_mid_gam"] = model.gam_attention(encoded)
        losses = model.losses(out, original.targets, original.lengths)
    assert difference(out.coarse_logits, outputs["eval_logits1"]) < 1e-5
    assert difference(out.fine_logits, outputs["eval_logits2"]) < 1e-5
    assert difference(free.coarse_logits, outputs["eval_nolengths_logits1"]) < 1e-5
    assert difference(free.fine_logits, outputs["eval_nolengths_logits2"]) < 1e-5
    assert relative(out.text_features, outputs["eval_text_features"]) < 1e-4
    for name, stage in stages.items():
        assert difference(stage, outputs[name]) < 1e-5, name
    assert relative(losses["coarse"], outputs["eval_loss1"]) < 1e-4
    assert relative(losses["fine"], outputs["eval_loss2"]) < 1e-4
    np.testing.assert_array_equal(original.targets, outputs["label_vectors"])


@each_model
def test_train_forward_losses_and_gradients(case, original):
    outputs = original.outputs
    # A copy of the buffers: training statistics must not leak into the eval test.
    model = original.model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    out = model(original.visual, original.lengths)
    losses = model.losses(out, original.targets, original.lengths)
    total = sum(losses.values())
    total.backward()
    buffers = dict(model.named_buffers())
    after = {key: buffers[key].clone() for key in buffers}
    model.load_state_dict(state)

    assert difference(out.coarse_logits, outputs["train_logits1"]) < 1e-5
    assert difference(out.fine_logits, outputs["train_logits2"]) < 2e-5
    assert relative(out.text_features, outputs["train_text_features"]) < 1e-4
    weight, included = separation(original.config)
    third = losses["separation"] if included else losses["separation"] / weight
    recorded = {
        "train_loss1": losses["coarse"],
        "train_loss2": losses["fine"],
        "train_loss3": third,
        "train_loss": total,
    }
    for name, value in recorded.items():
        assert relative(value, outputs[name].squeeze()) < 1e-4, name

    parameters = dict(model.named_parameters())
    for key in (name for name in outputs.files if name.startswith("grad/")):
        name = key.removeprefix("grad/")
        # The bias of a convolution before BatchNorm has a zero true gradient: only its noise can be compared.
        scale = max(float(np.abs(outputs[key]).max()), 1e-3)
        assert difference(parameters[name].grad, outputs[key]) < 1e-4 * scale, name
    without = set(original.config["params_with_no_grad"])
    assert {name for name, p in parameters.items() if p.requires_grad and p.grad is None} <= without
    for key in (name for name in outputs.files if name.startswith("train_buffer_after/")):
        assert relative(after[key.split("/")[1]].float(), outputs[key].astype(np.float32)) < 1e-4, key


@each_model
def test_eight_optimizer_steps(case):
    original = Case(case)
    config, model = original.config, original.model.train()
    settings = config["optimizer"]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=settings["lr"],
        betas=settings["betas"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    weight, included = separation(config)
    columns = config["steps_losses_columns"]
    assert columns == ["loss1", "loss2", "loss3", "loss"]
    for step, recorded in enumerate(original.outputs["steps_losses"]):
        visual = torch.from_numpy(original.inputs["steps_visual"][step]).float()
        lengths = torch.from_numpy(original.inputs["steps_lengths"][step])
        losses = model.losses(model(visual, lengths), original.encode(config["steps_labels"][step]), lengths)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        third = losses["separation"] if included else losses["separation"] / weight
        ours = [value.item() for value in (losses["coarse"], losses["fine"], third, total)]
        np.testing.assert_allclose(ours, recorded, atol=1e-4, rtol=1e-4, err_msg=f"step {step}")
    state = model.state_dict()
    # Weights wander where the true gradient is zero; elsewhere they agree far better than this.
    for key in (name for name in original.outputs.files if name.startswith("final/")):
        name = key.removeprefix("final/")
        if "spatial_attention" not in name:
            assert difference(state[name].float(), original.outputs[key]) < 5e-3, name
