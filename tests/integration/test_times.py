"""Times come from the frames' own timestamps, in all that is written of a video; else from the frame rate."""

import json

import av
import numpy as np
import pandas as pd
import pytest
from made_videos import write_video
from small_detect import detect, write_model
from tiny import quietly

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.extraction.decode import read_frames
from clipfusionvad.tools.detect.stream import StreamSource

# Milliseconds of 80 frames: as fast as announced and then slow, as of a camera at night; 10 a second announced as 30.
NIGHT = [33 * index if index < 40 else 33 * 40 + 400 * (index - 40) for index in range(80)]
STEADY = [100 * index for index in range(80)]
FILES = {"mkv": "libx264", "flv": "flv", "ts": "libx264", "mp4": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}


def times_of(path, **options):
    infos, times = [], []
    frames = sum(1 for _ in read_frames(path, infos.append, times.append, **options))
    assert frames == len(times)
    return infos[0], times


@pytest.mark.parametrize("true", [NIGHT, STEADY])
@pytest.mark.parametrize("suffix", FILES)
def test_frames_have_the_times_of_their_timestamps(tmp_path, suffix, true):
    info, times = times_of(write_video(tmp_path / f"v.{suffix}", 80, FILES[suffix], times=true))
    np.testing.assert_allclose(times, np.array(true) / 1000, atol=1e-6)
    assert info.times == "timestamps"
    # The last frame is taken to last as long as the others on average.
    end = info.end(80, times[-1])
    assert end == pytest.approx(true[-1] / 1000 * 80 / 79)
    assert info.measured(80, end).fps == pytest.approx(80 / end, rel=0.02)


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "h264"), ("libx265", "hevc"), ("mpeg2video", "m2v")])
def test_a_stream_without_timestamps_has_the_times_of_the_rate_in_its_header(tmp_path, codec, suffix):
    """ffmpeg itself assumes 25 frames a second of such a file."""
    info, times = times_of(write_video(tmp_path / f"v.{suffix}", 40, codec, rate=50))
    assert (info.times, info.fps) == ("frame rate", 50)
    assert times == [index / 50 for index in range(40)]


def test_a_given_rate_takes_the_place_of_timestamps(tmp_path):
    info, times = times_of(write_video(tmp_path / "v.mkv", 80, times=NIGHT), fps=8)
    assert (info.times, info.fps) == ("frame rate", 8)
    assert times == [index / 8 for index in range(80)]


def test_times_of_a_steady_video_are_those_of_its_rate(tmp_path):
    """To the last bit: frame 30 belongs to second 1, not to second 0."""
    info, times = times_of(write_video(tmp_path / "v.mp4", 70))
    assert times == [index / 30 for index in range(70)] and info.end(70, times[-1]) == pytest.approx(70 / 30)
    milliseconds, times = times_of(write_video(tmp_path / "v.mkv", 70))
    end = milliseconds.end(70, times[-1])
    # Rounding to milliseconds does not make it another rate.
    assert milliseconds.measured(70, end).fps == 30


def test_joined_recordings_go_on_where_the_first_one_ends(tmp_path):
    """Their timestamps start anew."""
    first, second = write_video(tmp_path / "a.ts", 90), write_video(tmp_path / "b.ts", 60)
    (tmp_path / "ab.ts").write_bytes(first.read_bytes() + second.read_bytes())
    _, times = times_of(tmp_path / "ab.ts")
    np.testing.assert_allclose(times, np.arange(150) / 30, atol=1e-4)


