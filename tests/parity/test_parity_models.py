"""VadCLIP's family against the original models: forward passes, losses, gradients, optimizer steps, file layout."""

import importlib.util

import numpy as np
import originals
import pytest
import torch
from originals import assert_all_close, compute_twice, difference, each_case, gradients_of, original_losses, targets_of

from clipfusionvad import create_model, load_weights
from clipfusionvad.engine.checkpoint import released_state
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.models.clip import load_clip
from clipfusionvad.models.layers.dual_branch import similarity_adjacency

each_model = each_case("clipfusion_", "vadclip_")
each_reflip = each_case("reflip_", holding="checkpoint.pth")


def load_reflip(folder, config, **options):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("ReFLIP-VAD's prompt encoder needs: pip install transformers")
    weight = {"separation_weight": originals.separation(config)[0]} if "loss" in config else {}
    model = create_model(
        "reflipvad_repo",
        config.get("prompt_text") or [prompt for _, prompt in config["label_map"]],
        clip=str(folder / (config["clip"] or "checkpoint.pth")),
        prompt_encoder=str(folder / "distilbert"),
        **{**originals.model_options(config), **weight, "residual": config.get("residual", True), **options},
    )
    load_weights(originals.compiled(model), folder / "checkpoint.pth")
    return model.eval()


class Case:
    def __init__(self, folder, **options):
        config = self.config = originals.read_config(folder)
        if folder.name.startswith("reflip"):
            self.model = load_reflip(folder, config, **options)
        else:
            self.model = originals.load_original(folder, config, folder / "checkpoint.pth")
        self.inputs, self.outputs = np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")
        self.visual = torch.from_numpy(self.inputs["visual"]).float()
        self.lengths = torch.from_numpy(self.inputs["lengths"])
        self.targets = targets_of(config, config["labels"]) if "labels" in config else None


@pytest.fixture(scope="module")
def original(case):
    """A case with its model as loaded; optimizer steps work on one of their own."""
    return Case(case)


@each_model
def test_eval_forward(case, original):
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
        terms = {"eval_text_features": out.text_features}
        return found, terms | {"eval_loss1": losses["coarse"], "eval_loss2": losses["fine"]}

    results, terms = zip(*compute_twice(original.model, compute), strict=True)
    assert_all_close(results, original.outputs)
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

    logits, terms, gradients = zip(*compute_twice(original.model, compute), strict=True)
    assert_all_close(logits, outputs)
    assert_all_close(terms, outputs, relative=1e-4)
    # The bias of a convolution before BatchNorm has a zero true gradient: only its noise can be compared.
    assert_all_close(gradients, outputs, relative=1e-4, floor=1e-3)


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
        originals.assert_close(steps[step], exact_steps[step], recorded, f"step {step}", relative=1e-4, floor=1)
    # Weights wander where the true gradient is zero; elsewhere they agree far better than this.
    for key in (name for name in original.outputs.files if name.startswith("final/")):
        name = key.removeprefix("final/")
        if "spatial_attention" not in name:
            assert difference(state[name].float(), original.outputs[key]) < 5e-3, name


@each_reflip
def test_distilbert_is_the_one_described_and_encodes_labels_without_a_mask(case, original):
    model, outputs = original.model, original.outputs
    for name, value in original.config["distilbert"].items():
        # Later versions of transformers no longer keep the epsilon, which is a constant of theirs.
        assert getattr(model.distilbert_model.config, name, value) == value, name
    ids = model.label_ids
    np.testing.assert_array_equal(ids, outputs["distilbert_input_ids"])

    def compute(model):
        with torch.no_grad():
            return {
                "distilbert_last_hidden_state": model.distilbert_model(ids).last_hidden_state,
                "distilbert_mean_over_all_positions": model.encode_labels(),
            }

    assert_all_close(compute_twice(model, compute), outputs)


@each_reflip
@pytest.mark.parametrize("prefix", ["eval", "eval_noresidual", "eval_residual", "eval_nolengths"])
def test_reflip_forward(case, prefix, original):
    found = original
    if f"{prefix}_logits1" not in found.outputs:
        pytest.skip(f"the case records no {prefix}_*")
    if prefix in ("eval_residual", "eval_noresidual"):
        found = Case(case, residual=prefix == "eval_residual")

    def compute(model):
        with torch.no_grad():
            out = model(found.visual, None if prefix == "eval_nolengths" else found.lengths)
        text = {f"{prefix}_text_features": out.text_features}
        logits = {f"{prefix}_logits1": out.coarse_logits, f"{prefix}_logits2": out.fine_logits}
        return logits, text if f"{prefix}_text_features" in found.outputs else {}

    logits, text = zip(*compute_twice(found.model, compute), strict=True)
    assert_all_close(logits, found.outputs)
    assert_all_close(text, found.outputs, relative=1e-4)


@each_reflip
def test_reflip_losses_and_gradients(case, original):
    """In eval mode: DistilBERT's dropout is the only thing that training mode would add."""
    found, outputs = original, original.outputs
    recorded_losses = [name for name in outputs.files if "_loss" in name]
    recorded_gradients = [name for name in outputs.files if name.startswith("grad/")]
    if not recorded_losses + recorded_gradients:
        pytest.skip("the case records neither losses nor gradients")

    def compute(model):
        losses = model.losses(model(found.visual, found.lengths), found.targets, found.lengths)
        ours = original_losses(losses, found.config)
        model.zero_grad()
        ours["loss"].backward()
        terms = {name: ours[name.rsplit("_", 1)[1]] for name in recorded_losses}
        return terms, gradients_of(model, recorded_gradients)

    terms, gradients = zip(*compute_twice(found.model, compute), strict=True)
    assert_all_close(terms, outputs, relative=1e-4)
    assert_all_close(gradients, outputs, relative=1e-4, floor=1e-3)


@each_reflip
def test_the_released_file_and_ours_are_two_names_of_the_same(case, original):
    found = original
    prefixes, omitted = found.config["checkpoint_prefixes"], found.config.get("checkpoint_omits", {})
    released = read_checkpoint(case / "checkpoint.pth", "checkpoint")
    assert type(found.model).matches_state_dict(released)
    written = released_state(found.model, load_clip(str(case / found.config["clip"])))
    assert released.keys() <= written.keys()
    assert set(omitted) <= written.keys() - released.keys()
    assert all(key.startswith(prefixes["clip"]) for key in written.keys() - released.keys())
    for key, value in released.items():
        assert torch.equal(written[key].to(value.dtype), value), key
    inner = {key for key in found.model.state_dict() if key.startswith(prefixes["distilbert"])}
    assert inner == {key for key in released if key.startswith(prefixes["distilbert"])}
