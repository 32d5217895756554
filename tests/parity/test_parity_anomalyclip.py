"""AnomalyCLIP against the original: text, test and training passes, selection, losses, gradients, BatchNorm."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cases import each_case
from originals import compiled, difference, read_config, relative

from clipfusionvad.engine.checkpoint import load_model_file, load_weights, read_model_file
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.models import build_method
from clipfusionvad.models.anomalyclip import AnomalyCLIP, segment_masks
from clipfusionvad.models.clip import clip_in_checkpoint, load_clip, openai_clip

# What the cases say that is no option of the model: data, and CLIP's name.
NOT_OPTIONS = {"labels_file", "normal_id", "stride", "ncrops", "arch", "load_from_features"}
TERMS = ("dir_abn", "dir_nor", "topk_abn", "bottomk_abn", "topk_nor", "smooth", "sparse")
each_model = each_case("anomalyclip_")


class Case:
    """A case with its model; ``order`` holds the class id of each of our columns, the normal one first."""

    def __init__(self, folder):
        self.folder, self.config = folder, read_config(folder)
        self.inputs, self.outputs = np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")
        self.args, names = self.config["args"], self.config["classnames"]
        self.normal = self.args["normal_id"]
        self.order = [self.normal, *(number for number in range(len(names)) if number != self.normal)]
        self.file = read_model_file(folder / "checkpoint.pth")
        self.clip = clip_in_checkpoint(self.file.state, "the checkpoint") or load_clip(
            str(folder / (self.config["clip"] or "checkpoint.pth"))
        )
        self.model = self.make()
        load_model_file(self.model, self.file)

    def make(self):
        options = {key: value for key, value in self.args.items() if key not in NOT_OPTIONS}
        weights = {f"{term}_weight": self.config["loss_args"][f"lambda_{term}"] for term in TERMS}
        names = [self.config["classnames"][number] for number in self.order]
        widths = {"embed_dim": self.clip.text_width, "visual_width": self.clip.embed_dim}
        model = build_method(AnomalyCLIP.name, names, self.clip, **options, **weights, **widths)
        model.ncentroid.copy_(read_checkpoint(self.folder / "ncentroid.pt", "ncentroid"))
        return compiled(model)

    def originals_order(self, values):
        """Our columns of the anomalous classes (…, C−1) in the order of their ids."""
        return values[..., np.argsort(self.order[1:])]

    def assert_scores(self, name, features):
        """Features (L, D), through windows, forward pass and back, are the recorded outputs of a test."""
        model, sampling = self.model.eval(), self.model.sampling
        windows, lengths = sampling.windows(features.astype(np.float32))
        with torch.no_grad():
            out = model(torch.from_numpy(windows), torch.from_numpy(lengths))
            text = model.encode_text()
        similarity = sampling.restore(out.similarity.flatten(0, 1).numpy(), len(features))
        similarity = self.originals_order(similarity).repeat(self.args["stride"], axis=0)
        assert difference(similarity, self.outputs[f"{name}_similarity"]) < 1e-5
        anomaly, classes = model.score_windows(windows, lengths, text)
        scores = sampling.restore(anomaly[0], len(features)).repeat(self.args["stride"])
        assert difference(scores, self.outputs[f"{name}_scores"]) < 1e-5
        classes = sampling.restore(classes, len(features)).repeat(self.args["stride"], axis=0)
        logits = torch.from_numpy(self.outputs[f"{name}_similarity"]).double()
        joint = logits.softmax(dim=1).numpy() * self.outputs[f"{name}_scores"][:, None]
        assert difference(self.originals_order(classes[:, 1:]), joint) < 1e-5
        assert difference(classes[:, 0], 1 - self.outputs[f"{name}_scores"]) < 1e-5


@pytest.fixture(scope="module")
def loaded():
    return {}


@pytest.fixture
def original(case, loaded):
    if case not in loaded:
        loaded[case] = Case(case)
    return loaded[case]


@each_model
def test_text(case, original):
    model, outputs = original.model, original.outputs
    with torch.no_grad():
        text = model.encode_text()
        prompts = model.prompt_learner.embed(model.clipmodel)
    assert relative(text[np.argsort(original.order)], outputs["text_features"]) < 1e-4
    # Ours end at the last EOT, and stand in the order of the parameters, as the original's do.
    assert difference(prompts, outputs["prompts"][:, : prompts.shape[1]]) < 1e-5
    ends = original.inputs["tokenized_prompts"].argmax(axis=1)
    np.testing.assert_array_equal(model.prompt_learner.layout.ends, ends)
    np.testing.assert_array_equal(
        model.prompt_learner.tokens, original.inputs["tokenized_prompts"][:, : prompts.shape[1]]
    )


@each_model
def test_eval_forward(case, original):
    np.testing.assert_array_equal(original.model.ncentroid, original.inputs["ncentroid"])
    names = [key.removesuffix("_features") for key in original.inputs.files if key.startswith("eval_s")]
    assert names
    for name in names:
        original.assert_scores(name, original.inputs[f"{name}_features"][0, 0])


@each_model
def test_eval_from_images(case, original):
    openai_clip()
    from clip.model import build_model

    # The image encoder is read from the checkpoint, what it lacks from CLIP's own file.
    inside = {key.removeprefix("clipmodel."): value for key, value in original.file.state.items() if "visual." in key}
    encoder = build_model(original.clip.state | inside).float().eval()
    for name in (key for key in original.inputs.files if key.startswith("eval_images")):
        images = torch.from_numpy(original.inputs[name]).float().flatten(0, 1)
        with torch.no_grad():
            features = encoder.encode_image(images).numpy()
        assert relative(features, original.outputs[f"{name}_image_features"]) < 1e-4
        original.assert_scores(name, features)


@each_model
def test_train_pass(case, original):
    inputs, outputs = original.inputs, original.outputs
    model = copy.deepcopy(original.model).train()
    assert model.dropout == (0, 0), "the recorded selection knows no dropped segments"
    labels = inputs["train_labels"]
    targets = torch.from_numpy((labels[:, None] == original.order).astype(np.float32))
    visual = torch.from_numpy(inputs["train_features"][:, 0]).float()
    out = model(visual)
    chosen = {}
    choose = model.choose_segments
    model.choose_segments = lambda *given: chosen.setdefault("both", choose(*given))
    losses = model.losses(out, targets, torch.full((len(visual),), visual.shape[1]))
    total = sum(losses.values())
    total.backward()

    similarity = original.originals_order(out.similarity.detach())
    assert difference(similarity.flatten(0, 1), outputs["train_logits"]) < 1e-5
    assert difference(out.coarse_logits.sigmoid().flatten(), outputs["train_scores"]) < 1e-5
    top, bottom = chosen["both"]
    abnormal = labels != original.normal
    np.testing.assert_array_equal(top[abnormal], outputs["train_idx_topk_abn"])
    np.testing.assert_array_equal(top[~abnormal], outputs["train_idx_topk_nor"])
    np.testing.assert_array_equal(bottom[abnormal], outputs["train_idx_bottomk_abn"])
    grid = similarity.unflatten(1, model.grid)
    frames = grid[torch.arange(len(grid))[:, None], top].flatten(0, 2)
    assert difference(frames, outputs["train_logits_topk"]) < 1e-5

    weights = original.config["loss_args"]
    assert losses.keys() == {term for term in TERMS if weights[f"lambda_{term}"]}
    for term, value in losses.items():
        assert relative(value, outputs[f"loss_l{term}"]) < 1e-4, term
    assert relative(total, outputs["loss_cost"]) < 1e-4

    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    recorded = {key.removeprefix("grad/"): outputs[key] for key in outputs.files if key.startswith("grad/")}
    assert gradients.keys() == recorded.keys()
    for name, gradient in recorded.items():
        scale = max(float(np.abs(gradient).max()), 1e-3)
        assert difference(gradients[name], gradient) < 1e-4 * scale, name
    norm = model.selector_model["bn_layer"]
    assert relative(norm.running_mean, outputs["bn_running_mean_after_train"]) < 1e-4
    assert relative(norm.running_var, outputs["bn_running_var_after_train"]) < 1e-4


@each_model
def test_segments_are_dropped_by_the_same_draws(case, original):
    outputs = original.outputs
    for name in (key.removesuffix("_topk") for key in outputs.files if key.startswith("mask_") and "topk" in key):
        # mask_equal_pRATE_seedSEED or mask_pTOP_pBOTTOM_seedSEED
        rates = [float(part[1:]) for part in name.split("_") if part.startswith("p")]
        torch.manual_seed(int(name.split("seed")[1]))
        top, bottom = segment_masks(outputs[f"{name}_topk"].shape, rates[0], rates[-1])
        np.testing.assert_array_equal(top, outputs[f"{name}_topk"])
        np.testing.assert_array_equal(bottom, outputs[f"{name}_bottomk"])


@each_model
def test_a_lightning_file_gives_the_same_model_and_the_way_back_the_same_file(case, original, tmp_path):
    released = read_checkpoint(case / "checkpoint.pth", "checkpoint")
    missing = {key: original.clip.state[key] for key in original.config["checkpoint_omits"]}
    torch.save({"state_dict": {f"net.{key}": value for key, value in released.items()}}, tmp_path / "last.ckpt")
    model = original.make()
    load_weights(model, tmp_path / "last.ckpt")
    for name, value in original.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name

    whole = {f"clipmodel.{key}": value for key, value in original.clip.state.items()}
    back = model.to_released(model.state_dict() | whole)
    released |= missing
    assert set(original.config["state_dict_keys"]) <= back.keys() == released.keys()
    for name, value in released.items():
        assert difference(back[name], value.float().numpy()) < 1e-6, name


@each_model
def test_the_normal_class_need_not_come_first_alphabetically(case, original):
    assert original.model.rank.tolist() == original.order