def test_timestamps_that_stand_still_are_spread_by_the_rate(tmp_path):
    """Whole milliseconds cannot tell 2000 frames a second apart."""
    path = write_video(tmp_path / "v.mkv", 40, rate=2000)
    with av.open(str(path)) as container:
        assert len({frame.pts for frame in container.decode(video=0)}) < 40
    _, times = times_of(path)
    assert (np.diff(times) > 0).all()
    np.testing.assert_allclose(times, np.arange(40) / 2000, atol=1e-3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "vadclip.pt"
    write_model(path, "vadclip")
    return ["--checkpoint", path, "--device", "cpu", "--threshold", 0, "--low-threshold", 0]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("suffix", ["mkv", "flv", "ts"])
def test_all_that_is_written_has_these_times(tmp_path, model, suffix):
    video, out = write_video(tmp_path / f"v.{suffix}", 80, FILES[suffix], times=NIGHT), tmp_path / "out"
    whole = NIGHT[-1] / 1000 * 80 / 79
    bounds = [*(NIGHT[frame] / 1000 for frame in range(0, 80, 16)), whole]
    assert detect([video, *model, "--annotated", "--output", out]).code == 0
    found = json.loads((out / "v.json").read_text())
    assert found["video"]["times"] == "timestamps" and found["video"]["fps"] == pytest.approx(80 / whole)
    assert found["video"]["seconds"] == pytest.approx(whole, abs=1e-3)
    snippets, table = found["snippets"], pd.read_csv(out / "v.csv")
    for starts, ends in ((snippets["start"], snippets["end"]), (table["start"], table["end"])):
        np.testing.assert_allclose([*starts, ends[len(ends) - 1]], bounds, atol=1e-3)
    (segment,), rows = found["segments"], pd.read_csv(out / "v_segments.csv")
    assert (segment["start"], segment["end"], rows["end"][0]) == pytest.approx((0, whole, whole), abs=1e-3)
    assert pd.read_csv(out / "v_seconds.csv")["second"].tolist() == sorted({time // 1000 for time in NIGHT})
    page = (out / "v.html").read_text()
    assert "by timestamps" in page and "length 0:17" in page
    with av.open(str(out / "v_annotated.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, np.array(NIGHT) / 1000, atol=1e-3)

    assert detect(["--stream", video, *model, "--timeout", 0.3, "--output", tmp_path / "live"]).code == 0
    head, *lines = read_lines(tmp_path / "live" / "scores.jsonl")
    final = [line for line in lines if line["final"]]
    assert head["times"] == "timestamps"
    np.testing.assert_allclose([*(line["start"] for line in final), final[-1]["end"]], bounds, atol=1e-3)
    np.testing.assert_allclose([line["end"] for line in final], bounds[1:], atol=1e-3)
    alert = read_lines(tmp_path / "live" / "alerts.jsonl")[-1]
    assert (alert["start"], alert["end"]) == pytest.approx((0, whole), abs=1e-3)

    flags = ["--clip", "toy", "--embed-dim", 64, "--device", "cpu", "--crops", 1, "--output", tmp_path / "f"]
    assert quietly(package_main, ["extract", "--videos", str(video), *map(str, flags)]).code == 0
    record = read_lines(tmp_path / "f" / "manifest.jsonl")[-1]
    assert record["times"] == "timestamps" and record["frames"] == 80
    assert (record["duration"], record["fps"]) == pytest.approx((whole, 80 / whole), abs=1e-3)


def test_the_lengths_of_segments_are_in_these_times(tmp_path, model):
    """Sixteen frames are 0.5 s by the announced rate, but 1.6 s long."""
    video = write_video(tmp_path / "v.mkv", 80, times=STEADY)
    for least, count in ((7.9, 1), (8.1, 1), (0, 1)):
        flags = ["--min-seconds", least, "--output", tmp_path / "out"]
        assert detect([video, *model, *flags]).code == 0
        found = json.loads((tmp_path / "out" / "v.json").read_text())
        assert [round(segment["end"], 3) for segment in found["segments"]] == [8.0] * count
    flags = ["--every", 3, "--timeout", 0.3, "--output", tmp_path / "live"]
    assert detect(["--stream", video, *model, *flags]).code == 0
    lines = read_lines(tmp_path / "live" / "scores.jsonl")[1:]
    # Scored again after 3.2 and 6.4 s, and at the end.
    assert [line["end_frame"] for line in lines if not line["final"]] == [16, 32, 48, 64]


def test_a_given_rate_is_said(tmp_path, model):
    video = write_video(tmp_path / "v.mkv", 80, times=STEADY)
    for name, flags in (("file", [video]), ("live", ["--stream", video, "--timeout", 0.3])):
        assert detect([*flags, *model, "--fps", 16, "--output", tmp_path / name]).code == 0
    found = json.loads((tmp_path / "file" / "v.json").read_text())["video"]
    head, *lines = read_lines(tmp_path / "live" / "scores.jsonl")
    assert (found["times"], found["fps"], found["seconds"]) == ("frame rate", 16, 5)
    assert (head["times"], head["fps"], lines[-1]["end"]) == ("frame rate", 16, 5)


def test_times_go_on_after_a_connection_is_made_again(tmp_path):
    """The second one sends timestamps of its own."""
    path, infos = write_video(tmp_path / "v.ts", 32), []
    source = StreamSource(str(path), timeout=0.1)
    twice = [list(source.chunks(16, infos.append)) for _ in range(2)]
    times = [time for chunks in twice for chunk in chunks for time in chunk.times]
    np.testing.assert_allclose(times, np.arange(64) / 30, atol=1e-4)


def test_a_stream_that_begins_in_the_middle_is_left_out(tmp_path):
    """In FLV, sound may begin late; PyAV raises an error at its first packet."""
    content, tags, position = bytearray(write_video(tmp_path / "v.flv", 300, "flv").read_bytes()), [], 13
    while position < len(content):
        tags.append(position)
        position += 15 + int.from_bytes(content[position + 1 : position + 4], "big")
    assert content[tags[280]] == 9
    content[tags[280]] = 8  # from pictures to sound
    (tmp_path / "v.flv").write_bytes(content)
    _, times = times_of(tmp_path / "v.flv")
    assert len(times) == 299 and times[-1] == pytest.approx(299 / 30, abs=1e-3)
