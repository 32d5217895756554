"""A log file gets a line now and then, a terminal a bar, and short work nothing."""

import io
import sys

import pytest
from made_videos import write_video
from small_detect import detect, write_model
from tiny import package, quietly, strings

from clipfusionvad.__main__ import main
from clipfusionvad.io import progress
from clipfusionvad.io.progress import ProgressBar
from clipfusionvad.tools.detect import page


@pytest.fixture
def clock(monkeypatch):
    """Time passes only where a test says so."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    monkeypatch.setattr(progress, "time", clock := Clock())
    return clock


def test_a_line_a_minute(clock, capsys):
    with ProgressBar(total=10, desc="epoch 1/2", unit="step", initial=2) as bar:
        for _ in range(5):
            clock.now += 25
            bar.set_postfix({"loss": "0.5"}, refresh=False)
            bar.update()
    assert capsys.readouterr().err == "epoch 1/2: 5/10 step, 01:15 so far, 02:05 left, loss=0.5\n"
    for item in ProgressBar(range(4), "packing a.csv", unit="video"):
        clock.now += 50 * (item > 1)
    assert capsys.readouterr().err == "packing a.csv: 4/4 video, 01:40 so far, 00:00 left\n"


def test_long_work_on_one_item_shows_itself_too(clock, capsys):
    with ProgressBar(total=4_000_000, desc="extract", unit="B", unit_scale=True) as bar:
        for frames in (100, 200, 300):
            clock.now += 40
            bar.set_postfix_str(f"{frames} frames of this video")
    assert capsys.readouterr().err == "extract: 0.00/4.00M B, 01:20 so far, ? left, 200 frames of this video\n"


def test_a_terminal_gets_the_bar(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    for _ in ProgressBar(range(3), "reading"):
        clock.now += 100
    assert "reading: 100%|" in terminal.getvalue() and "so far" not in terminal.getvalue()


def test_every_long_command_has_a_sign_of_life(tiny, tmp_path, monkeypatch, no_plots):
    monkeypatch.setattr(progress, "EVERY", 0)
    monkeypatch.setattr(page, "draw_scores", lambda *args: None)
    assert "packing train.csv: 1/" in quietly(package("pack", "ucf"), tiny.train_flags()).err
    trained = tiny.train("--max-epoch", 1, "--no-packed")
    assert "checking features: " in trained.err and "epoch 1/1: 1/" in trained.err and "scoring: " in trained.err
    assert "scoring: " in tiny.test().err
    video = write_video(tmp_path / "v.mp4", 20)
    flags = ["--clip", "toy", "--device", "cpu", "--crops", 1, "--output", tmp_path / "features"]
    assert "20 frames of this video" in quietly(main, strings(["extract", "--videos", video], flags)).err
    write_model(tmp_path / "model.pt", "vadclip")
    argv = [video, "--checkpoint", tmp_path / "model.pt", "--device", "cpu", "--output", tmp_path / "out"]
    assert "v.mp4: 20/20 frame" in detect(argv).err
