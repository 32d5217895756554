"""AnomalyCLIP against the original: text, test and training passes, selection, losses, gradients, BatchNorm."""

import copy

import numpy as np
import pytest
import torch
from originals import assert_all_close, assert_close, compiled, compute_twice, difference, each_case, read_config

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

    def score(self, name, features, exact):
        """What a test computes of features (L, D), in float32 and float64, under the names of the recorded arrays."""
        stride = self.args["stride"]

        def compute(model):
            model, sampling = model.eval(), model.sampling
            given = features if next(model.parameters()).dtype == torch.float32 else exact
            windows, lengths = sampling.windows(given)
            with torch.no_grad():
                out = model(torch.from_numpy(windows), torch.from_numpy(lengths))
                text = model.encode_text()
            similarity = sampling.restore(out.similarity.flatten(0, 1).numpy(), len(features))
            anomaly, classes = model.score_windows(windows, lengths, text)
            classes = sampling.restore(classes, len(features)).repeat(stride, axis=0)
            return {
                f"{name}_similarity": self.originals_order(similarity).repeat(stride, axis=0),
                f"{name}_scores": sampling.restore(anomaly[0], len(features)).repeat(stride),
                f"{name}_joint": self.originals_order(classes[:, 1:]),
                f"{name}_normal": classes[:, 0],
            }

        return compute_twice(self.model, compute)

    def compare_crops(self, name, crops, exact):
        """Compare the scores of the features (crops, L, D) with the recorded outputs, crop by crop.

        ``exact`` are the features in float64.
        """
        rows = crops.shape[1] * self.args["stride"]
        scores, similarity = (self.outputs[f"{name}_{part}"] for part in ("scores", "similarity"))
        similarity = similarity.reshape(-1, similarity.shape[-1])
        # The recorded outputs are those of all crops, one after the other, or of the first crop only.
        recorded = len(similarity) // rows
        assert len(similarity) == recorded * rows and recorded in (1, len(crops))
        for crop in range(recorded):
            chosen = slice(crop * rows, (crop + 1) * rows)
            own_scores, own_similarity = scores.reshape(-1)[chosen], similarity[chosen]
            logits = torch.from_numpy(own_similarity).double()
            assert_all_close(
                self.score(name, crops[crop], exact[crop]),
                {
                    f"{name}_similarity": own_similarity,
                    f"{name}_scores": own_scores,
                    f"{name}_joint": logits.softmax(dim=1).numpy() * own_scores[:, None],
                    f"{name}_normal": 1 - own_scores,
                },
            )


@pytest.fixture(scope="module")
def original(case):
    return Case(case)


@each_model
def test_text(case, original):
    outputs, count = original.outputs, original.model.prompt_learner.tokens.shape[1]

    def compute(model):
        with torch.no_grad():
            return model.encode_text()[np.argsort(original.order)], model.prompt_learner.embed(model.clipmodel)

    (text, prompts), (exact_text, exact_prompts) = compute_twice(original.model, compute)
    assert_close(text, exact_text, outputs["text_features"], "text features", relative=1e-4)
    # Ours end at the last EOT, and stand in the order of the parameters, as the original's do.
    assert_close(prompts, exact_prompts, outputs["prompts"][:, : prompts.shape[1]], "prompts")
    layout, tokens = original.model.prompt_learner.layout, original.inputs["tokenized_prompts"]
    np.testing.assert_array_equal(layout.ends, tokens.argmax(axis=1))
    np.testing.assert_array_equal(original.model.prompt_learner.tokens, tokens[:, :count])
    # The normal class may have any place in the alphabet.
    assert original.model.rank.tolist() == original.order


@each_model
def test_eval_forward(case, original):
    np.testing.assert_array_equal(original.model.ncentroid, original.inputs["ncentroid"])
    names = [key.removesuffix("_features") for key in original.inputs.files if key.startswith("eval_s")]
    assert names
    for name in names:
        crops = original.inputs[f"{name}_features"][0].astype(np.float32)
        original.compare_crops(name, crops, crops.astype(np.float64))


@each_model
def test_eval_from_images(case, original, monkeypatch):
    openai_clip()
    from clip.model import LayerNorm, build_model

    # CLIP's own goes through float32 whatever it is given.
    monkeypatch.setattr(LayerNorm, "forward", torch.nn.LayerNorm.forward)
    # The image encoder is read from the checkpoint, what it lacks from CLIP's own file.
    inside = {key.removeprefix("clipmodel."): value for key, value in original.file.state.items() if "visual." in key}
    encoder = build_model(original.clip.state | inside).float().eval()
    for name in (key for key in original.inputs.files if key.startswith("eval_images")):
        images = torch.from_numpy(original.inputs[name]).float().flatten(0, -4)
        with torch.no_grad():
            features = encoder.encode_image(images)
            exact = copy.deepcopy(encoder).double().encode_image(images.double())
        recorded = original.outputs[f"{name}_image_features"].reshape(features.shape)
        assert_close(features, exact, recorded, name, relative=1e-4)
        crops, exact_crops = (part.unflatten(0, (original.args["ncrops"], -1)).numpy() for part in (features, exact))
        original.compare_crops(name, crops, exact_crops)


@each_model
def test_train_pass(case, original):
    inputs, outputs = original.inputs, original.outputs
    crops = inputs["train_features"].shape[1]
    labels = inputs["train_labels"].repeat(crops)
    targets = torch.from_numpy((labels[:, None] == original.order).astype(np.float32))
    visual = torch.from_numpy(inputs["train_features"]).float().flatten(0, 1)
    lengths = torch.full((len(visual),), visual.shape[1])
    abnormal = labels != original.normal
    weights = original.config["loss_args"]
    recorded_gradients = [key for key in outputs.files if key.startswith("grad/")]

    def compute(model):
        model = copy.deepcopy(model).train()
        assert model.dropout == (0, 0), "the recorded selection knows no dropped segments"
        out = model(visual)
        chosen = {}
        choose = model.choose_segments
        model.choose_segments = lambda *given: chosen.setdefault("both", choose(*given))
        losses = model.losses(out, targets, lengths)
        total = sum(losses.values())
        total.backward()
        assert losses.keys() == {term for term in TERMS if weights[f"lambda_{term}"]}

        similarity, (top, bottom) = original.originals_order(out.similarity.detach()), chosen["both"]
        np.testing.assert_array_equal(top[abnormal], outputs["train_idx_topk_abn"])
        np.testing.assert_array_equal(top[~abnormal], outputs["train_idx_topk_nor"])
        np.testing.assert_array_equal(bottom[abnormal], outputs["train_idx_bottomk_abn"])
        grid = similarity.unflatten(1, model.grid)
        logits = {
            "train_logits": similarity.flatten(0, 1),
            "train_scores": out.coarse_logits.sigmoid().flatten(),
            "train_logits_topk": grid[torch.arange(len(grid))[:, None], top].flatten(0, 2),
        }
        norm = model.selector_model["bn_layer"]
        terms = {f"loss_l{term}": value for term, value in losses.items()} | {
            "loss_cost": total,
            "bn_running_mean_after_train": norm.running_mean,
            "bn_running_var_after_train": norm.running_var,
        }
        gradients = {f"grad/{name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert gradients.keys() == set(recorded_gradients)
        return logits, terms, gradients

    logits, terms, gradients = zip(*compute_twice(original.model, compute), strict=True)
    assert_all_close(logits, outputs)
    assert_all_close(terms, outputs, relative=1e-4)
    assert_all_close(gradients, outputs, relative=1e-4, floor=1e-3)


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
