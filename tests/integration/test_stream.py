"""Streams: as offline where a window is complete, alerts by hysteresis, sources that grow, break and outrun, memory."""

import json
import os
import signal
import socket
import sys
import threading
import time
import tracemalloc
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_videos import write_video
from small_detect import detect, write_model
from tiny import LENGTH, WIDTH

from clipfusionvad.engine.evaluator import VideoScores
from clipfusionvad.extraction.decode import read_frames
from clipfusionvad.io.errors import UserError
from clipfusionvad.metrics.segments import Thresholds
from clipfusionvad.tools.detect.detect import Chunk
from clipfusionvad.tools.detect.model import Scorer
from clipfusionvad.tools.detect.sources import StreamSource, keep_up
from clipfusionvad.tools.detect.stream import StreamLog, StreamScorer

SHARED = Path(os.environ.get("SHARED_DIR") or Path(__file__).resolve().parents[3] / "shared")
REAL = SHARED / "data" / "ucf_clips"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files and scorers by method."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: write_model(folder / f"{name}.pt", name) for name in ("vadclip", "iefvad", "anomalyclip")}
    return folder, {name: Scorer(model, "cpu") for name, model in made.items()}


def spans(first, count):
    starts = 16 * np.arange(first, first + count)
    return np.stack([starts, starts + 16], axis=1)


def streamed(scorer, rows, sizes, every=1):
    """All that comes of rows that arrive in such portions."""
    found, start = [], 0
    for size in [*sizes, len(rows)]:
        part = rows[start : start + size]
        found += scorer.add(part, spans(start, len(part)))
        start += len(part)
    return found + list(scorer.finish())


@pytest.mark.parametrize("method", ["vadclip", "iefvad"])
@settings(max_examples=12)
@given(st.integers(1, 2 * LENGTH + 3), st.lists(st.integers(0, 40), max_size=12), st.integers(1, 9))
def test_final_scores_are_those_of_the_whole_video(models, method, count, sizes, every):
    score = models[1][method]
    width = WIDTH * len(score.model.streams)
    rows = np.random.default_rng(count).normal(size=(count, width)).astype(np.float32)
    found = streamed(StreamScorer(score, LENGTH, width, every), rows, sizes)
    final = [scores for scores in found if scores.final]
    anomaly, classes = score.model.score_video(rows)
    np.testing.assert_allclose(np.concatenate([scores.anomaly for scores in final]), anomaly, atol=1e-5)
    if classes is not None:
        np.testing.assert_allclose(np.concatenate([scores.classes for scores in final]), classes, atol=1e-5)
    np.testing.assert_array_equal(np.concatenate([scores.spans for scores in final]), spans(0, count))
    # Each snippet is new once, and in order.
    new = np.concatenate([scores.spans[len(scores.spans) - scores.new :] for scores in found])
    np.testing.assert_array_equal(new, spans(0, count))


def test_until_a_window_is_complete_its_snippets_are_scored_with_those_before_them(models):
    score = models[1]["vadclip"]
    rows = np.random.default_rng(0).normal(size=(LENGTH + 5, WIDTH)).astype(np.float32)
    found = streamed(StreamScorer(score, LENGTH, WIDTH), rows, [1] * len(rows))
    assert [scores.final for scores in found] == [False] * (LENGTH - 1) + [True] + [False] * 5 + [True]
    for index in (0, 7, 20):
        so_far, _ = score.model.score_video(rows[: index + 1])
        np.testing.assert_allclose(found[index].anomaly, so_far[-1:], atol=1e-5)
    later, _ = score.model.score_video(rows[LENGTH : LENGTH + 3])
    np.testing.assert_allclose(found[LENGTH + 2].anomaly, later[-1:], atol=1e-5)
    rarely = streamed(StreamScorer(score, LENGTH, WIDTH, every=4), rows[:10], [1] * 10)
    assert [(scores.new, scores.final) for scores in rarely] == [(4, False), (4, False), (2, True)]


