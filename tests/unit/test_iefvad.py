"""IEF-VAD against the formulas of its paper and released code, written out plainly."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad import create_model
from clipfusionvad.io.errors import UserError
from clipfusionvad.models import find_method

WIDTH, STEPS = 16, 20
LENGTHS = torch.tensor([20, 1, 17, 5])
TARGETS = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1]])
SMALL = {"visual_width": WIDTH, "visual_head": 4, "visual_length": STEPS, "num_refinement_steps": 3}


def small_model(seed=0, **options):
    torch.manual_seed(seed)
    return create_model("iefvad", ["normal", "fighting", "riot"], **{**SMALL, **options})


def roughen(model):
    """Give every parameter a value that matters: norms and biases start at one and zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(3)
    rgb, event = (torch.randn(4, STEPS, WIDTH, generator=generator) for _ in range(2))
    valid = (torch.arange(STEPS) < LENGTHS[:, None])[..., None]
    return rgb * valid, event * valid


def layer_norm(x, weights, name):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(x, weights, name, heads, keys):
    """One video (T, D); snippets look at the first ``keys`` of it."""
    q, k, v = np.split(x @ weights[f"{name}.in_proj_weight"].T + weights[f"{name}.in_proj_bias"], 3, axis=1)
    size = x.shape[1] // heads
    attended = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for t in range(len(x)):
            logits = np.array([q[t, part] @ k[s, part] / math.sqrt(size) for s in range(keys)])
            share = np.exp(logits - logits.max())
            attended[t, part] = (share / share.sum()) @ v[:keys, part]
    return linear(attended, weights, f"{name}.out_proj")


def plain_video(rgb, event, weights, keys, heads=4, layers=2, steps=3, step_size=0.5, nu=8, epsilon=1e-8):
    """The released forward pass for one video: w_I, w_E, z_R, logits, and both means and log variances."""
    precisions, means, log_variances = [], [], []
    for x, kind in ((rgb, "image"), (event, "event")):
        for layer in range(layers):
            attended = attention(x, weights, f"{kind}_attn_layers.{layer}", heads, keys)
            x = layer_norm(x + attended, weights, f"{kind}_norms.{layer}")
        hidden = layer_norm(x, weights, f"whiten_{kind}")
        means.append(linear(hidden, weights, f"{kind}_mu"))
        log_variances.append(linear(hidden, weights, f"{kind}_logvar"))
        precisions.append((nu + 1) / nu * np.exp(-log_variances[-1]))
    total = precisions[0] + precisions[1] + epsilon
    image_weight, event_weight = precisions[0] / total, precisions[1] / total
    z = image_weight * means[0] + event_weight * means[1]
    for step in range(steps):
        hidden = np.maximum(linear(z, weights, f"refinement_blocks.{step}.0"), 0)
        z = z - step_size * linear(hidden, weights, f"refinement_blocks.{step}.2")
    found = {"coarse_logits": linear(z, weights, "classifier"), "fused": z, "image_mu": means[0], "event_mu": means[1]}
    found |= {"image_logvar": log_variances[0], "event_logvar": log_variances[1]}
    return found | {"image_weight": image_weight, "event_weight": event_weight}


