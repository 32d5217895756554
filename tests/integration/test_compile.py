"""torch.compile: every method is one graph, without a break, and its numbers stay."""

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


def make(name):
    method = find_method(name)
    known = method.option_names()
    options = {key: WIDTH for key in ("embed_dim", "visual_width") if key in known}
    options |= {key: value for key, value in method_settings(name).items() if key in known}
    torch.manual_seed(0)
    model = build_method(name, UCF.prompts, load_clip("toy", WIDTH) if method.needs_clip else None, **options)
    model.set_normal_centroid([torch.randn(20, WIDTH).numpy()])
    return model


@pytest.mark.parametrize("name", method_names())
def test_a_method_compiles_to_one_graph_with_the_same_numbers(name, monkeypatch):
    skip_without_packages(name)
    if not find_method(name).trained:
        pytest.skip(f"{name} has nothing to train")
    model = make(name).eval()
    # A compiled UR-DMU draws other noise.
    monkeypatch.setattr(URDMU, "noise", torch.zeros_like)
    steps = model.sampling.length
    visual = torch.randn(4, steps, WIDTH * len(model.streams))
    lengths = torch.tensor([steps, steps // 2, steps, steps // 3])
    targets = torch.zeros(4, len(UCF.labels))
    targets[:2, 0] = targets[2:, 3] = 1

    found = []
    # Everything but the kernels that the compiler would write in C++ or for a GPU, which take it a minute.
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        losses = model.losses(forward(visual, lengths), targets, lengths)
        torch.stack(list(losses.values())).sum().backward()
        gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        found.append((losses, gradients))
    torch.testing.assert_close(found[1], found[0])
