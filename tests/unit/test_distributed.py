"""Steps of several processes are those of one."""

from unittest import mock

import numpy as np
import pair
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_loaders import training_config
from tiny import METHOD_FLAGS, small_options
from torch import nn

from clipfusionvad import create_model
from clipfusionvad.engine import distributed
from clipfusionvad.engine.distributed import (
    distributed_context,
    gather_objects,
    gather_rows,
    rank_slice,
    sync_batchnorm,
)
from clipfusionvad.engine.trainer import Trainer, TrainingStep
from clipfusionvad.io.rank import RankInfo, is_main, rank_info
from clipfusionvad.models import find_method
from clipfusionvad.models.base import VADOutput

CLASSES, T, D = ["normal", "fire", "flood"], 32, 64
VARIANTS = {
    "clipfusionvad-bare": {"gam": False, "product": False, "prompts": "fixed"},
    "reflipvad-minmax": {"magnitude_distance": "minmax", "prompts": "fixed"},
    "anomalyclip-fixed": {"prompts": "fixed", "concat_features": True, "recentre": False},
    "iefvad-rgb": {"fusion": "rgb", "mask_padding": True},
}
CASES = [*(name for name in METHOD_FLAGS if find_method(name).trained), *VARIANTS]
# Of a batch of 5 two processes take 2 and 3; 1 is too few for them. Then in eval mode, as after an evaluation.
STEPS = [(5, True), (1, True), (5, False)]
# Methods that pair the halves of a batch need an even one, and are not trained in eval mode.
PAIRED_STEPS = [(6, True), (2, True)]


def make_steps(case):
    """What some steps make of a model in double precision: loss terms, gradients and buffers of each."""
    method = case.partition("-")[0]
    options = small_options(method) | VARIANTS.get(case, {})
    if "dropout" in find_method(method).option_names():
        options["dropout"] = 0.0  # each process draws its own
    if "hard_attention" in find_method(method).option_names():
        options["hard_attention"] = False  # the same
    streams = len(find_method(method).streams)
    clip = {"clip": "toy", "embed_dim": D}
    model = create_model(method, CLASSES, visual_width=D, **clip, **options).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # each process draws its own
    for name in model.centroid_buffers:
        model.get_buffer(name).zero_()
    config = training_config(max_epoch=1, lr=1e-3)
    trainer = Trainer(model, None, None, config, None, {}, torch.device("cpu"))
    trainer.wrap_data_parallel()
    generator = torch.Generator().manual_seed(1)
    found = []
    for count, training in PAIRED_STEPS if model.paired else STEPS:
        visual = torch.randn(count, T, streams * D, generator=generator, dtype=torch.float64)
        lengths = torch.full((count,), T) if method == "anomalyclip" else torch.randint(1, T, (count,))
        targets = torch.eye(3)[torch.arange(count) % 3]
        model.train(training)
        torch.manual_seed(2)
        batch = (visual, lengths, targets)
        terms, _ = trainer._step(*(tensor[rank_slice(count)] for tensor in batch), count)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((terms, gradients, {name: b.clone() for name, b in model.named_buffers()}))
    return found


def exactly():
    """Losses work in float32 where a model's outputs are shorter; let them keep what is longer."""
    return mock.patch.object(torch.Tensor, "float", lambda self: self.to(torch.promote_types(self.dtype, torch.float)))


def steps_of_all(rank, folder):
    with distributed_context("cpu"), exactly():
        for case in CASES:
            torch.manual_seed(0)
            torch.save(make_steps(case), f"{folder}/{case}{rank}.pt")


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stepped")
    ends = pair.run(steps_of_all, (str(folder),), folder)
    assert [end.code for end in ends] == [0, 0], ends
    return folder


