"""Commands where the system lacks what only POSIX has, in all of their processes, as on Windows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_videos import write_video
from tiny import make_tiny, strings

from clipfusionvad.io import files

ROOT = Path(__file__).parents[2]
# What Python runs when it starts: what it takes to start processes on this system stays.
WITHOUT = """
import importlib.util, os, signal, sys
for module, names in {
    os: "setsid getsid setpgid getpgid killpg fork forkpty sched_getaffinity nice",
    signal: "SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGCHLD SIGXFSZ setitimer alarm pause",
}.items():
    for name in names.split():
        vars(module).pop(name, None)
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "pwd", "grp", "termios"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules.pop(name, None)
"""


@pytest.fixture
def run(tmp_path):
    """Run a command of the package in such processes."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT)
    places = os.pathsep.join(map(str, (tmp_path / "site", ROOT)))
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}

    def call(*argv):
        argv = [sys.executable, "-m", "clipfusionvad", *strings(argv)]
        return subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return call


def test_a_sweep_in_several_processes(run, tmp_path):
    data, out = make_tiny("ucf", tmp_path / "data"), tmp_path / "out"
    flags = data.train_flags("--max-epoch", 1, "--seeds", 1, 2, "--output-dir", out, "--jobs", 2)
    (tmp_path / "cells.yaml").write_text("cells: {bare: {gam: false}}")
    done = run("sweep", tmp_path / "cells.yaml", "--dataset", "ucf", "--no-full", *flags)
    assert done.returncode == 0, done.stderr
    assert (out / "results.csv").read_text().count("done") == 2
    assert not list(out.rglob("*.lock"))


def test_extraction_in_several_processes(run, tmp_path):
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4")
    flags = ["--clip", "toy", "--embed-dim", 64, "--device", "cpu", "--workers", 2, "--crops", 1]
    done = run("extract", "--videos", tmp_path / "a.mp4", tmp_path / "b.mp4", *flags, "--output", tmp_path / "features")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "features").glob("*.npy")) == ["a__0.npy", "b__0.npy"]


def test_without_locks_a_folder_is_held_and_nothing_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    with files.hold(tmp_path / "run"), files.hold(tmp_path / "run", shared=True):
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run").exists()
