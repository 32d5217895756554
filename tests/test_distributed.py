"""Several processes do what one does, and end together whatever happens to one of them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pair
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair import ROOT
from test_resume import wait_for_change
from tiny import METHOD_FLAGS, TEST, TRAIN, make_tiny
from torch import nn

from clipfusionvad import create_model
from clipfusionvad.commands import test as test_command
from clipfusionvad.commands import train as train_command
from clipfusionvad.engine import distributed
from clipfusionvad.engine.batchnorm import SharedBatchNorm
from clipfusionvad.engine.distributed import Team, join
from clipfusionvad.engine.schedule import Schedule
from clipfusionvad.engine.trainer import Trainer
from clipfusionvad.errors import UserError
from clipfusionvad.launch import Place, launched
from clipfusionvad.models.method import VADOutput

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
    "reflipvad-repo": ("reflipvad", BRANCHES | REFLIP | {"variant": "repo"}),
    "anomalyclip": ("anomalyclip", SEGMENTS),
    "anomalyclip-fixed": ("anomalyclip", SEGMENTS | {"prompts": "fixed", "concat_features": True, "recentre": False}),
    "iefvad": ("iefvad", IEF),
    "iefvad-rgb": ("iefvad", IEF | {"fusion": "rgb", "mask_padding": True}),
}
assert {method for method, _ in CASES.values()} == METHOD_FLAGS.keys()
# Of a batch of 5 two processes take 2 and 3; 1 is too few for them. Then in eval mode, as after an evaluation.
STEPS = [(5, True), (1, True), (5, False)]


def make_steps(case, team):
    """What some steps make of a model in double precision: loss terms, gradients and buffers of each."""
    method, options = CASES[case]
    streams = 2 if method == "iefvad" else 1
    clip = {} if streams == 2 else {"clip": "toy", "embed_dim": D}
    model = create_model(method, CLASSES, visual_width=D, **clip, **options).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # each process draws its own
    for name in model.calibration:
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


@dataclass(frozen=True)
class Nested(VADOutput):
    inner: tuple


def norms_and_outputs(rank):
    with join("cpu") as (team, _):
        generator = torch.Generator().manual_seed(0)
        found = []
        for shape in ((5, 4), (5, 4, 7)):
            whole = torch.randn(shape, generator=generator, dtype=torch.float64)
            norm, reference = (make_norm(kind) for kind in (SharedBatchNorm, nn.BatchNorm1d))
            own, every = (part.clone().requires_grad_() for part in (whole[team.part(5)], whole))
            weigh = torch.linspace(0, 1, whole.numel(), dtype=torch.float64).view(shape)
            (norm(own) * weigh[team.part(5)]).sum().backward()
            expected = reference(every)
            (expected * weigh).sum().backward()
            torch.testing.assert_close(own.grad, every.grad[team.part(5)])
            for name, value in reference.state_dict().items():
                torch.testing.assert_close(norm.state_dict()[name], value)
            gradients = torch.stack([norm.weight.grad, norm.bias.grad])
            found.append((gradients, torch.stack([reference.weight.grad, reference.bias.grad])))
        rows = torch.arange(5)
        output = Nested(rows[team.part(5)], None, torch.ones(3), (rows[team.part(5)] > 2, "word"))
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


# Programs.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny("ucf", tmp_path_factory.mktemp("data") / "tiny")


def train_member(rank, argv, stop_at=None):
    """A training whose later processes may not write; at a step the second one and its children get a signal."""
    torch.set_num_threads(1)
    if rank:
        pair.forbid_writing()
    original = Trainer._step

    def step(self, *batch):
        if rank and self.progress.step + 1 == stop_at:
            os.killpg(0, signal.SIGTERM)
        return original(self, *batch)

    Trainer._step = step
    with no_plots():
        return TRAIN["ucf"](argv)


def test_member(rank, argv):
    torch.set_num_threads(1)
    if rank:
        pair.forbid_writing()
    with no_plots():
        return TEST["ucf"](argv)


test_member.__test__ = False


@contextmanager
def no_plots():
    """Programs without the pictures and pages that take most of their time here."""
    with pytest.MonkeyPatch.context() as patch:
        for command in (train_command, test_command):
            for name in ("draw_score_curves", "draw_training"):
                patch.setattr(command, name, lambda *args: None, raising=False)
            patch.setattr(command, "write_report", lambda folder: folder / "report.html")
        yield


def read_losses(work):
    with open(work / "run" / "losses.csv") as file:
        rows = list(csv.reader(file))
    return rows[0], np.array(rows[1:], float)


def assert_alike(one, other):
    """Losses of every step, evaluations and final metrics of two trainings."""
    (header, mine), (same, ours) = read_losses(one.work), read_losses(other.work)
    assert header == same
    np.testing.assert_allclose(ours, mine, rtol=1e-3, atol=1e-4)
    assert_near(*(json.loads((tiny.work / "run/metrics.json").read_text()) for tiny in (one, other)))
    records = [(tiny.work / "run/metrics.jsonl").read_text().splitlines() for tiny in (one, other)]
    for mine, ours in zip(*records, strict=True):
        assert_near(json.loads(mine), json.loads(ours))


def assert_near(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_near(one[key], other[key])
    else:
        assert one == (other if one is None else pytest.approx(other, rel=2e-3, abs=2e-3))


# Batches of 23 and 1, evaluations within an epoch; and what AnomalyCLIP takes from normal videos and draws by lot.
RUNS = {
    "clipfusionvad": ["--no-balanced", "--batch-size", 23, "--eval-every", 1, "--workers", 1],
    "anomalyclip": ["--protocol", "clean", "--holdout", 0.3, "--no-cycle", "--select", "ap1"],
}


@pytest.fixture(scope="module", params=RUNS)
def runs(request, data, tmp_path_factory):
    """The same training by one process and by two."""
    one, two = (data.of(request.param).at(tmp_path_factory.mktemp(name)) for name in ("one", "two"))
    options = RUNS[request.param]
    with no_plots():
        assert one.train(*options).code == 0
    ends = pair.run(train_member, (two.train_flags(*options),), two.work)
    assert [end.code for end in ends] == [0, 0], ends
    return one, two, ends


def test_a_training_of_two_is_that_of_one(runs):
    one, two, _ = runs
    assert_alike(one, two)
    assert json.loads((two.work / "run/environment.json").read_text())["processes"] == 2
    files = [{path.name for path in (tiny.work / "run").iterdir()} for tiny in (one, two)]
    assert files[0] == files[1]


def test_the_first_process_speaks_for_all(runs):
    _, _, (first, second) = runs
    assert "final model" in first.out
    assert (second.out, second.err) == ("", "")


def test_a_test_of_two_is_that_of_one(runs, tmp_path):
    one, _, _ = runs
    flags = one.test_flags("--output-dir", tmp_path / "two")
    ends = pair.run(test_member, (flags,), tmp_path)
    assert [end.code for end in ends] == [0, 0], ends
    assert ends[1].out == ends[1].err == ""
    with no_plots():
        assert one.test("--output-dir", tmp_path / "one").code == 0
    assert_near(*(json.loads((tmp_path / name / "test_metrics.json").read_text()) for name in ("one", "two")))


def test_a_signal_to_one_stops_all_and_any_number_goes_on(runs, tmp_path):
    """The signal reaches the loading processes, too."""
    one, _, _ = runs
    work, options = one.at(tmp_path), RUNS[one.method]
    ends = pair.run(train_member, (work.train_flags(*options, "--workers", 1), 3), tmp_path)
    assert [end.code for end in ends] == [130, 130], ends
    assert f"--use-checkpoint --output-dir {tmp_path / 'run'}" in ends[0].out and not ends[1].out + ends[1].err
    assert torch.load(tmp_path / "run/last.pt")["progress"]["step"] == 3
    if one.method == "anomalyclip":
        ends = pair.run(train_member, (work.train_flags(*options, "--use-checkpoint"),), tmp_path)
        assert [end.code for end in ends] == [0, 0], ends
        assert "resuming" in ends[0].out
    else:
        with no_plots():
            assert work.train(*options, "--use-checkpoint").code == 0
    assert_alike(one, work)


# What goes wrong.


def test_bad_options_are_said_once(data, tmp_path):
    ends = pair.run(train_member, (data.at(tmp_path).train_flags("--batch-siz", 3),), tmp_path)
    assert [end.code for end in ends] == [2, 2]
    assert ends[0].err.startswith("error: ") and ends[1].err == ""


def test_bad_input_that_all_meet_is_said_once(data, tmp_path):
    ends = pair.run(train_member, (data.at(tmp_path).train_flags("--train-list", "none.csv"),), tmp_path)
    assert [end.code for end in ends] == [2, 2]
    (line,) = [line for end in ends for line in end.err.splitlines()]
    assert line.startswith("error: list not found: none.csv")


def test_what_only_the_first_process_meets_ends_all(runs, tmp_path):
    one, _, _ = runs
    ends = pair.run(train_member, (one.train_flags(*RUNS[one.method]),), tmp_path)
    assert [end.code for end in ends] == [2, 2]
    assert "already holds a run" in ends[0].err and ends[1].err == ""


def spoiled(rank, argv, error):
    """The second process meets something at its third step."""
    original = Trainer._step

    def step(self, *batch):
        if rank and self.progress.step == 2:
            raise error
        return original(self, *batch)

    Trainer._step = step
    return TRAIN["ucf"](argv)


def test_what_only_the_second_process_meets_is_said_by_it(data, tmp_path):
    ends = pair.run(spoiled, (data.at(tmp_path).train_flags(), UserError("its disk is gone")), tmp_path)
    assert [(end.code, end.err) for end in ends] == [(2, ""), (2, "error: its disk is gone\n")]


def test_a_bug_in_one_process_keeps_its_traceback(data, tmp_path):
    ends = pair.run(spoiled, (data.at(tmp_path).train_flags(), ZeroDivisionError("ours")), tmp_path)
    assert [end.code for end in ends] == [1, 1]
    assert ends[0].err == "" and ends[1].err.startswith("Traceback") and "ZeroDivisionError: ours" in ends[1].err


def impatient(rank, argv):
    distributed.PATIENCE = 0.5
    return TRAIN["ucf"](argv)


def test_a_process_that_hangs_keeps_no_other_from_ending(data, tmp_path):
    """As one does that waits for a GPU: no handler of signals runs in it."""
    processes = pair.start(impatient, (data.at(tmp_path).train_flags("--max-epoch", 1000),), tmp_path)
    wait_for_change(tmp_path / "run/last.pt", processes[0])
    os.kill(processes[1].pid, signal.SIGSTOP)
    time.sleep(0.2)
    os.kill(processes[0].pid, signal.SIGTERM)
    processes[0].join(30)
    processes[1].kill()
    first, _ = pair.finish(processes, tmp_path)
    step = torch.load(tmp_path / "run/last.pt")["progress"]["step"]
    assert first.code == 75
    assert first.err == (
        f"error: not stopped in 0 s (is process 1 lost?): the state of step {step} is in {tmp_path / 'run/last.pt'}; "
        f"start again with --use-checkpoint --output-dir {tmp_path / 'run'}\n"
    )


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds a process by its environment in /proc")
def test_a_killed_process_ends_a_torchrun_that_can_be_resumed(data, tmp_path):
    """As a user does it, and as the system does when memory runs out."""
    work = data.at(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "ucf_train.py", *work.train_flags("--max-epoch", 1000)]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        running = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)
        deadline = time.monotonic() + 120
        while not (tmp_path / "run/last.pt").exists() and time.monotonic() < deadline and running.poll() is None:
            time.sleep(0.05)
        os.kill(find_child(running.pid, "RANK=1"), signal.SIGKILL)
        assert running.wait(60) != 0
    step = torch.load(tmp_path / "run/last.pt")["progress"]["step"]
    said = [line for line in (tmp_path / "err").read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith("error: process 1 was lost (")
    assert said[0].endswith(
        f": the state of step {step} is in {tmp_path / 'run/last.pt'}; "
        f"start again with --use-checkpoint --output-dir {tmp_path / 'run'}"
    )
    assert not list((tmp_path / "run").glob(".*.tmp"))
    epochs = step // 4 + 1
    with no_plots():
        resumed = work.train("--use-checkpoint", "--max-epoch", epochs)
    assert resumed.code == 0 and "resuming from" in resumed.out
    _, losses = read_losses(tmp_path)
    assert losses[:, 0].tolist() == list(range(1, 4 * epochs + 1))


def find_child(parent, setting):
    """The process below another whose environment has a setting."""
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        children = file.read().split()
    for child in children:
        with open(f"/proc/{child}/environ") as file:
            if setting in file.read().split("\0"):
                return int(child)
    raise AssertionError(f"no child of {parent} has {setting}")


def test_only_a_launcher_makes_several(monkeypatch):
    """Clusters set WORLD_SIZE and RANK for programs that know nothing of it."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert launched() == Place()
