"""IEF-VAD's forward pass, losses and gradients against the original."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from originals import assert_all_close, compiled, compute_twice, each_case, gradients_of, read_config

from clipfusionvad import create_model, load_weights
from clipfusionvad.datasets import multi_hot
from clipfusionvad.engine.checkpoint import read_model_file
from clipfusionvad.losses import gaussian_kl

NOISE = {"StudentT": "student_t", "Gaussian": "gaussian"}
# Weights of the regularisers, and the KL whatever the noise model, of the original's trainers.
TRAINERS = {"ucf": (1.0, None), "xd": (0.01, "student_t")}
FIELDS = {name: name for name in ("fused", "image_mu", "event_mu", "image_logvar", "event_logvar")}
FIELDS |= {"logits": "coarse_logits", "w_i": "image_weight", "w_e": "event_weight"}


class Case:
    def __init__(self, folder):
        self.folder, self.config = folder, read_config(folder)
        inputs = np.load(folder / "inputs.npz")
        self.pair = tuple(torch.from_numpy(inputs[name]).float() for name in ("img", "event"))
        self.lengths = torch.from_numpy(inputs["lengths"])
        self.outputs = np.load(folder / "outputs.npz")

    def model(self, **options):
        args = dict(self.config["args"])
        # The original takes these and does not use them.
        for unused in ("num_class", "embed_dim", "attn_window", "prompt_prefix", "prompt_postfix"):
            args.pop(unused, None)
        args["noise_model"] = NOISE[args["noise_model"]]
        model = create_model("iefvad", [prompt for _, prompt in self.config["label_map"]], **args, **options)
        load_weights(model, self.folder / "checkpoint.pth")
        return compiled(model.eval())

    def trained(self, trainer):
        """The model as a trainer of the original sets it up, and the targets of its labels."""
        weight, noise = TRAINERS[trainer]
        prefix = "" if trainer == "ucf" else f"{trainer}_"
        # Stable: only brings the normal class to the front, where ShanghaiTech's map does not have it.
        label_map = sorted(self.config[f"{prefix}label_map"], key=lambda item: item[1] != "normal")
        classes = [label for label, _ in label_map]
        targets = multi_hot(self.config[f"{prefix}labels"], classes, multi_label=trainer == "xd")
        return self.model(reg_weight=weight, kl_weight=weight, kl_noise_model=noise), torch.from_numpy(targets), weight


@pytest.fixture(scope="module")
def original(case):
    return Case(case)


@each_case("iefvad_")
def test_a_released_file_is_recognised_and_gives_the_outputs(case, original):
    file = read_model_file(case / "checkpoint.pth")
    assert file.method == "iefvad"
    shapes = {key: value.shape for key, value in original.model().state_dict().items()}
    assert {key: value.shape for key, value in file.state.items()} == shapes

    def compute(model):
        with torch.no_grad():
            out = model(original.pair)
            joined = model(torch.cat(original.pair, dim=-1), original.lengths)
        return [{f"eval_{name}": getattr(part, field) for name, field in FIELDS.items()} for part in (out, joined)]

    out, joined = zip(*compute_twice(original.model(), compute), strict=True)
    assert out[0].keys() == {name for name in original.outputs.files if name.startswith("eval_")}
    assert_all_close(out, original.outputs)
    assert_all_close(joined, original.outputs)


@each_case("iefvad_")
@pytest.mark.parametrize("trainer", TRAINERS)
def test_losses_and_gradients(case, original, trainer):
    model, targets, weight = original.trained(trainer)
    recorded = [name for name in original.outputs.files if name.startswith(f"grad_{trainer}/")]
    assert recorded or trainer != "ucf"

    def compute(model):
        out = model(original.pair, original.lengths)
        losses = model.losses(out, targets, original.lengths)
        sum(losses.values()).backward()
        with torch.no_grad():
            ours = {
                "loss_classification": losses["coarse"],
                "loss_reg": losses["reg"] / weight,
                "loss_cos_mean": (1 - F.cosine_similarity(out.image_mu, out.event_mu, dim=-1)).mean(),
                "loss_norm_mean": (out.image_mu.norm(dim=-1) - out.event_mu.norm(dim=-1)).abs().mean(),
                "kl_image": gaussian_kl(out.image_mu, out.image_logvar + model.kl_shift),
                "kl_event": gaussian_kl(out.event_mu, out.event_logvar + model.kl_shift),
                "loss_kl": losses["kl"] / weight,
                "loss": sum(losses.values()),
            }
        return {f"{trainer}_{name}": value for name, value in ours.items()}, gradients_of(model, recorded)

    terms, gradients = zip(*compute_twice(model, compute), strict=True)
    assert terms[0].keys() == {name for name in original.outputs.files if name.startswith(f"{trainer}_")}
    assert_all_close(terms, original.outputs, relative=1e-4)
    assert_all_close(gradients, original.outputs, relative=1e-4)