@pytest.mark.parametrize("case", CASES)
def test_steps_of_two_processes_are_those_of_one(stepped, case):
    torch.manual_seed(0)
    with exactly():
        alone = make_steps(case)
    for rank in range(2):
        together = torch.load(stepped / f"{case}{rank}.pt")
        for mine, ours in zip(alone, together, strict=True):
            for one, other in zip(mine, ours, strict=True):
                assert one.keys() == other.keys()
                for name, value in one.items():
                    torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: n + m)


@given(st.integers(0, 200), st.integers(1, 9))
def test_slices_of_a_batch_are_the_batch(count, size):
    parts = []
    for rank in range(size):
        with mock.patch.object(distributed, "rank_info", lambda rank=rank: RankInfo(rank, size)):
            parts.append(np.arange(count)[rank_slice(count)])
    if count < size:
        assert all(part.tolist() == list(range(count)) for part in parts)
        return
    assert np.concatenate(parts).tolist() == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def normalise(rank):
    with distributed_context("cpu") as device:
        generator = torch.Generator().manual_seed(0)
        own_rows = rank_slice(5)
        for shape, compiled in (((5, 4), False), ((5, 4, 7), False), ((5, 4, 7), True)):
            whole = torch.randn(shape, generator=generator, dtype=torch.float64)
            norm, reference = nn.Sequential(make_norm()), make_norm()
            sync_batchnorm(norm, device)
            own, every = (part.clone().requires_grad_() for part in (whole[own_rows], whole))
            weights = torch.linspace(0, 1, whole.numel(), dtype=torch.float64).view(shape)
            normed = torch.compile(norm, backend="aot_eager") if compiled else norm
            (normed(own) * weights[own_rows]).sum().backward()
            (reference(every) * weights).sum().backward()
            torch.testing.assert_close(own.grad, every.grad[own_rows])
            for name, value in reference.state_dict().items():
                torch.testing.assert_close(norm.state_dict()[f"0.{name}"], value)
            # Each process has its share of the gradients of weight and bias.
            shares = gather_objects([parameter.grad for parameter in norm.parameters()])
            for parts, parameter in zip(zip(*shares, strict=True), reference.parameters(), strict=True):
                torch.testing.assert_close(sum(parts), parameter.grad)
        for dtype in (torch.bfloat16, torch.int64, torch.bool):
            rows = torch.arange(5).to(dtype)
            assert torch.equal(gather_rows(rows[own_rows], own_rows, 5), rows)


def make_norm():
    norm = nn.BatchNorm1d(4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1, 5))
    return norm


def test_batchnorm_is_over_all_rows(tmp_path):
    ends = pair.run(normalise, (), tmp_path, size=3)
    assert [(end.code, end.err) for end in ends] == [(0, "")] * 3


def test_only_a_launcher_starts_several_processes(monkeypatch):
    """Clusters set WORLD_SIZE and RANK for programs that do not use them."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert rank_info() == RankInfo() and is_main()


class Noise(nn.Module):
    """A model whose output and losses are random numbers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, visual, lengths):
        return VADOutput(torch.rand(len(visual), 1, 1), None, None)

    def losses(self, output, targets, lengths):
        return {"rows": output.coarse_logits.flatten(), "loss": torch.rand(1)}


def draw(rank):
    with distributed_context("cpu") as device:
        torch.manual_seed(0)
        step, batch = TrainingStep(Noise(), device, "fp32"), torch.zeros(1, 1, 1)
        first, later = (step(batch, torch.ones(1), torch.ones(1), 2, number)["rows"].tolist() for number in (3, 4))
        assert first[0] != first[1] and first != later
        assert gather_objects(step(batch, torch.ones(1), torch.ones(1), 2, 3))[rank]["rows"].tolist() == first
        alone = gather_objects(step(batch, torch.ones(1), torch.ones(1), 1, 3))
        assert alone[0] == alone[1]


def test_dropout_differs_between_processes_and_the_losses_draw_the_same_numbers(tmp_path):
    ends = pair.run(draw, (), tmp_path)
    assert [(end.code, end.err) for end in ends] == [(0, "")] * 2