def test_a_grid_is_scored_window_by_window_each_as_a_video_of_its_own(models):
    score = models[1]["anomalyclip"]
    length = score.model.sampling.length
    rows = np.random.default_rng(1).normal(size=(2 * length + 7, WIDTH)).astype(np.float32)
    found = streamed(StreamScorer(score, length, WIDTH), rows, [16] * 10)
    final = np.concatenate([scores.anomaly for scores in found if scores.final])
    pieces = [score.model.score_video(rows[start : start + length])[0] for start in range(0, len(rows), length)]
    np.testing.assert_allclose(final, np.concatenate(pieces), atol=1e-5)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def final_scores(folder):
    return [line for line in lines(folder / "scores.jsonl") if line.get("final")]


def assert_as_offline(folder, offline):
    """A stream's final scores against what ``detect`` wrote of the same video."""
    expected, final = json.loads(offline.read_text())["snippets"], final_scores(folder)
    np.testing.assert_allclose([line["anomaly"] for line in final], expected["anomaly"], atol=1e-5)
    np.testing.assert_allclose([line["start"] for line in final], expected["start"], atol=1e-3)
    np.testing.assert_allclose([line["end"] for line in final], expected["end"], atol=1e-3)
    for label, column in (expected["classes"] or {}).items():
        np.testing.assert_allclose([line["classes"][label] for line in final], column, atol=1e-5)


@pytest.mark.parametrize(("method", "more"), [("vadclip", []), ("iefvad", ["--clip", "toy"]), ("anomalyclip", [])])
def test_a_stream_of_a_file_ends_with_the_scores_of_the_file(models, tmp_path, method, more):
    video = write_video(tmp_path / "video.mp4", 70, rate=30.067)
    if method == "anomalyclip":
        video = write_video(tmp_path / "video.mp4", LENGTH, rate=30.067)  # one grid: the whole video
    flags = ["--checkpoint", models[0] / f"{method}.pt", "--device", "cpu", *more]
    assert detect([video, *flags, "--output", tmp_path / "offline"]).code == 0
    outcome = detect(["--stream", video, *flags, "--output", tmp_path / "live", "--timeout", 0.3])
    assert outcome.code == 0, outcome.err
    assert_as_offline(tmp_path / "live", tmp_path / "offline/video.json")
    assert lines(tmp_path / "live/scores.jsonl")[0]["stream"] == str(video)
    assert "results in" in outcome.out


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs real videos in {REAL} (SHARED_DIR)")
def test_a_stream_of_a_real_video_is_scored_as_the_file(models, tmp_path):
    video = REAL / "Fighting033_x264.mp4"
    flags = ["--checkpoint", models[0] / "vadclip.pt", "--device", "cpu"]
    assert detect([video, *flags, "--output", tmp_path / "offline"]).code == 0
    assert detect(["--stream", video, *flags, "--output", tmp_path / "live", "--timeout", 0.3]).code == 0
    assert_as_offline(tmp_path / "live", tmp_path / "offline/Fighting033_x264.json")
    assert len(final_scores(tmp_path / "live")) == 70  # 1105 frames


