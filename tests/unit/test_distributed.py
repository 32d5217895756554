"""Steps of several processes are those of one."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import numpy as np
import pair
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import METHOD_FLAGS, small_options
from torch import nn

from clipfusionvad import create_model
from clipfusionvad.engine.batchnorm import SharedBatchNorm
from clipfusionvad.engine.distributed import Team, join
from clipfusionvad.engine.optim import Schedule
from clipfusionvad.engine.trainer import Trainer
from clipfusionvad.io.rank import Place, launched
from clipfusionvad.models import find_method
from clipfusionvad.models.base import VADOutput

CLASSES, T, D = ["normal", "fire", "flood"], 32, 64
BRANCHES = {"visual_length": T, "attn_window": 8, "visual_layers": 1, "prompt_prefix": 2, "prompt_postfix": 2}
REFLIP = {"visual_length": T, "prompt_encoder": "toy"}
SEGMENTS = {"num_segments": 8, "seg_length": 4, "n_ctx": 2, "emb_size": 16, "heads": 2}
IEF = {"visual_length": T, "visual_head": 4, "visual_layers": 1, "num_refinement_steps": 2, "dropout": 0.0}
CASES = {
    "clipfusionvad": ("clipfusionvad", BRANCHES),
    "clipfusionvad-bare": ("clipfusionvad", BRANCHES | {"gam": False, "product": False, "prompts": "fixed"}),
    "vadclip": ("vadclip", BRANCHES),
    "reflipvad": ("reflipvad", REFLIP | {"glimpse_window": 8, "prompt_length": 4}),
    "reflipvad-minmax": ("reflipvad", REFLIP | {"magnitude_distance": "minmax", "prompts": "fixed"}),
    "reflipvad_repo": ("reflipvad_repo", BRANCHES | REFLIP),
    "anomalyclip": ("anomalyclip", SEGMENTS),
    "anomalyclip-fixed": ("anomalyclip", SEGMENTS | {"prompts": "fixed", "concat_features": True, "recentre": False}),
    "iefvad": ("iefvad", IEF),
    "iefvad-rgb": ("iefvad", IEF | {"fusion": "rgb", "mask_padding": True}),
}
# A method that is not named above is tried with small values of the options that others have, too.
CASES |= {name: (name, small_options(name)) for name in METHOD_FLAGS if name not in CASES}
# Of a batch of 5 two processes take 2 and 3; 1 is too few for them. Then in eval mode, as after an evaluation.
STEPS = [(5, True), (1, True), (5, False)]


def make_steps(case, team):
    """What some steps make of a model in double precision: loss terms, gradients and buffers of each."""
    method, options = CASES[case]
    streams = len(find_method(method).streams)
    clip = {"clip": "toy", "embed_dim": D}
    model = create_model(method, CLASSES, visual_width=D, **clip, **options).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # each process draws its own
    for name in model.centroid_buffers:
        model.get_buffer(name).zero_()
    schedule = Schedule(max_epoch=1, lr=1e-3, eval_every=0, select="auc1", paper=True)
    trainer = Trainer(model, None, None, schedule, None, {}, torch.device("cpu"), team=team)
    generator = torch.Generator().manual_seed(1)
    found = []
    for count, training in STEPS:
        visual = torch.randn(count, T, streams * D, generator=generator, dtype=torch.float64)
        lengths = torch.full((count,), T) if method == "anomalyclip" else torch.randint(1, T, (count,))
        targets = torch.eye(3)[torch.arange(count) % 3]
        model.train(training)
        torch.manual_seed(2)
        batch = (visual, lengths, targets)
        terms = trainer._step(*(tensor[team.part(count)] for tensor in batch), count)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((terms, gradients, {name: b.clone() for name, b in model.named_buffers()}))
    return found


def exactly():
    """Losses work in float32 where a model's outputs are shorter; let them keep what is longer."""
    return mock.patch.object(torch.Tensor, "float", lambda self: self.to(torch.promote_types(self.dtype, torch.float)))


def steps_of_all(rank, folder):
    with join("cpu") as (team, _), exactly():
        for case in CASES:
            torch.manual_seed(0)
            torch.save(make_steps(case, team), f"{folder}/{case}{rank}.pt")


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
        alone = make_steps(case, Team())
    for rank in range(2):
        together = torch.load(stepped / f"{case}{rank}.pt")
        for mine, ours in zip(alone, together, strict=True):
            for one, other in zip(mine, ours, strict=True):
                assert one.keys() == other.keys()
                for name, value in one.items():
                    torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: n + m)


