"""Programs of several processes: they do what one does, and end together whatever happens to one of them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pair
import pytest
import torch
from pair import ROOT
from test_resume import assert_same
from tiny import TEST, TRAIN, make_tiny

from clipfusionvad.cli import testing as test_command
from clipfusionvad.cli import training
from clipfusionvad.engine.trainer import Trainer
from clipfusionvad.io.errors import UserError


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
        for command in (training, test_command):
            for name in ("draw_score_curves", "draw_training"):
                patch.setattr(command, name, lambda *args: None, raising=False)
            patch.setattr(command, "write_report", lambda folder: folder / "report.html")
        yield


def wait_for_change(path, process):
    def stamp():
        return path.stat().st_mtime_ns if path.exists() else None

    before = stamp()
    while stamp() == before and process.is_alive():
        time.sleep(0.005)


def read_losses(work):
    with open(work / "run" / "losses.csv") as file:
        rows = list(csv.reader(file))
    return rows[0], np.array(rows[1:], float)


def assert_alike(one, other):
    """Losses of every step, last weights, evaluations and final metrics of two trainings."""
    (header, mine), (same, ours) = read_losses(one.work), read_losses(other.work)
    assert header == same
    np.testing.assert_allclose(ours, mine, rtol=1e-3, atol=1e-4)
    states = [torch.load(tiny.work / "run/last.pt")["last_state_dict"] for tiny in (one, other)]
    weights, others = (torch.cat([value.double().flatten() for value in state.values()]) for state in states)
    assert (weights - others).norm() <= 1e-3 * weights.norm()
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
        # Rounding may swap two snippets, which moves an AUC of so few videos by 0.015.
        assert one == (other if one is None else pytest.approx(other, rel=2e-3, abs=0.02))


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


def test_a_training_of_two_is_that_of_one_and_the_first_process_speaks(runs):
    one, two, (first, second) = runs
    assert_alike(one, two)
    assert json.loads((two.work / "run/environment.json").read_text())["processes"] == 2
    files = [{path.name for path in (tiny.work / "run").iterdir()} for tiny in (one, two)]
    assert files[0] == files[1]
    assert "final model" in first.out and (second.out, second.err) == ("", "")


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


@pytest.mark.slow
def test_killed_processes_go_on_to_the_same_bits(runs, tmp_path):
    _, two, _ = runs
    work, options = two.at(tmp_path), RUNS[two.method]
    argv = work.train_flags(*options, "--use-checkpoint")
    for pause in (0.05, 0.2):
        processes = pair.start(train_member, (argv,), tmp_path)
        wait_for_change(tmp_path / "run/last.pt", processes[0])
        time.sleep(pause)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    ends = pair.run(train_member, (argv,), tmp_path)
    assert [end.code for end in ends] == [0, 0], ends
    assert_same(work, two)
    assert not list((tmp_path / "run").glob(".*"))


def test_two_of_two_in_one_folder(data, tmp_path):
    """The first process of each training holds it."""
    processes = pair.start(train_member, (data.at(tmp_path).train_flags("--max-epoch", 1000),), tmp_path)
    wait_for_change(tmp_path / "run/last.pt", processes[0])
    (tmp_path / "more").mkdir()
    ends = pair.run(train_member, (data.at(tmp_path).train_flags("--overwrite"),), tmp_path / "more")
    for process in processes:
        process.kill()
    assert [end.code for end in ends] == [2, 2]
    assert "another run" in ends[0].err and ends[0].err.count("\n") == 1 and not ends[1].err


# What goes wrong.


@pytest.mark.parametrize(
    ("flags", "line"),
    [(["--batch-siz", 3], "error: "), (["--train-list", "none.csv"], "error: list not found: none.csv")],
)
def test_bad_input_that_all_meet_is_said_once(data, tmp_path, flags, line):
    ends = pair.run(train_member, (data.at(tmp_path).train_flags(*flags),), tmp_path)
    assert [end.code for end in ends] == [2, 2]
    assert [said.startswith(line) for end in ends for said in end.err.splitlines()] == [True]


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


def test_what_only_the_second_process_meets_is_reported_by_it(data, tmp_path):
    """Bad input in one line, a bug with its traceback."""
    for error, code, said in ((UserError("disk"), 2, "error: disk\n"), (ZeroDivisionError("ours"), 1, "Error: ours")):
        flags = data.at(tmp_path).train_flags("--overwrite")
        first, second = pair.run(spoiled, (flags, error), tmp_path)
        assert (first.code, second.code, first.err) == (code, code, "") and said in second.err
        assert second.err.startswith("Traceback" if code == 1 else "error: ")


@pytest.mark.slow
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
    assert len(said) == 1 and said[0].startswith("error: another process was lost (")
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
