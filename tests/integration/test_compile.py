"""torch.compile: every method is one graph, without a break, and its numbers stay."""

import os

import pytest
import torch
from tiny import skip_without_packages

from clipfusionvad.datasets import UCF
from clipfusionvad.models import build_method, find_method, method_names
from clipfusionvad.models.clip import load_clip
from clipfusionvad.models.urdmu import URDMU
from clipfusionvad.tools.demo import method_settings

pytestmark = pytest.mark.slow

WIDTH = 64
on_gpu = pytest.mark.skipif(os.environ.get("TEST_DEVICE") != "cuda", reason="needs a GPU and TEST_DEVICE=cuda")
# On a CPU everything but the kernels, which a compiler would take a minute for; on a GPU also its CUDA graphs.
WAYS = [
    pytest.param("cpu", {"backend": "aot_eager"}, id="cpu"),
    pytest.param("cuda", {"mode": "reduce-overhead"}, marks=on_gpu, id="cuda"),
]


def make(name):
    method = find_method(name)
    known = method.option_names()
    options = {key: WIDTH for key in ("embed_dim", "visual_width") if key in known}
    options |= {key: value for key, value in method_settings(name).items() if key in known}
    torch.manual_seed(0)
    model = build_method(name, UCF.prompts, load_clip("toy", WIDTH) if method.needs_clip else None, **options)
    model.set_normal_centroid([torch.randn(20, WIDTH).numpy()])
    return model


def losses_and_gradients(model, forward, visual, targets, lengths):
    model.zero_grad()
    losses = model.losses(forward(visual, lengths), targets, lengths)
    torch.stack(list(losses.values())).sum().backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("device", "way"), WAYS)
@pytest.mark.parametrize("name", method_names())
def test_a_method_compiles_to_one_graph_with_the_same_numbers(name, device, way, monkeypatch):
    skip_without_packages(name)
    if not find_method(name).trained:
        pytest.skip(f"{name} has nothing to train")
    # Of a GPU's convolutions, too, float32 is meant.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = make(name).to(device).eval()
    # A compiled UR-DMU draws other noise.
    monkeypatch.setattr(URDMU, "noise", torch.zeros_like)
    steps = model.sampling.length
    visual = torch.randn(4, steps, WIDTH * len(model.streams))
    lengths = torch.tensor([steps, steps // 2, steps, steps // 3])
    targets = torch.zeros(4, len(UCF.labels))
    targets[:2, 0] = targets[2:, 3] = 1
    batch = [tensor.to(device) for tensor in (visual, targets, lengths)]
    expected = losses_and_gradients(model, model, *batch)
    compiled = torch.compile(model, fullgraph=True, **way)
    # CUDA graphs are recorded in the second call and replayed from the third one.
    for _ in range(1 if device == "cpu" else 4):
        found = losses_and_gradients(model, compiled, *batch)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if device == "cuda" else {}
    torch.testing.assert_close(found, expected, **tolerance)
