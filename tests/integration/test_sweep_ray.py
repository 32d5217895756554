"""A sweep on Ray: a worker is killed, the sweep is stopped and continued, and the results are those of one process."""

import os
import signal
import sys
import threading
import time

import pytest
from ray_workers import needs_proc, needs_ray, working_processes
from test_sweep import assert_same_runs, sweep, write
from tiny import make_tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny("ucf", tmp_path_factory.mktemp("swept") / "data")


def once_trained(begun, act, finished):
    """Do something as soon as a file of a run is there."""

    def watch():
        while not finished.is_set():
            if begun.exists() and act():
                return
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    return watcher


@pytest.mark.slow
@needs_ray
@needs_proc
def test_a_killed_worker_and_a_stop_change_nothing(data, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    configs = write(tmp_path, no_gam={"gam": False})
    # --seeds 1 is one seed, from this one on.
    long = ["--max-epoch", 4, "--seed", 1]
    here, there = tmp_path / "here", tmp_path / "there"
    assert sweep(data, here, *configs, seeds=[1], flags=long).code == 0
    killed, finished = [], threading.Event()

    def kill():
        for number in working_processes("train_trial"):
            os.kill(number, signal.SIGKILL)
            killed.append(number)
        return killed

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    flags = [*long, "--engine", "ray"]
    watchers = [once_trained(there / "full" / "seed1" / "last.pt", kill, finished)]
    watchers.append(once_trained(there / "no_gam" / "seed1" / "last.pt", stop, finished))
    first = sweep(data, there, *configs, seeds=[1], flags=flags)
    finished.set()
    for watcher in watchers:
        watcher.join()
    assert killed, "no worker was seen at work"
    assert first.code == 130, first.err
    assert "the same command continues from here" in first.out
    assert (there / "full" / "seed1" / "done.json").is_file()
    assert "resuming from" in (there / "full" / "seed1" / "train.log").read_text()
    done = sweep(data, there, *configs, seeds=[1], flags=flags)
    assert done.code == 0, done.err
    assert_same_runs(here, there)


def test_without_ray_one_line_says_what_to_do(data, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = sweep(data, tmp_path / "out", *write(tmp_path, no_gam={"gam": False}), flags=["--engine", "ray"])
    assert done.code == 2 and "pip install ray" in done.err and done.err.count("\n") == 1


def test_an_address_is_for_ray_only(data, tmp_path):
    flags = ["--ray-address", "auto"]
    done = sweep(data, tmp_path / "out", *write(tmp_path, no_gam={"gam": False}), flags=flags)
    assert done.code == 2 and "--ray-address is for --engine ray" in done.err
    assert not (tmp_path / "out").exists()
