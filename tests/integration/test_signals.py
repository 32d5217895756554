"""SIGINT and SIGTERM stop every command at a sensible point, with code 130 and word of how it goes on."""

import os
import signal

import pytest
from made_videos import write_video
from refusal import snapshot
from small_detect import detect, write_model
from tiny import package_main, quietly, strings

from clipfusionvad.cli import training
from clipfusionvad.data import packed
from clipfusionvad.extraction import extract as extract_module
from clipfusionvad.tools.detect import run as detect_module

KINDS = pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])


def signal_at(monkeypatch, place, name, count, kind):
    """This process gets a signal at the ``count``-th call of a function."""
    original, calls = getattr(place, name), []

    def called(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), kind)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, called)


def assert_stopped(outcome, says):
    assert outcome.code == 130, outcome
    assert outcome.err.endswith("interrupted\n") and "Traceback" not in outcome.err
    assert says in outcome.err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@KINDS
def test_extraction(tmp_path, monkeypatch, kind):
    (tmp_path / "videos").mkdir()
    for name in "ab":
        write_video(tmp_path / "videos" / f"{name}.mp4", 40, size=(32, 32))
    toy = ["--clip", "toy", "--embed-dim", "64", "--device", "cpu", "--crops", 1]
    command = ["extract", "--videos", tmp_path / "videos", *toy, "--output"]
    whole, argv = (strings(command, [tmp_path / name]) for name in ("whole", "out"))
    assert quietly(package_main, whole).code == 0
    with monkeypatch.context() as patch:
        # In the middle of the second video: each takes three pieces.
        signal_at(patch, extract_module, "_write_rows", 5, kind)
        assert_stopped(quietly(package_main, argv), f"kept in {tmp_path / 'out'}; the same command continues")
    assert sorted(os.listdir(tmp_path / "out")) == ["a__0.npy", "manifest.jsonl"]
    assert "1 existed already" in quietly(package_main, argv).out
    for name in ("a__0.npy", "b__0.npy"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@KINDS
def test_packing(tiny, tmp_path, monkeypatch, kind):
    argv = ["pack", "--dataset", tiny.dataset, *tiny.train_flags()]
    with monkeypatch.context() as patch:
        # In the middle of the second list.
        signal_at(patch, packed, "load_video", 24 + 3, kind)
        assert_stopped(quietly(package_main, argv), "the same command continues")
    assert (tiny.folder / "train.pack").is_dir() and not (tiny.folder / "test.pack").exists()
    assert not list(tiny.folder.glob(".*"))
    before = snapshot(tiny.folder / "train.pack")
    again = quietly(package_main, argv)
    assert again.code == 0 and "train.pack is up to date" in again.out and "test.pack: " in again.out
    assert snapshot(tiny.folder / "train.pack") == before


@KINDS
def test_detection(tmp_path, monkeypatch, kind):
    (tmp_path / "videos").mkdir()
    for name in "ab":
        write_video(tmp_path / "videos" / f"{name}.mp4", 20)
    write_model(tmp_path / "model.pt", "vadclip")
    argv = [tmp_path / "videos", "--checkpoint", tmp_path / "model.pt", "--output", tmp_path / "out"]
    argv += ["--device", "cpu", "--video", "none"]
    with monkeypatch.context() as patch:
        signal_at(patch, detect_module, "detect_video", 2, kind)
        assert_stopped(detect(argv), f"kept in {tmp_path / 'out'}; the same command continues")
    before = snapshot(tmp_path / "out")
    assert tmp_path / "out" / "a.json" in before and tmp_path / "out" / "b.json" not in before
    assert not list((tmp_path / "out").glob(".*"))
    assert detect(argv).code == 0
    after = snapshot(tmp_path / "out")
    # A page that was there gets a link to the next one.
    kept = {path: content for path, content in before.items() if path.suffix != ".html"}
    assert tmp_path / "out" / "b.json" in after and kept.items() <= after.items()


@KINDS
def test_a_training_that_is_being_tested(tiny, monkeypatch, kind):
    """All steps are made and saved; what comes then is made again."""
    monkeypatch.setattr(training, "draw_training", lambda *args: None)
    with monkeypatch.context() as patch:
        signal_at(patch, training, "draw_score_curves", 1, kind)
        stopped = tiny.train("--max-epoch", 1)
    says = f"stopped; to go on: repeat the command with --use-checkpoint --output-dir {tiny.work / 'run'}\n"
    assert stopped.code == 130 and stopped.out.endswith(says)
    before = (tiny.work / "run" / "losses.csv").read_text()
    assert tiny.train("--max-epoch", 1, "--use-checkpoint").code == 0
    assert (tiny.work / "run" / "losses.csv").read_text() == before
    assert (tiny.work / "run" / "report.html").exists()
