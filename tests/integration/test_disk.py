"""A disk that is full or must not be written: one clear line, old files as they were, nothing half-written."""

import errno
import os
import resource
import signal
from pathlib import Path

import preloaded
import pytest
import torch
from made_videos import write_video
from refusal import snapshot
from test_resume import assert_same
from tiny import make_tiny, package_main, quietly, strings
from warm import warm_context

from clipfusionvad.engine.loggers import RunLog
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.event_log import AppendedText, Curves
from clipfusionvad.io.files import write_torch


def limited(argv, limit):
    """How a command ends where no file may grow beyond ``limit`` bytes."""
    context = warm_context()
    mine, theirs = context.Pipe()
    process = context.Process(target=preloaded.limited, args=(strings(argv), limit, theirs))
    process.start()
    assert mine.poll(120), "it hangs"
    outcome = mine.recv()
    process.join()
    return outcome


def assert_full(outcome):
    assert outcome.code == 2, outcome
    (line,) = [line for line in outcome.err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: cannot write ") and line.endswith(os.strerror(errno.EFBIG)), outcome.err


def half_written(folder):
    return [path for path in folder.rglob(".*") if path.name != ".lock" or path.stat().st_size]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny("ucf", tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    work = data.at(tmp_path_factory.mktemp("whole"))
    assert work.train("--eval-every", 6).code == 0
    return work


@pytest.mark.slow
def test_training(data, whole, tmp_path):
    """Whatever is the first that does not fit: a small record, the curves, a state, the pages at the end."""
    argv = ["train", "--dataset", "ucf", *data.at(tmp_path).train_flags("--eval-every", 6, "--use-checkpoint")]
    sizes = sorted(path.stat().st_size for path in (whole.work / "run").rglob("*") if path.is_file())
    state = (whole.work / "run" / "last.pt").stat().st_size
    for limit in (sizes[0] // 2, sizes[len(sizes) // 2], state - 100_000, state - 1, max(sizes) - 1):
        before = {path: content for path, content in snapshot(tmp_path).items() if path.suffix in (".pt", ".pth")}
        assert_full(limited(argv, limit))
        after = snapshot(tmp_path)
        assert not half_written(tmp_path)
        # What was there is there still, or a whole newer one.
        assert before.keys() <= after.keys()
        for path in before:
            torch.load(path, weights_only=True)
    done = limited(argv, resource.RLIM_INFINITY)
    assert done.code == 0, done.err
    assert_same(data.at(tmp_path), whole)


@pytest.mark.slow
def test_packing(data, tmp_path):
    argv = ["pack", "--dataset", "ucf", *data.at(tmp_path).train_flags("--output", tmp_path)]
    assert_full(limited(argv, 5000))
    assert not list(tmp_path.iterdir())
    assert quietly(package_main, argv).code == 0
    before = snapshot(tmp_path)
    for limit in (100, 5000):
        assert_full(limited([*argv, "--dtype", "float32"], limit))
        assert snapshot(tmp_path) == before


def test_extraction(tmp_path):
    (tmp_path / "videos").mkdir()
    for name, frames in {"a": 20, "b": 160}.items():
        write_video(tmp_path / "videos" / f"{name}.mp4", frames, size=(32, 32))
    toy = ["--clip", "toy", "--embed-dim", "64", "--device", "cpu", "--crops", 1]
    argv = strings(["extract", "--videos", tmp_path / "videos", "--output", tmp_path / "out"], toy)
    # A row is 128 bytes and a header as much: the second video's ten rows do not fit.
    assert_full(limited(argv, 1200))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.npy")) == ["a__0.npy"]
    assert not half_written(tmp_path / "out")
    assert "1 existed already" in limited(argv, resource.RLIM_INFINITY).out
    # Nor does a line of the manifest.
    assert_full(limited([*argv, "--overwrite"], 300))


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 1000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_model_that_does_not_fit(tmp_path, small_files):
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")
    for size in (300, 3_000_000):
        with pytest.raises(UserError, match=f"cannot write {path}: {os.strerror(errno.EFBIG)}"):
            write_torch(path, {"weight": torch.zeros(size)})
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.pth", b"old")]


def test_records_that_grow_too_long(tmp_path, small_files, capfd):
    log = RunLog(tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*(losses.csv|tfevents)"):
        for step in range(1, 10_000):
            log.log_step(step, 0, {"coarse": 0.5}, lr=1e-3)
        log.flush()
    with pytest.raises(UserError, match="cannot write"):
        log.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("make", [lambda path: AppendedText(path, ""), lambda path: Curves(path, 0)])
def test_a_folder_that_must_not_be_written(tmp_path, make, monkeypatch):
    """As the system would say it; root may write everywhere."""

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}.*: {os.strerror(errno.EACCES)}"):
        make(tmp_path / "x")


def test_what_a_library_cannot_write_is_one_line(monkeypatch):
    def body(argv):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "page.html")

    monkeypatch.setattr("clipfusionvad.cli.report.main", body)
    outcome = quietly(package_main, ["report", "x"])
    assert (outcome.code, outcome.err) == (2, f"error: cannot write page.html: {os.strerror(errno.ENOSPC)}\n")
