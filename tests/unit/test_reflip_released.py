"""What ReFLIP-VAD's released code computes: VadCLIP with a DistilBERT term, and its files."""

from __future__ import annotations

import pytest
import torch
import yaml
from small_reflip import PROMPTS, SMALL, TARGETS, disturbed, small_batch, small_model

from clipfusionvad import create_model, load_weights
from clipfusionvad.cli.option_files import option_file_of
from clipfusionvad.datasets import find_dataset
from clipfusionvad.engine.checkpoint import model_content, read_model_file, released_state, state_without_clip
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import write_torch
from clipfusionvad.models import find_method
from clipfusionvad.models.clip import load_clip
from clipfusionvad.models.layers.text import PromptLayout

pytest.importorskip("transformers", reason="ReFLIP-VAD's prompt encoder needs: pip install transformers")


@pytest.fixture
def batch():
    return small_batch()


def test_labels_shift_all_their_prompt_embeddings():
    model = disturbed(small_model("reflipvad_repo")).eval()
    prompts, tower = model.prompts, model.clipmodel
    with torch.no_grad():
        ours = model.encode_text()
        words = torch.where(prompts.learned, model.text_prompt_embeddings.weight[: prompts.learned.shape[1]], 0)
        words = words + torch.where(prompts.learned, 0, tower.token_embedding(prompts.tokens))
        for row, ids in enumerate(model.label_ids):
            states = model.distilbert_model(ids[None]).last_hidden_state[0]
            mean = sum(states) / len(ids)
            expected = tower((words[row] + mean)[None], PromptLayout(prompts.layout.ends[row : row + 1]))[0]
            torch.testing.assert_close(ours[row], expected, atol=1e-3, rtol=1e-3)
        assert (model.label_ids == 0).any()  # padding, which counts in the mean


@pytest.mark.parametrize("prompts", ["learned", "fixed"])
def test_residual_changes_the_text_and_what_hangs_on_it(prompts, batch):
    with_term, without = (
        small_model("reflipvad_repo", prompts=prompts, residual=value).eval() for value in (True, False)
    )
    assert with_term.state_dict().keys() == without.state_dict().keys()
    with torch.no_grad():
        one, other = with_term(*batch), without(*batch)
    assert torch.equal(one.coarse_logits, other.coarse_logits)
    assert (one.text_features - other.text_features).abs().max() > 1e-2
    assert (one.fine_logits - other.fine_logits).abs().max() > 1e-2


@pytest.mark.parametrize("product", [True, False])
def test_without_the_term_it_is_vadclip(product, batch):
    model = disturbed(small_model("reflipvad_repo", residual=False, product=product)).eval()
    other = create_model("vadclip", PROMPTS, clip="toy", **SMALL, product=product).eval()
    other.load_state_dict({key: value for key, value in model.state_dict().items() if "distilbert" not in key})
    with torch.no_grad():
        ours, theirs = model(*batch), other(*batch)
        assert torch.equal(ours.coarse_logits, theirs.coarse_logits)
        assert torch.equal(ours.fine_logits, theirs.fine_logits)
        assert model.losses(ours, TARGETS, batch[1]) == other.losses(theirs, TARGETS, batch[1])


def test_distilbert_is_trained_along_and_widened_where_needed(batch):
    model = small_model("reflipvad_repo", embed_dim=128, visual_width=128)
    assert model.distilbert_projection.weight.shape == (128, 64)
    wide = torch.cat([batch[0], batch[0]], dim=-1)
    sum(model.losses(model(wide, batch[1]), TARGETS, batch[1]).values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("clipmodel."), name
    assert not [key for key in small_model("reflipvad_repo").state_dict() if "projection" in key and "clip" not in key]


def test_released_names_and_back():
    model, clip = small_model("reflipvad_repo"), load_clip("toy", 64)
    released = released_state(model, clip)
    assert {key for key in released if "clip" in key.lower()} == set()
    assert {f"ReFLIPmodel.{key}" for key in clip.state} <= released.keys()
    cls = find_method("reflipvad_repo")
    assert cls.matches_state_dict(released) and not cls.matches_state_dict(small_model().state_dict())
    old = {**released, "distilbert_model.embeddings.position_ids": torch.arange(77)[None]}
    back = cls.from_released(old)
    own = state_without_clip(model)
    assert {key for key in back if not key.startswith("clipmodel.")} == own.keys()
    assert all(torch.equal(back[key], own[key]) for key in own)
    torch.testing.assert_close(back["clipmodel.text_projection"], clip.state["text_projection"])


OLDER = {"method": "reflipvad", "dataset": "ucf", "clip": None, "clip_fingerprint": None}


@pytest.mark.parametrize(("variant", "method"), [("repo", "reflipvad_repo"), ("paper", "reflipvad")])
def test_older_records_of_variants_mean_a_method(variant, method, tmp_path):
    """Checkpoints, YAML files and flags of when both were one method, which had the options of both."""
    both = {name: find_method(name).declared_options() for name in ("reflipvad", "reflipvad_repo")}
    options = {key: option.default for declared in both.values() for key, option in declared.items()}
    options |= {"prompt_encoder": "toy", **SMALL}
    model = small_model(method)
    hparams = {**OLDER, "options": {**options, "variant": variant}}
    write_torch(tmp_path / "model.pth", model_content(hparams, state_without_clip(model)))
    file = read_model_file(tmp_path / "model.pth")
    assert file.method == method and file.hparams["options"].keys() == both[method].keys()
    load_weights(create_model("reflipvad", PROMPTS, clip="toy", **SMALL, variant=variant), tmp_path / "model.pth")

    record = {key: value for key, value in options.items() if value is not None}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({"method": "reflipvad", "variant": variant, **record}))
    parse = option_file_of(find_dataset("ucf")).parse_args
    for flags in (["--config", str(tmp_path / "options.yaml")], ["--method", "reflipvad", "--variant", variant]):
        args = parse(flags)
        assert args.method == method and not hasattr(args, "variant")
    with pytest.raises(UserError, match="--variant 'papr' .did you mean 'paper'"):
        small_model(variant="papr")
