"""Streams: as offline where a window is complete, alerts by hysteresis, sources that grow, break and outrun, memory."""

import json
import os
import signal
import socket
import sys
import threading
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_videos import write_video
from small_detect import detect, write_model
from tiny import LENGTH, WIDTH

from clipfusionvad.extraction.decode import read_frames
from clipfusionvad.io.errors import UserError
from clipfusionvad.metrics.segments import Span, Thresholds
from clipfusionvad.tools.detect.stream import StreamSource, keep_up, score_windows, write_logs

HEAD = {"stream": "x"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return folder, {name: write_model(folder / f"{name}.pt", name) for name in ("vadclip", "iefvad", "anomalyclip")}


def flags_of(models, *more, method="vadclip"):
    return ["--checkpoint", models[0] / f"{method}.pt", "--device", "cpu", *more]


def spans(first, count):
    return [Span(16 * snippet, 16 * snippet + 16, snippet, snippet + 1.0) for snippet in range(first, first + count)]


def streamed(score, rows, sizes, length=LENGTH, every=1):
    """All that comes of rows that arrive in such portions."""
    ends, whole = [*np.cumsum(sizes).astype(int), len(rows)], spans(0, len(rows))
    batches = ((rows[start:end], whole[start:end]) for start, end in zip([0, *ends], ends, strict=False))
    return list(score_windows(batches, score, length, every))


@pytest.mark.parametrize("method", ["vadclip", "iefvad", "anomalyclip"])
@settings(max_examples=12)
@given(st.integers(1, 2 * LENGTH + 3), st.lists(st.integers(0, 40), max_size=12), st.integers(1, 9))
def test_final_scores_are_those_of_the_whole_video(models, method, count, sizes, every):
    """A sampling that spreads over a whole video scores each window as a video of its own."""
    model = models[1][method]
    rows = np.random.default_rng(count).normal(size=(count, WIDTH * len(model.streams))).astype(np.float32)
    found = streamed(model.score_video, rows, sizes, every=every)
    final = [scores for scores in found if scores.final]
    step = LENGTH if method == "anomalyclip" else count
    for start in range(0, count, step):
        anomaly, classes = model.score_video(rows[start : start + step])
        part = slice(start, start + step)
        np.testing.assert_allclose(np.concatenate([found.anomaly for found in final])[part], anomaly, atol=1e-5)
        if classes is not None:
            np.testing.assert_allclose(np.concatenate([found.classes for found in final])[part], classes, atol=1e-5)
    assert sum((scores.spans for scores in final), []) == spans(0, count)
    # Each snippet is new once, and in order.
    assert sum((scores.spans[len(scores.spans) - scores.new :] for scores in found), []) == spans(0, count)


def test_until_a_window_is_complete_its_snippets_are_scored_with_those_before_them(models):
    score = models[1]["vadclip"].score_video
    rows = np.random.default_rng(0).normal(size=(LENGTH + 5, WIDTH)).astype(np.float32)
    found = streamed(score, rows, [1] * len(rows))
    assert [scores.final for scores in found] == [False] * (LENGTH - 1) + [True] + [False] * 5 + [True]
    for index, start in ((0, 0), (7, 0), (20, 0), (LENGTH + 2, LENGTH)):
        so_far, _ = score(rows[start : index + 1])
        np.testing.assert_allclose(found[index].anomaly, so_far[-1:], atol=1e-5)
    rarely = streamed(score, rows[:10], [1] * 10, every=4)
    assert [(scores.new, scores.final) for scores in rarely] == [(4, False), (4, False), (2, True)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def final_scores(folder):
    return [line for line in lines(folder / "scores.jsonl") if line.get("final")]


def assert_as_offline(live, video, flags):
    """A stream's final scores against what ``detect`` writes of the same video."""
    assert detect([video, *flags, "--output", live.parent / "offline"]).code == 0
    expected = json.loads((live.parent / "offline" / f"{video.stem}.json").read_text())["snippets"]
    final = final_scores(live)
    np.testing.assert_allclose([line["anomaly"] for line in final], expected["anomaly"], atol=1e-5)
    for bound in ("start", "end"):
        np.testing.assert_allclose([line[bound] for line in final], expected[bound], atol=1e-3)
    for label, column in (expected["classes"] or {}).items():
        np.testing.assert_allclose([line["classes"][label] for line in final], column, atol=1e-5)


@pytest.mark.parametrize(("method", "more"), [("vadclip", []), ("iefvad", ["--clip", "toy"]), ("anomalyclip", [])])
def test_a_stream_of_a_file_ends_with_the_scores_of_the_file(models, tmp_path, method, more):
    # AnomalyCLIP: one grid, the whole video.
    video = write_video(tmp_path / "video.mp4", LENGTH if method == "anomalyclip" else 70, rate=30.067)
    flags, live = flags_of(models, *more, method=method), tmp_path / "live"
    outcome = detect(["--stream", video, *flags, "--output", live, "--timeout", 0.3])
    assert outcome.code == 0 and "results in" in outcome.out, outcome.err
    assert_as_offline(live, video, flags)
    assert lines(live / "scores.jsonl")[0]["stream"] == str(video)


def grow(path, content):
    with open(path, "wb", buffering=0) as file:
        for piece in np.array_split(np.frombuffer(content, np.uint8), 6):
            time.sleep(0.15)
            file.write(piece.tobytes())


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4"])
def test_a_growing_file_is_read_to_its_end(models, tmp_path, suffix):
    """Also one that is not there yet, and an MP4 whose index comes last, which is no video before that."""
    whole, growing = write_video(tmp_path / f"whole.{suffix}", 70), tmp_path / f"growing.{suffix}"
    writer = threading.Thread(target=grow, args=(growing, whole.read_bytes()))
    writer.start()
    outcome = detect(["--stream", growing, *flags_of(models), "--output", tmp_path / "live", "--timeout", 1])
    writer.join()
    assert outcome.code == 0, outcome.err
    assert_as_offline(tmp_path / "live", whole, flags_of(models))


def test_a_file_that_stays_no_video_is_refused(models, tmp_path):
    (tmp_path / "text.mp4").write_text("This is no video.\n")
    cut = write_video(tmp_path / "cut.mp4", 50)
    cut.write_bytes(cut.read_bytes()[:1000])
    says = {"none.ts": "none.ts", "text.mp4": "text.mp4", "cut.mp4": "index at the end", ".": "is not a file"}
    for name, words in says.items():
        flags = flags_of(models, "--output", tmp_path / "live", "--timeout", 0.3)
        outcome = detect(["--stream", tmp_path / name, *flags])
        assert outcome.code == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
        assert words in outcome.err


def test_standard_input_is_read(models, tmp_path, monkeypatch):
    with open(write_video(tmp_path / "video.ts", 40), "rb") as file:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
        assert detect(["--stream", "-", *flags_of(models, "--output", tmp_path / "live")]).code == 0
    assert [line["end_frame"] for line in final_scores(tmp_path / "live")] == [16, 32, 40]


def serve(connections):
    """A TCP server that sends each connection its bytes and hangs up; its address."""
    server = socket.create_server(("127.0.0.1", 0))

    def run():
        with server:
            for content in connections:
                with server.accept()[0] as client:
                    client.sendall(content)

    threading.Thread(target=run, daemon=True).start()
    return f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
def test_a_broken_connection_is_made_again(tmp_path):
    content = write_video(tmp_path / "video.ts", 60).read_bytes()
    told, infos = [], []
    source = StreamSource(serve([content[: len(content) // 2], content]), timeout=2, report=told.append)
    frames = list(source.frames(infos.append))
    assert 60 < len(frames) < 120 and len(infos) == 2 and infos[0].fps == 30
    np.testing.assert_array_equal(frames[-1], list(read_frames(tmp_path / "video.ts"))[-1])
    assert source.live and any("connecting again" in line for line in told)
    with pytest.raises(UserError, match="127.0.0.1"):
        list(StreamSource("tcp://127.0.0.1:9", timeout=0.2).frames(infos.append))


def test_damaged_frames_are_left_out(tmp_path):
    # Longer than the distance of key frames, so that the last frames do not depend on the damaged ones.
    content = bytearray(write_video(tmp_path / "video.ts", 270).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(range(200)) * 2
    (tmp_path / "damaged.ts").write_bytes(content)
    frames = list(StreamSource(str(tmp_path / "damaged.ts"), timeout=0.1).frames(lambda info: None))
    assert 200 < len(frames) <= 270
    np.testing.assert_array_equal(frames[-1], list(read_frames(tmp_path / "video.ts"))[-1])


def test_a_slow_scorer_misses_the_oldest_chunks_gets_errors_and_can_be_stopped_in_silence():
    taken, made = [], threading.Event()

    def chunks():
        yield from range(50)
        made.set()
        raise UserError("the camera is gone")

    with pytest.raises(UserError, match="camera"):
        for chunk in keep_up(chunks(), threading.Event(), waiting=4):
            made.wait(5)
            taken.append(chunk)
    assert taken[-4:] == [46, 47, 48, 49] and len(taken) <= 5
    stop, hold = threading.Event(), threading.Event()
    threading.Timer(0.2, stop.set).start()
    assert list(keep_up(iter(lambda: hold.wait(20), True), stop)) == []
    hold.set()


def test_alerts_follow_the_two_thresholds(tmp_path, capsys):
    values = np.array([0.1, 0.1, 0.6, 0.45, 0.45, 0.2, 0.2, 0.2, 0.45, 0.2, 0.9, 0.9, 0.9])
    windows = streamed(lambda rows: (values[: len(rows)], None), np.zeros((13, 1)), [1] * 13, 100)
    write_logs(windows, tmp_path, HEAD, [], Thresholds(0.5, 0.4, 2, 1))
    alerts = [(line["alert"], line["start"], line["end"]) for line in lines(tmp_path / "alerts.jsonl")]
    assert alerts == [("start", 2, 4), ("end", 2, 5), ("start", 10, 12), ("end", 10, 13)]
    told = capsys.readouterr().out
    assert "0:02  start  anomaly" in told
    assert "0:05  end    anomaly, since 0:02, anomaly score 0.50, highest 0.60" in told
    assert "13 snippets, 0:13; 2 alerts" in told


def test_snippets_left_out_are_told(tmp_path, capsys):
    batches = ((np.zeros((1, 1)), spans(first, 1)) for first in (0, 1, 5))
    windows = score_windows(batches, lambda rows: (np.full(len(rows), 0.1), None), 100)
    write_logs(windows, tmp_path, HEAD, [], Thresholds())
    told = capsys.readouterr().out
    assert "slower than the source" in told and "3 snippets, 0:06, 0:03 left out" in told


def test_ctrl_c_ends_a_stream_with_everything_written(models, tmp_path):
    """Scores come while the stream waits for more of the file."""
    video, live = write_video(tmp_path / "video.ts", 70), tmp_path / "live"

    def interrupt():
        while not (live / "scores.jsonl").exists() or len(lines(live / "scores.jsonl")) < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    outcome = detect(["--stream", video, *flags_of(models, "--timeout", 60), "--output", live])
    assert outcome.code == 130 and "results in" in outcome.out and "Traceback" not in outcome.err
    assert len(final_scores(live)) >= 1


@pytest.mark.slow
def test_memory_stays_flat_over_two_hours(tmp_path, capfd):
    """13,500 snippets are two hours at 30 frames a second; 64 of them a window, 3 classes."""
    # capfd keeps what is printed in a file, not in memory.
    rng = np.random.default_rng(0)
    anomaly, classes, row = rng.random((50, 64)), rng.dirichlet(np.ones(3), 64), rng.normal(size=(1, 8))
    kept = []

    def arriving():
        for snippet in range(13_500):
            # What is allocated in some minutes, early and late, and still there at their end.
            if snippet in (2000, 12_000):
                tracemalloc.start(25)
            yield row, [Span(16 * snippet, 16 * snippet + 16, 16 * snippet / 30, (16 * snippet + 16) / 30)]
            if snippet in (3000, 13_000):
                # By the package, itself or through others: threads of tests before this one may allocate too.
                package = [tracemalloc.Filter(True, "*/clipfusionvad/*", all_frames=True)]
                kept.append(sum(item.size for item in tracemalloc.take_snapshot().filter_traces(package).traces))
                tracemalloc.stop()

    def score(rows):
        return anomaly[rng.integers(50)][: len(rows)], classes[: len(rows)]

    windows = score_windows(arriving(), score, 64)
    write_logs(windows, tmp_path, {}, ["calm", "fire", "fight"], Thresholds(0.7, 0.4))
    assert max(kept) < 100_000, kept
    told = capfd.readouterr().out.splitlines()[-1]
    assert told.startswith("13500 snippets") and int(told.split()[-2]) > 100