def grow(path, content, pieces=6, pause=0.15):
    """Write a file bit by bit."""
    step = -(-len(content) // pieces)
    with open(path, "wb") as file:
        for start in range(0, len(content), step):
            time.sleep(pause)
            file.write(content[start : start + step])
            file.flush()


@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4"])
def test_a_growing_file_is_read_to_its_end(models, tmp_path, suffix):
    """Also one that is not there yet, and an MP4 whose index comes last, which is no video before that."""
    whole = write_video(tmp_path / f"whole.{suffix}", 70)
    growing = tmp_path / f"growing.{suffix}"
    writer = threading.Thread(target=grow, args=(growing, whole.read_bytes()))
    flags = ["--checkpoint", models[0] / "vadclip.pt", "--device", "cpu"]
    writer.start()
    outcome = detect(["--stream", growing, *flags, "--output", tmp_path / "live", "--timeout", 1])
    writer.join()
    assert outcome.code == 0, outcome.err
    assert detect([whole, *flags, "--output", tmp_path / "offline"]).code == 0
    assert_as_offline(tmp_path / "live", tmp_path / "offline/whole.json")


@pytest.mark.slow
def test_scores_come_while_the_file_grows(models, tmp_path):
    whole = write_video(tmp_path / "whole.ts", 160)
    growing, half = tmp_path / "growing.ts", whole.stat().st_size // 2
    growing.write_bytes(whole.read_bytes()[:half])
    seen = []

    def finish():
        log = tmp_path / "live/scores.jsonl"
        while not seen:
            time.sleep(0.02)
            seen.extend(log.read_text().splitlines()[1:] if log.exists() else [])
        with open(growing, "ab") as file:
            file.write(whole.read_bytes()[half:])

    writer = threading.Thread(target=finish)
    writer.start()
    flags = ["--checkpoint", models[0] / "vadclip.pt", "--device", "cpu", "--timeout", 3]
    assert detect(["--stream", growing, *flags, "--output", tmp_path / "live"]).code == 0
    writer.join()
    assert seen and len(final_scores(tmp_path / "live")) == 10


def test_a_file_that_stays_no_video_is_refused(models, tmp_path):
    flags = ["--checkpoint", models[0] / "vadclip.pt", "--output", tmp_path / "live", "--timeout", 0.3]
    (tmp_path / "text.mp4").write_text("This is no video.\n")
    cut = write_video(tmp_path / "cut.mp4", 50)
    cut.write_bytes(cut.read_bytes()[:1000])
    for name, says in (("none.ts", "none.ts"), ("text.mp4", "text.mp4"), ("cut.mp4", "index at the end")):
        outcome = detect(["--stream", tmp_path / name, *flags])
        assert outcome.code == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
        assert says in outcome.err
    assert detect(["--stream", tmp_path, *flags]).code == 2


def test_standard_input_is_read(models, tmp_path, monkeypatch):
    video = write_video(tmp_path / "video.ts", 40)
    with open(video, "rb") as file:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
        flags = ["--checkpoint", models[0] / "vadclip.pt", "--device", "cpu", "--output", tmp_path / "live"]
        assert detect(["--stream", "-", *flags]).code == 0
    assert [line["end_frame"] for line in final_scores(tmp_path / "live")] == [16, 32, 40]


def serve(connections):
    """A TCP server that sends each connection its bytes and hangs up; its address."""
    server = socket.create_server(("127.0.0.1", 0))

    def run():
        with server:
            for content in connections:
                client, _ = server.accept()
                with client:
                    client.sendall(content)

    threading.Thread(target=run, daemon=True).start()
    return f"tcp://127.0.0.1:{server.getsockname()[1]}"


def test_a_broken_connection_is_made_again(tmp_path):
    content = write_video(tmp_path / "video.ts", 60).read_bytes()
    told, infos = [], []
    source = StreamSource(serve([content[: len(content) // 2], content]), timeout=2, report=told.append)
    frames = list(source.frames(infos.append))
    assert 60 < len(frames) < 120 and len(infos) == 2 and infos[0].fps == 30
    np.testing.assert_array_equal(frames[-1], list(read_frames(tmp_path / "video.ts"))[-1])
    assert source.live and any("connecting again" in line for line in told)


def test_a_source_that_cannot_be_reached_is_refused(tmp_path):
    with pytest.raises(UserError, match="127.0.0.1"):
        list(StreamSource("tcp://127.0.0.1:9", timeout=0.2).frames(lambda info: None))


def test_damaged_frames_are_left_out(tmp_path):
    # Longer than the distance of key frames, so that the last frames do not depend on the damaged ones.
    content = bytearray(write_video(tmp_path / "video.ts", 270).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(range(200)) * 2
    (tmp_path / "damaged.ts").write_bytes(content)
    frames = list(StreamSource(str(tmp_path / "damaged.ts"), timeout=0.1).frames(lambda info: None))
    assert 200 < len(frames) <= 270
    np.testing.assert_array_equal(frames[-1], list(read_frames(tmp_path / "video.ts"))[-1])


def test_what_a_slow_scorer_cannot_take_is_left_out_oldest_first():
    stop, taken = threading.Event(), []
    made = threading.Event()

    def chunks():
        for number in range(50):
            yield Chunk(16 * number, [])
        made.set()

    for chunk in keep_up(chunks(), stop, waiting=4):
        made.wait(5)
        taken.append(chunk.first)
    assert taken[-4:] == [16 * 46, 16 * 47, 16 * 48, 16 * 49] and len(taken) <= 5


def test_errors_and_the_wish_to_stop_come_through():
    def failing():
        yield Chunk(0, [])
        raise UserError("the camera is gone")

    with pytest.raises(UserError, match="camera"):
        list(keep_up(failing(), threading.Event()))
    stop, hold = threading.Event(), threading.Event()

    def silent():
        hold.wait(20)
        yield Chunk(0, [])

    threading.Timer(0.2, stop.set).start()
    assert list(keep_up(silent(), stop)) == []
    hold.set()


def scripted(values):
    """Scores that follow a script, whatever the rows."""
    return lambda rows: VideoScores(np.array(values[: len(rows)])[None], None)


def test_alerts_follow_the_two_thresholds(tmp_path, capsys):
    values = [0.1, 0.1, 0.6, 0.45, 0.45, 0.2, 0.2, 0.2, 0.45, 0.2, 0.9, 0.9, 0.9]
    with ExitStack() as stack:
        log = StreamLog(tmp_path, stack, 16.0, [], Thresholds(0.5, 0.4, 2, 1))
        for scores in streamed(StreamScorer(scripted(values), 100, 1), np.zeros((13, 1)), [1] * 13):
            log.add(scores)
        log.finish()
    alerts = [(line["alert"], line["start"], line["end"]) for line in lines(tmp_path / "alerts.jsonl")]
    assert alerts == [("start", 2, 4), ("end", 2, 5), ("start", 10, 12), ("end", 10, 13)]
    told = capsys.readouterr().out
    assert "0:04" in told or "0:02  start  anomaly" in told
    assert "0:05  end    anomaly, since 0:02, mean 0.50, highest 0.60" in told
    assert "13 snippets, 0:13; 2 alerts" in told


def test_snippets_left_out_are_told(tmp_path, capsys):
    with ExitStack() as stack:
        log = StreamLog(tmp_path, stack, 16.0, [], Thresholds())
        scorer = StreamScorer(scripted([0.1] * 9), 100, 1)
        for first in (0, 1, 5):
            for scores in scorer.add(np.zeros((1, 1)), spans(first, 1)):
                log.add(scores)
        log.finish()
    told = capsys.readouterr().out
    assert "slower than the source" in told and "3 snippets, 0:06, 0:03 left out" in told


def test_ctrl_c_ends_a_stream_with_everything_written(models, tmp_path):
    video = write_video(tmp_path / "video.ts", 70)

    def interrupt():
        log = tmp_path / "live/scores.jsonl"
        while not log.exists() or log.read_text().count("\n") < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    flags = ["--checkpoint", models[0] / "vadclip.pt", "--device", "cpu", "--timeout", 60]
    outcome = detect(["--stream", video, *flags, "--output", tmp_path / "live"])
    assert outcome.code == 130 and "results in" in outcome.out and "Traceback" not in outcome.err
    assert len(final_scores(tmp_path / "live")) >= 1


@pytest.mark.slow
def test_memory_stays_flat_over_two_hours(tmp_path):
    """13,500 snippets are two hours at 30 frames a second; 64 of them a window, 3 classes."""
    rng = np.random.default_rng(0)
    anomaly, classes, row = rng.random((50, 1, 64)), rng.dirichlet(np.ones(3), 64), rng.normal(size=(1, 8))

    def score(rows):
        return VideoScores(anomaly[rng.integers(50)][:, : len(rows)], classes[: len(rows)])

    scorer = StreamScorer(score, 64, 8)
    kept = []
    with ExitStack() as stack:
        log = StreamLog(tmp_path, stack, 30.0, ["calm", "fire", "fight"], Thresholds(0.7, 0.4))
        for snippet in range(13_500):
            # What is allocated in some minutes, early and late, and still there at their end.
            if snippet in (2000, 12_000):
                tracemalloc.start(25)
            for scores in scorer.add(row, np.array([[16 * snippet, 16 * snippet + 16]])):
                log.add(scores)
            if snippet in (3000, 13_000):
                # By the package, itself or through others: threads of tests before this one may allocate too.
                own = tracemalloc.take_snapshot().filter_traces(
                    [tracemalloc.Filter(True, "*/clipfusionvad/*", all_frames=True)]
                )
                kept.append(sum(item.size for item in own.traces))
                tracemalloc.stop()
        log.finish()
    assert max(kept) < 100_000, kept
    assert log.snippets == 13_500 and log.segments > 100