def test_a_lone_process_prepares_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3))
    Team().prepare(model)
    assert type(model[0]) is nn.BatchNorm1d
    value = (torch.ones(2),)
    assert Team().gather(value, 2) is value


@given(st.integers(0, 200), st.integers(1, 9))
def test_parts_of_a_batch_are_the_batch(count, size):
    parts = [np.arange(count)[Team(Place(rank, size)).part(count)] for rank in range(size)]
    if count < size:
        assert all(part.tolist() == list(range(count)) for part in parts)
        return
    assert np.concatenate(parts).tolist() == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


# Norms and nested outputs.


@dataclass(frozen=True, kw_only=True)
class Nested(VADOutput):
    inner: tuple


def norms_and_outputs(rank):
    with join("cpu") as (team, _):
        generator = torch.Generator().manual_seed(0)
        found = []
        for shape, compiled in (((5, 4), False), ((5, 4, 7), False), ((5, 4, 7), True)):
            whole = torch.randn(shape, generator=generator, dtype=torch.float64)
            norm, reference = (make_norm(kind) for kind in (SharedBatchNorm, nn.BatchNorm1d))
            own, every = (part.clone().requires_grad_() for part in (whole[team.part(5)], whole))
            weigh = torch.linspace(0, 1, whole.numel(), dtype=torch.float64).view(shape)
            normed = torch.compile(nn.Sequential(norm), backend="aot_eager") if compiled else norm
            (normed(own) * weigh[team.part(5)]).sum().backward()
            expected = reference(every)
            (expected * weigh).sum().backward()
            torch.testing.assert_close(own.grad, every.grad[team.part(5)])
            for name, value in reference.state_dict().items():
                torch.testing.assert_close(norm.state_dict()[name], value)
            gradients = torch.stack([norm.weight.grad, norm.bias.grad])
            found.append((gradients, torch.stack([reference.weight.grad, reference.bias.grad])))
        rows = torch.arange(5)
        output = Nested(rows[team.part(5)], None, torch.ones(3), inner=(rows[team.part(5)] > 2, "word"))
        gathered = team.gather(output, 5)
        short = torch.arange(5).to(torch.bfloat16)
        assert torch.equal(team.gather(short[team.part(5)], 5), short)
        assert gathered.coarse_logits.tolist() == [0, 1, 2, 3, 4] and gathered.fine_logits is None
        assert gathered.text_features is output.text_features
        assert gathered.inner[0].tolist() == [False, False, False, True, True] and gathered.inner[1] == "word"
        # Each process has its share of the gradients of weight and bias.
        shares = team.collect([mine for mine, _ in found])
        if team.is_main:
            for parts, (_, expected) in zip(zip(*shares, strict=True), found, strict=True):
                torch.testing.assert_close(sum(parts), expected)


def dropout(rank):
    with join("cpu") as (team, _):
        draws = []
        for step, count in ((3, 5), (3, 5), (4, 5), (4, 1)):
            torch.manual_seed(0)
            with team.forward(nn.Linear(1, 1), count, step):
                draws.append(torch.rand(1).item())
            draws.append(torch.rand(1).item())
        found = team.collect(draws)
        if team.is_main:
            within, after = ([draw[start::2] for draw in found] for start in (0, 1))
            assert len({*map(tuple, after)}) == 1
            assert all(first == again != later for first, again, later, _ in within)
            assert within[0][0] != within[1][0] and within[0][3] == within[1][3]


def make_norm(kind):
    norm = kind(4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1, 5))
    return norm


def test_norms_are_those_of_all_rows_and_nested_outputs_are_joined(tmp_path):
    ends = pair.run(norms_and_outputs, (), tmp_path, size=3)
    assert [(end.code, end.err) for end in ends] == [(0, "")] * 3


def test_each_process_has_dropout_of_its_own_and_all_else_in_common(tmp_path):
    ends = pair.run(dropout, (), tmp_path)
    assert [(end.code, end.err) for end in ends] == [(0, "")] * 2


def test_only_a_launcher_makes_several(monkeypatch):
    """Clusters set WORLD_SIZE and RANK for programs that know nothing of it."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert launched() == Place()
