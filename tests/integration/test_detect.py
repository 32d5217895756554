"""Detection from the video file to what is written about it."""

import json
import re

import av
import numpy as np
import pandas as pd
import pytest
import torch
from made_videos import plain_event_rows, plain_rows, write_sound, write_video
from small_detect import FRAMES, detect, make_place, score, write_model
from tiny import METHOD_FLAGS, WIDTH, skip_without_packages

from clipfusionvad.datasets import UCF, XD
from clipfusionvad.extraction.decode import VideoInfo, read_frames
from clipfusionvad.io.files import write_torch
from clipfusionvad.metrics.segments import Thresholds
from clipfusionvad.models.clip import image_tower, load_clip
from clipfusionvad.tools.detect import page


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and a video; never written to."""
    return make_place(tmp_path_factory.mktemp("detect"))


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    """Drawing takes longer than all the rest; one test looks at the picture."""
    if "slowly_made_features" not in request.node.name:
        monkeypatch.setattr(page, "draw_scores", lambda *args: None)


@pytest.fixture
def scored(place, tmp_path):
    """Score the video and return the folder of the results, ``tmp_path / name``."""

    def scored(name, *flags, video=place / "video.mp4", model=place / "vadclip.pt"):
        return score(video, model, tmp_path / name, *flags)

    return scored


@pytest.fixture
def refused(place, tmp_path):
    """Check that a command is refused in one line that says the words."""

    def refuse(says, *flags, video=place / "video.mp4", model=place / "vadclip.pt"):
        outcome = detect([*[video] * (video is not None), "--checkpoint", model, "--output", tmp_path / "no", *flags])
        assert outcome.code == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome
        assert says in outcome.err, outcome.err

    return refuse


def described(folder, name="video"):
    return json.loads((folder / f"{name}.json").read_text())


def table(path):
    return pd.read_csv(path, keep_default_na=False).to_dict("records")


@pytest.mark.parametrize("method", METHOD_FLAGS)
def test_scores_are_those_of_slowly_made_features(method, place, tmp_path, scored):
    skip_without_packages(method)
    model, video = write_model(tmp_path / "model.pt", method), place / "video.mp4"
    # A model without class texts does not know the CLIP of its features.
    flags = ["--crop", 6] if model.needs_clip else ["--clip", "toy"]
    out = scored("out", *flags, model=tmp_path / "model.pt")
    tower, frames = image_tower(load_clip("toy", WIDTH)), list(read_frames(video))
    length = 1 if method == "anomalyclip" else 16
    chunks = [frames[start : start + length] for start in range(0, FRAMES, length)]
    plain = (plain_rows, plain_event_rows)[: len(model.streams)]
    features = [rows(tower, chunks, 6 * model.needs_clip).astype(np.float32) for rows in plain]
    anomaly, classes = model.score_video(features)
    found, rows = described(out), table(out / "video.csv")
    np.testing.assert_allclose(found["snippets"]["anomaly"], anomaly, atol=1e-4)
    np.testing.assert_allclose([row["anomaly"] for row in rows], anomaly, atol=1e-4)
    assert len(anomaly) == len(chunks)
    if classes is None:
        assert found["snippets"]["classes"] is None and all(s["label"] is None for s in found["segments"])
    else:
        np.testing.assert_allclose([found["snippets"]["classes"][name] for name in UCF.labels], classes.T, atol=1e-4)
        np.testing.assert_allclose([[row[name] for name in UCF.labels] for row in rows], classes, atol=1e-4)
    assert rows[-1]["end"] == pytest.approx(FRAMES / 30, abs=1e-5)
    assert len(table(out / "video_seconds.csv")) == 3
    assert len(table(out / "video_segments.csv")) == len(found["segments"])
    assert (out / "video.png").read_bytes().startswith(b"\x89PNG")
    assert "video.mp4" in (out / "video.html").read_text()
    assert (out / "video.mp4").read_bytes() == video.read_bytes()


@pytest.fixture(scope="module")
def odd(place, tmp_path_factory):
    """What a folder of odd files gives, scored once."""
    folder, out = tmp_path_factory.mktemp("odd"), tmp_path_factory.mktemp("odd_out")
    write_video(folder / "hevc.mp4", 54, "libx265", 27.00003)
    write_video(folder / "rate.mp4", 91, rate=30.067)
    write_video(folder / "short.mp4", 10)
    whole = write_video(folder / "cut.mp4", 200, movflags="faststart")
    whole.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.6)])
    write_sound(folder / "sound.mp4")
    (folder / "text.mp4").write_text("This is no video.\n")
    (folder / "deep").mkdir()
    write_video(folder / "deep" / "short.mp4", 20)
    flags = ["--checkpoint", place / "vadclip.pt", "--device", "cpu", "--threshold", 0, "--low-threshold", 0]
    return out, detect([folder, *flags, "--output", out])


def test_bad_files_cost_a_line_each_and_the_others_are_scored(odd):
    out, outcome = odd
    assert outcome.code == 1
    sound, text = sorted(line for line in outcome.err.splitlines() if line.startswith("error: "))
    assert "2 of 7 failed" in outcome.err and "Traceback" not in outcome.err
    assert "sound.mp4 has no video stream" in sound and "text.mp4" in text
    assert not (out / "sound.json").exists() and not (out / "text.html").exists()
    listed = {row["name"]: row for row in table(out / "index.csv")}
    assert listed.keys() == {"hevc", "rate", "short", "cut", "sound", "text", "deep/short"}
    assert "no video stream" in listed["sound"]["verdict"] and listed["sound"]["max_score"] == ""
    index = (out / "index.html").read_text()
    assert 'href="deep/short.html"' in index and (out / "deep/short.html").is_file() and "text.mp4" in index
    # Of a truncated file, the frames that are there are scored.
    found = described(out, "cut")
    read = found["video"]["frames_read"]
    assert 16 < read < 200 and len(found["snippets"]["anomaly"]) == -(-read // 16)
    (warning,) = (line for line in outcome.err.splitlines() if line.startswith("warning: "))
    assert found["warning"] in warning and "cut.mp4" in warning
    assert "breaks off" in (out / "cut.html").read_text()


@pytest.mark.parametrize(
    ("name", "frames", "fps"), [("hevc", 54, 27.00003), ("rate", 91, 30.067), ("short", 10, 30), ("deep/short", 20, 30)]
)
def test_seconds_are_right_at_any_rate_and_length(odd, name, frames, fps):
    found = described(odd[0], name)
    assert found["video"]["frames_read"] == frames and found["warning"] is None
    assert found["video"]["fps"] == pytest.approx(fps, rel=1e-4)
    starts, (segment,) = found["snippets"]["start"], found["segments"]
    for seconds in (found["video"]["seconds"], found["snippets"]["end"][-1], segment["end"]):
        assert seconds == pytest.approx(frames / fps, abs=1e-3)
    assert len(starts) == -(-frames // 16) and (segment["start_frame"], segment["end_frame"]) == (0, frames)
    np.testing.assert_allclose(starts, np.arange(len(starts)) * 16 / fps, atol=1e-3)


@pytest.mark.parametrize(("fps", "frames"), [(27.00003, 100), (7.5, 33), (0.4, 5), (60.0, 20)])
def test_seconds_average_their_frames(fps, frames):
    rng = np.random.default_rng(3)
    bounds = np.minimum(np.arange(-(-frames // 16) + 1) * 16, frames)
    scores, info = rng.random((len(bounds) - 1, 4)), VideoInfo("v", fps, frames, 4, 4, "h264")
    # Labels of one's own may be words of the table.
    times = np.arange(frames + 1) / fps
    found = page.Detection(info, scores[:, 0], scores[:, 1:], bounds, times, ("anomaly", "end", "c"), Thresholds(), ())
    _, seconds = found.tables()
    numbers = [int(frame / fps) for frame in range(frames)]
    assert seconds.index.tolist() == sorted(set(numbers)) and [*seconds] == ["anomaly", "anomaly", "end", "c"]
    for number, means in zip(seconds.index, seconds.to_numpy(), strict=True):
        rows = [frame // 16 for frame in range(frames) if numbers[frame] == number]
        np.testing.assert_allclose(means, scores[rows].mean(axis=0))


def test_finished_videos_are_kept_until_something_changes(tmp_path, scored):
    video = write_video(tmp_path / "video.mp4", 40)

    def written(*flags):
        return (scored("out", *flags, video=video) / "video.json").stat().st_mtime_ns

    first = written()
    assert written() == first
    again = written("--threshold", 0.7)
    assert again > first
    over = written("--threshold", 0.7, "--overwrite")
    assert over > again
    write_video(video, 50, still=True)
    assert written("--threshold", 0.7) > over and described(tmp_path / "out")["video"]["frames_read"] == 50
    (tmp_path / "out/video.json").write_text('{"half')
    assert written("--threshold", 0.7) and described(tmp_path / "out")["video"]["frames_read"] == 50


def test_the_video_beside_its_page(place, scored):
    original = place / "video.mp4"
    copied, bare = scored("copied", "--video", "copy"), scored("bare", "--video", "none")
    assert (copied / "video.mp4").read_bytes() == original.read_bytes()
    assert not (copied / "video.mp4").samefile(original)
    assert not (bare / "video.mp4").exists() and "<video" not in (bare / "video.html").read_text()
    assert (scored("copied", "--overwrite") / "video.mp4").samefile(original)
    assert not (scored("copied", "--overwrite", "--video", "copy") / "video.mp4").samefile(original)


def test_the_annotated_video_is_the_video_with_a_strip_below(place, scored):
    drawn = scored("drawn", "--annotated")
    assert "video_annotated.mp4" in (drawn / "video.html").read_text()
    with av.open(str(drawn / "video_annotated.mp4")) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert len(frames) == FRAMES and stream.average_rate == 30
    originals, (height, width, _) = list(read_frames(place / "video.mp4")), frames[0].shape
    assert width == 64 and height > 48
    # The picture is that of the video but for the label at its top, also in time: its noise is new every 30 frames.
    for index in (29, 30):
        errors = [np.abs(frames[index][40:48].astype(int) - original[40:]).mean() for original in originals]
        assert np.argmin(errors) // 30 == index // 30 and errors[index] < 12


def test_results_among_the_videos_are_not_scored_again(tmp_path, scored, refused):
    write_video(tmp_path / "one.mp4", 20)
    for _ in range(2):
        assert [row["name"] for row in table(scored("no", video=tmp_path) / "index.csv")] == ["one"]
    refused("name another --output", video=tmp_path / "no")


def test_own_classes_take_the_place_of_the_trained_ones_and_meanings_that_of_codes(tmp_path, scored):
    (tmp_path / "classes.txt").write_text("# mine\ncalm\nsmoke=thick smoke\nfire\n")
    found = described(scored("own", "--classes", tmp_path / "classes.txt"))
    assert list(found["snippets"]["classes"]) == ["calm", "smoke", "fire"]
    assert found["settings"]["classes"]["smoke"] == "thick smoke"
    np.testing.assert_allclose(np.sum(list(found["snippets"]["classes"].values()), axis=0), 1, atol=1e-5)
    assert described(scored("words", "--classes", "calm", "smoke=thick smoke", "fire"))["snippets"] == found["snippets"]
    assert described(scored("trained"))["snippets"]["anomaly"] == found["snippets"]["anomaly"]
    write_model(tmp_path / "xd.pt", "vadclip", XD)
    assert list(described(scored("xd", model=tmp_path / "xd.pt"))["snippets"]["classes"]) == XD.prompts


def test_own_classes_are_refused_where_weights_belong_to_the_trained_ones(tmp_path, refused):
    for method, reason in (("anomalyclip", "prompt_learner.ctx"), ("iefvad", "does not distinguish classes")):
        write_model(tmp_path / "model.pt", method)
        # As many as before, too: the shapes would fit.
        for classes in (["calm", "fire"], [f"class {number}" for number in range(14)]):
            refused(reason, "--classes", *classes, model=tmp_path / "model.pt")


def test_bad_command_lines_are_one_line(tmp_path, refused):
    for classes in (["calm"], ["calm", "calm"], ["calm", "=fire"], ["calm", "fire="]):
        refused("--classes takes at least two", "--classes", *classes)
    refused("--stream", video=None)
    refused("--stream", "--stream", "x")
    refused("none.mp4", video=tmp_path / "none.mp4")
    refused("--stream", video="rtsp://camera/live")
    refused("none.pt", model=tmp_path / "none.pt")
    np.save(tmp_path / "features.npy", np.zeros((3, WIDTH)))
    refused("holds features", video=tmp_path / "features.npy")
    refused("0.4 is above the high one, 0.3", "--threshold", 0.3, "--low-threshold", 0.4)
    refused("crop", "--crop", 10)


def test_a_released_file_is_read_with_what_the_command_line_says_of_it(place, tmp_path, scored):
    file = torch.load(place / "vadclip.pt", weights_only=True)
    write_torch(tmp_path / "bare.pt", file["model_state_dict"])
    sizes = {"visual_width": WIDTH, "embed_dim": WIDTH} | file["hparams"]["options"]
    (tmp_path / "model.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in sizes.items()))
    flags = ["--method", "vadclip", "--dataset", "ucf", "--clip", "toy", "--config", tmp_path / "model.yaml"]
    one, other = described(scored("bare", *flags, model=tmp_path / "bare.pt")), described(scored("ours"))
    assert one["snippets"] == other["snippets"] and one["segments"] == other["segments"]


def test_two_streams_need_the_weights_of_both(tmp_path, scored, refused):
    model, clip, wide = (tmp_path / name for name in ("iefvad.pt", "clip.pt", "wide.pt"))
    write_model(model, "iefvad")
    write_torch(clip, load_clip("toy", WIDTH).state)
    write_torch(wide, load_clip("toy", 2 * WIDTH).state)
    refused("--event-clip", "--clip", clip, model=model)
    refused(str(WIDTH), model=model)
    refused("event features of width", "--clip", clip, "--event-clip", wide, model=model)
    scored("out", "--clip", clip, "--event-clip", clip, model=model)


def test_pages_of_several_videos_lead_to_each_other(odd):
    def links(page):
        (nav,) = re.findall(r'<nav class="pages">(.*?)</nav>', page.read_text(), re.DOTALL)
        return {title: (page.parent / href).resolve() for href, title in re.findall(r'href="([^"]+)">([^<]+)', nav)}

    out = odd[0].resolve()
    index = re.findall(r'href="([^"]+\.html)"', (out / "index.html").read_text())
    pages = [out / page for page in index]
    assert len(pages) == 5 and all(links(page)["all videos"] == out / "index.html" for page in pages)
    assert [links(page).get("previous") for page in pages] == [None, *pages[:-1]]
    assert [links(page).get("next") for page in pages] == [*pages[1:], None]
