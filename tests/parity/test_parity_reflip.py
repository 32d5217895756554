"""ReFLIP-VAD's released variant against the original model: label encoding, text features, logits, file layout."""

import numpy as np
import pytest
import torch
from originals import (
    assert_all_close,
    assert_mistakes_are_caught,
    compiled,
    compute_twice,
    difference,
    each_case,
    gradients_of,
    model_options,
    original_losses,
    read_config,
    separation,
    targets_of,
)

from clipfusionvad import create_model, load_weights
from clipfusionvad.engine.checkpoint import released_state
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.models.clip import load_clip

pytest.importorskip("transformers", reason="ReFLIP-VAD's prompt encoder needs: pip install transformers")

each_reflip = each_case("reflip_", holding="checkpoint.pth")


class Case:
    def __init__(self, folder, **options):
        config = self.config = read_config(folder)
        weight = {"separation_weight": separation(config)[0]} if "loss" in config else {}
        model = create_model(
            "reflipvad_repo",
            config.get("prompt_text") or [prompt for _, prompt in config["label_map"]],
            clip=str(folder / (config["clip"] or "checkpoint.pth")),
            prompt_encoder=str(folder / "distilbert"),
            **{**model_options(config), **weight, "residual": config.get("residual", True), **options},
        )
        load_weights(compiled(model), folder / "checkpoint.pth")
        self.model, self.outputs, inputs = model.eval(), np.load(folder / "outputs.npz"), np.load(folder / "inputs.npz")
        self.visual, self.lengths = torch.from_numpy(inputs["visual"]).float(), torch.from_numpy(inputs["lengths"])


@pytest.fixture(scope="module")
def original(case):
    return Case(case)


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
            masked = model.distilbert_model(ids, attention_mask=(ids != 0).long())
            return {
                "distilbert_last_hidden_state": model.distilbert_model(ids).last_hidden_state,
                "distilbert_mean_over_all_positions": model.encode_labels(),
                "distilbert_with_attention_mask_FOR_CONTRAST": masked.last_hidden_state,
            }

    results = compute_twice(model, compute)
    assert_all_close(results, outputs)
    # Where no label is padded, the mask changes nothing.
    if (ids == 0).any():
        contrast = outputs["distilbert_with_attention_mask_FOR_CONTRAST"]
        wrong = (contrast * (ids != 0).numpy()[..., None]).sum(1) / (ids != 0).sum(1, keepdim=True).numpy()
        assert difference(results[0]["distilbert_mean_over_all_positions"], wrong) > 1e-2


@each_reflip
@pytest.mark.parametrize("prefix", ["eval", "eval_noresidual", "eval_residual", "eval_nolengths"])
def test_eval_forward(case, prefix, original):
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

    (logits, text), (exact, exact_text) = compute_twice(found.model, compute)
    assert_all_close((logits, exact), found.outputs)
    assert_mistakes_are_caught((logits, exact), found.outputs)
    assert_all_close((text, exact_text), found.outputs, relative=1e-4)


@each_reflip
def test_losses_and_gradients(case, original):
    """In eval mode: DistilBERT's dropout is the only thing that training mode would add."""
    found, outputs = original, original.outputs
    recorded_losses = [name for name in outputs.files if "_loss" in name]
    recorded_gradients = [name for name in outputs.files if name.startswith("grad/")]
    if not recorded_losses + recorded_gradients:
        pytest.skip("the case records neither losses nor gradients")
    targets = targets_of(found.config, found.config["labels"])

    def compute(model):
        losses = model.losses(model(found.visual, found.lengths), targets, found.lengths)
        ours = original_losses(losses, found.config)
        model.zero_grad()
        ours["loss"].backward()
        terms = {name: ours[name.rsplit("_", 1)[1]] for name in recorded_losses}
        return terms, gradients_of(model, recorded_gradients)

    (losses, gradients), (exact, exact_gradients) = compute_twice(found.model, compute)
    assert_all_close((losses, exact), outputs, relative=1e-4)
    assert_all_close((gradients, exact_gradients), outputs, relative=1e-4, floor=1e-3)


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