@pytest.mark.parametrize("mask_padding", [False, True])
def test_forward_equals_the_plain_formulation(pair, mask_padding):
    model = roughen(small_model(mask_padding=mask_padding)).eval().double()
    weights = {key.removeprefix("temporal."): value.numpy() for key, value in model.state_dict().items()}
    with torch.no_grad():
        out = model([stream.double() for stream in pair], LENGTHS)
    for video, length in enumerate(LENGTHS.tolist()):
        rgb, event = (stream[video].double().numpy() for stream in pair)
        expected = plain_video(rgb, event, weights, length if mask_padding else STEPS)
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(out, name)[video], value, rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("noise", ["student_t", "gaussian"])
@pytest.mark.parametrize("kl_noise", [None, "student_t", "gaussian"])
def test_losses_equal_loops_over_snippets(pair, mask_padding, noise, kl_noise):
    shifted = (kl_noise or noise) == "student_t"
    options = {"reg_weight": 0.3, "kl_weight": 0.7, "nu": 3, "mask_padding": mask_padding}
    model = roughen(small_model(noise_model=noise, kl_noise_model=kl_noise, **options)).eval()
    with torch.no_grad():
        out = model(pair, LENGTHS)
        losses = model.losses(out, TARGETS, LENGTHS)
    coarse, cosines, gaps, divergences = 0.0, [], [], []
    for video, length in enumerate(LENGTHS.tolist()):
        scores = sorted(torch.sigmoid(out.coarse_logits[video, :length, 0]).tolist(), reverse=True)
        k = length // 16 + 1
        p = sum(scores[:k]) / k
        coarse -= math.log(1 - p) if TARGETS[video, 0] else math.log(p)
        for t in range(length if mask_padding else STEPS):
            a, b = out.image_mu[video, t].double(), out.event_mu[video, t].double()
            cosines.append(float(1 - a @ b / (a.norm() * b.norm())))
            gaps.append(abs(float(a.norm() - b.norm())))
            for mu, logvar in ((a, out.image_logvar[video, t]), (b, out.event_logvar[video, t])):
                v = logvar.double() + (math.log(3 / 4) if shifted else 0)
                divergences.append(float(-0.5 * (1 + v - mu**2 - v.exp()).mean()))
    assert losses.keys() == {"coarse", "reg", "kl"}
    assert losses["coarse"].item() == pytest.approx(coarse / 4, rel=1e-4)
    assert losses["reg"].item() == pytest.approx(0.3 * (np.mean(cosines) + np.mean(gaps)), rel=1e-4)
    assert losses["kl"].item() == pytest.approx(0.7 * 2 * np.mean(divergences), rel=1e-4)


def test_a_pair_is_the_streams_side_by_side(pair):
    model = small_model().eval()
    with torch.no_grad():
        apart, joined = model(pair, LENGTHS), model(torch.cat(pair, dim=-1), LENGTHS)
        free = model(pair)
    assert torch.equal(apart.coarse_logits, joined.coarse_logits)
    assert torch.equal(apart.event_weight, joined.event_weight)
    assert torch.equal(apart.coarse_logits, free.coarse_logits), "lengths matter to the mask only"


@given(
    st.lists(st.tuples(*[st.floats(-60, 60)] * 2), min_size=1, max_size=8),
    st.sampled_from(["student_t", "gaussian"]),
    st.sampled_from([1e-8, 1e-3, 0.5]),
)
def test_weights_are_the_normalised_precisions(log_variances, noise, epsilon):
    factor = 9 / 8 if noise == "student_t" else 1
    image, event = torch.tensor(log_variances, dtype=torch.float64).T
    fuse = small_model(noise_model=noise, epsilon=epsilon).temporal.weights
    precisions = factor * torch.exp(-image), factor * torch.exp(-event)
    for ours, precision in zip(fuse(image, event), precisions, strict=True):
        torch.testing.assert_close(ours, precision / (precisions[0] + precisions[1] + epsilon), rtol=1e-6, atol=1e-12)


def test_weights_survive_variances_that_overflow():
    image = torch.tensor([500.0, -500, 500, -500], requires_grad=True)
    event = torch.tensor([-500.0, 500, 500, -500], requires_grad=True)
    image_weight, event_weight = small_model().temporal.weights(image, event)
    torch.testing.assert_close(image_weight, torch.tensor([0.0, 1, 0, 0.5]))
    torch.testing.assert_close(event_weight, torch.tensor([1.0, 0, 0, 0.5]))
    (image_weight + 2 * event_weight).sum().backward()
    assert image.grad.isfinite().all() and event.grad.isfinite().all()


def test_the_published_model_has_the_released_parameters():
    cls = find_method("iefvad")
    options = {"visual_width": 768, "visual_head": 8, "visual_layers": 2}
    with torch.device("meta"):
        state = create_model("iefvad", ["normal", "anomaly"], **options).state_dict()
    assert len(state) == 78 and all(key.startswith("temporal.") for key in state)
    assert sum(value.numel() for value in state.values()) == 23_633_665
    assert cls.matches_state_dict(state)
    assert not cls.matches_state_dict({"temporal.resblocks.0.ln_1.weight": torch.zeros(1)})


def test_other_inputs_are_refused():
    model = small_model()
    for shapes in ([(2, 5, 16), (2, 5, 8)], [(2, 5, 16), (2, 4, 16)], [(2, 5, 16)] * 3, [(2, 5, 16)]):
        visual = [torch.zeros(shape) for shape in shapes]
        with pytest.raises(UserError, match="rgb and event features of width 16 each"):
            model(visual if len(visual) > 1 else visual[0])
