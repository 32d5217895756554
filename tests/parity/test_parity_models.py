"""Forward passes, losses, gradients and eight optimizer steps against the original models."""

import numpy as np
import pytest
import torch
from originals import (
    assert_all_close,
    assert_close,
    assert_mistakes_are_caught,
    compute_twice,
    difference,
    each_case,
    gradients_of,
    load_original,
    original_losses,
    read_config,
    targets_of,
)

from clipfusionvad.models.layers.dual_branch import similarity_adjacency

each_model = each_case("clipfusion_", "vadclip_")


class Case:
    def __init__(self, folder):
        self.config = read_config(folder)
        self.model = load_original(folder, self.config, folder / "checkpoint.pth")
        self.inputs, self.outputs = np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")
        self.visual = torch.from_numpy(self.inputs["visual"]).float()
        self.lengths = torch.from_numpy(self.inputs["lengths"])
        self.targets = targets_of(self.config, self.config["labels"])


@pytest.fixture(scope="module")
def original(case):
    """A case with its model as loaded; optimizer steps work on one of their own."""
    return Case(case)


def evaluated(original):
    """What a test computes, under the names of the recorded arrays."""

    def compute(model):
        model.eval()
        visual, lengths = original.visual.to(next(model.parameters()).dtype), original.lengths
        with torch.no_grad():
            out, free = model(visual, lengths), model(visual)
            temporal, encoded = model.encode_temporal(visual), model.encode_video(visual, lengths)
            found = {
                "eval_logits1": out.coarse_logits,
                "eval_logits2": out.fine_logits,
                "eval_nolengths_logits1": free.coarse_logits,
                "eval_nolengths_logits2": free.fine_logits,
                "eval_mid_temporal": temporal,
                "eval_mid_encode_video": encoded,
                "eval_adj": similarity_adjacency(temporal, lengths),
            }
            if "eval_mid_gam" in original.outputs:
                found["eval_mid_gam"] = model.gam_attention(encoded)
            losses = model.losses(out, original.targets, lengths)
        return found, {
            "eval_text_features": out.text_features,
            "eval_loss1": losses["coarse"],
            "eval_loss2": losses["fine"],
        }

    (ours, ours_terms), (exact, exact_terms) = compute_twice(original.model, compute)
    return (ours, exact), (ours_terms, exact_terms)


@each_model
def test_eval_forward(case, original):
    results, terms = evaluated(original)
    assert_all_close(results, original.outputs)
    assert_mistakes_are_caught(results, original.outputs)
    assert_all_close(terms, original.outputs, relative=1e-4)
    np.testing.assert_array_equal(original.targets, original.outputs["label_vectors"])


@each_model
def test_train_forward_losses_and_gradients(case, original):
    outputs = original.outputs
    recorded_gradients = [name for name in outputs.files if name.startswith("grad/")]
    without = set(original.config["params_with_no_grad"])

    def compute(model):
        model.train().zero_grad()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        out = model(original.visual, original.lengths)
        losses = original_losses(model.losses(out, original.targets, original.lengths), original.config)
        losses["loss"].backward()
        buffers = {key: value.clone() for key, value in model.named_buffers()}
        # Training statistics must not leak into other tests.
        model.load_state_dict(state)
        assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} <= without
        logits = {"train_logits1": out.coarse_logits, "train_logits2": out.fine_logits}
        terms = {"train_text_features": out.text_features}
        terms |= {f"train_{name}": value for name, value in losses.items()}
        terms |= {key: buffers[key.split("/")[1]] for key in outputs.files if key.startswith("train_buffer_after/")}
        return logits, terms, gradients_of(model, recorded_gradients)

    (ours, ours_terms, ours_gradients), (exact, exact_terms, exact_gradients) = compute_twice(original.model, compute)
    assert_all_close((ours, exact), outputs)
    assert_all_close((ours_terms, exact_terms), outputs, relative=1e-4)
    # The bias of a convolution before BatchNorm has a zero true gradient: only its noise can be compared.
    assert_all_close((ours_gradients, exact_gradients), outputs, relative=1e-4, floor=1e-3)


@each_model
def test_eight_optimizer_steps(case):
    original = Case(case)
    config, settings = original.config, original.config["optimizer"]
    assert config["steps_losses_columns"] == ["loss1", "loss2", "loss3", "loss"]

    def train(model):
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        kept = {key: settings[key] for key in ("lr", "betas", "eps", "weight_decay")}
        optimizer = torch.optim.AdamW(trained, **kept)
        steps = []
        for visual, lengths, labels in zip(
            torch.from_numpy(original.inputs["steps_visual"]).float(),
            torch.from_numpy(original.inputs["steps_lengths"]),
            config["steps_labels"],
            strict=True,
        ):
            losses = model.losses(model(visual, lengths), targets_of(config, labels), lengths)
            losses = original_losses(losses, config)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            steps.append([value.item() for value in losses.values()])
        return np.array(steps), model.state_dict()

    (steps, state), (exact_steps, _) = compute_twice(original.model, train)
    for step, recorded in enumerate(original.outputs["steps_losses"]):
        assert_close(steps[step], exact_steps[step], recorded, f"step {step}", relative=1e-4, floor=1)
    # Weights wander where the true gradient is zero; elsewhere they agree far better than this.
    for key in (name for name in original.outputs.files if name.startswith("final/")):
        name = key.removeprefix("final/")
        if "spatial_attention" not in name:
            assert difference(state[name].float(), original.outputs[key]) < 5e-3, name
