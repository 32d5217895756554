"""Detection from the video file to what is written about it."""

import csv
import json

import av
import numpy as np
import pytest
import torch
from made_videos import write_sound, write_video
from small_detect import detect, write_model
from tiny import METHOD_FLAGS, WIDTH, skip_without_packages

from clipfusionvad.datasets import UCF, XD
from clipfusionvad.extraction.crops import cut_windows, to_canvas
from clipfusionvad.extraction.decode import VideoInfo, read_frames
from clipfusionvad.extraction.encoder import ImageEncoder
from clipfusionvad.extraction.snippets import ExtractOptions, SnippetEncoder
from clipfusionvad.io.files import write_torch
from clipfusionvad.metrics.segments import Thresholds
from clipfusionvad.models.clip import load_clip
from clipfusionvad.tools.detect import page as detection
from clipfusionvad.tools.detect.detect import Detection

FRAMES = 70


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of each method and a video; never written to."""
    folder = tmp_path_factory.mktemp("detect")
    write_video(folder / "video.mp4", FRAMES)
    write_model(folder / "vadclip.pt", "vadclip")
    return folder


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    """Drawing takes longer than all the rest; one test looks at the picture."""
    if "slowly_made_features" not in request.node.name:
        monkeypatch.setattr(detection, "draw_scores", lambda *args: None)


def described(folder, name="video"):
    return json.loads((folder / f"{name}.json").read_text())


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def slow_features(path, per_frame=False, crop=0):
    """One frame at a time: its crop, its embedding, then means of 16."""
    encoder = ImageEncoder(load_clip("toy", WIDTH), "cpu")
    rows = [encoder.encode(cut_windows(to_canvas(frame)[None], [crop])[:, 0])[0] for frame in read_frames(path)]
    if per_frame:
        return np.stack(rows)
    return np.stack([np.mean(rows[start : start + 16], axis=0) for start in range(0, len(rows), 16)])


@pytest.mark.parametrize("method", METHOD_FLAGS)
def test_scores_are_those_of_slowly_made_features(method, place, tmp_path):
    skip_without_packages(method)
    model = write_model(tmp_path / "model.pt", method)
    video = place / "video.mp4"
    # A model without class texts does not know the CLIP of its features.
    flags = ["--checkpoint", tmp_path / "model.pt", "--device", "cpu"] + ["--clip", "toy"] * (not model.needs_clip)
    outcome = detect([video, *flags, "--output", tmp_path / "out"])
    assert outcome.code == 0, outcome.err
    features = slow_features(video, per_frame=method == "anomalyclip")
    if len(model.streams) > 1:
        events = SnippetEncoder(
            ImageEncoder(load_clip("toy", WIDTH), "cpu"), ExtractOptions(stream="event", tail="ceil")
        )
        features = [features, np.concatenate([events.add(list(read_frames(video))), events.finish()], axis=1)[0]]
    anomaly, classes = model.score_video(features)
    found = described(tmp_path / "out")
    np.testing.assert_allclose(found["snippets"]["anomaly"], anomaly, atol=1e-4)
    assert len(anomaly) == (FRAMES if method == "anomalyclip" else 5)
    if classes is None:
        assert found["snippets"]["classes"] is None and all(s["label"] is None for s in found["segments"])
    else:
        columns = [found["snippets"]["classes"][label] for label in UCF.labels]
        np.testing.assert_allclose(columns, classes.T, atol=1e-4)
    rows = table(tmp_path / "out/video.csv")
    np.testing.assert_allclose([float(row["anomaly"]) for row in rows], anomaly, atol=1e-4)
    assert float(rows[-1]["end"]) == pytest.approx(FRAMES / 30, abs=1e-5)
    assert len(table(tmp_path / "out/video_seconds.csv")) == 3
    assert len(table(tmp_path / "out/video_segments.csv")) == len(found["segments"])
    assert (tmp_path / "out/video.png").read_bytes().startswith(b"\x89PNG")
    assert "video.mp4" in (tmp_path / "out/video.html").read_text()
    assert (tmp_path / "out/video.mp4").read_bytes() == video.read_bytes()


def test_another_crop_is_read_as_asked(place, tmp_path):
    flags = ["--checkpoint", place / "vadclip.pt", "--device", "cpu", "--crop", 6, "--output", tmp_path]
    assert detect([place / "video.mp4", *flags]).code == 0
    model = write_model(tmp_path / "model.pt", "vadclip")
    anomaly, _ = model.score_video(slow_features(place / "video.mp4", crop=6))
    np.testing.assert_allclose(described(tmp_path)["snippets"]["anomaly"], anomaly, atol=1e-4)


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "draw_scores", lambda *args: None)
        return folder, out, detect([folder, *flags, "--output", out])


def test_bad_files_cost_a_line_each_and_the_others_are_scored(odd):
    folder, out, outcome = odd
    assert outcome.code == 1
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "2 of 7 failed" in outcome.err and "Traceback" not in outcome.err
    assert any("sound.mp4" in line and "no video stream" in line for line in errors)
    assert any("text.mp4" in line for line in errors)
    assert not (out / "sound.json").exists() and not (out / "text.html").exists()
    listed = {row["name"]: row for row in table(out / "index.csv")}
    assert listed.keys() == {"hevc", "rate", "short", "cut", "sound", "text", "deep/short"}
    assert "no video stream" in listed["sound"]["verdict"] and listed["sound"]["max_score"] == ""
    page = (out / "index.html").read_text()
    assert 'href="deep/short.html"' in page and (out / "deep/short.html").is_file()
    assert "text.mp4" in page


@pytest.mark.parametrize(
    ("name", "frames", "fps"), [("hevc", 54, 27.00003), ("rate", 91, 30.067), ("short", 10, 30), ("deep/short", 20, 30)]
)
def test_seconds_are_right_at_any_rate_and_length(odd, name, frames, fps):
    found = described(odd[1], name)
    assert found["video"]["frames_read"] == frames and found["warning"] is None
    assert found["video"]["fps"] == pytest.approx(fps, rel=1e-4)
    assert found["video"]["seconds"] == pytest.approx(frames / fps, abs=1e-3)
    starts, ends = found["snippets"]["start"], found["snippets"]["end"]
    assert len(starts) == -(-frames // 16) and ends[-1] == pytest.approx(frames / fps, abs=1e-3)
    np.testing.assert_allclose(starts, np.arange(len(starts)) * 16 / fps, atol=1e-3)
    (segment,) = found["segments"]
    assert (segment["start_frame"], segment["end_frame"]) == (0, frames)
    assert segment["end"] == pytest.approx(frames / fps, abs=1e-3)


def test_of_a_truncated_file_the_frames_that_are_there_are_scored(odd):
    _, out, outcome = odd
    found = described(out, "cut")
    read = found["video"]["frames_read"]
    assert 16 < read < 200 and len(found["snippets"]["anomaly"]) == -(-read // 16)
    assert "cut.mp4" in found["warning"]
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and found["warning"] in warnings[0]
    assert "breaks off" in (out / "cut.html").read_text()


def test_seconds_average_their_frames():
    rng = np.random.default_rng(3)
    for fps, frames in ((27.00003, 100), (7.5, 33), (0.4, 5), (60.0, 20)):
        bounds = np.minimum(np.arange(-(-frames // 16) + 1) * 16, frames)
        anomaly, classes = rng.random(len(bounds) - 1), rng.random((len(bounds) - 1, 3))
        info = VideoInfo("v", fps, frames, 4, 4, "h264")
        found = Detection(info, anomaly, classes, bounds, ("a", "b", "c"), Thresholds(), ())
        second, means, shares = found.by_second()
        numbers = [int(frame / fps) for frame in range(frames)]
        assert second.tolist() == sorted(set(numbers))
        for index, number in enumerate(second):
            rows = [frame // 16 for frame in range(frames) if numbers[frame] == number]
            assert means[index] == pytest.approx(anomaly[rows].mean())
            np.testing.assert_allclose(shares[index], classes[rows].mean(axis=0))


def test_finished_videos_are_kept_until_something_changes(place, tmp_path):
    video = write_video(tmp_path / "video.mp4", 40)
    command = [video, "--checkpoint", place / "vadclip.pt", "--device", "cpu", "--output", tmp_path / "out"]

    def written(*more):
        assert detect([*command, *more]).code == 0
        return (tmp_path / "out/video.json").stat().st_mtime_ns

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


def test_the_video_beside_its_page(place, tmp_path):
    def run(name, *flags):
        out = tmp_path / name
        command = [place / "video.mp4", "--checkpoint", place / "vadclip.pt", "--device", "cpu", "--output", out]
        assert detect([*command, *flags]).code == 0
        return out

    copied, bare = run("copied", "--video", "copy"), run("bare", "--video", "none")
    assert (copied / "video.mp4").read_bytes() == (place / "video.mp4").read_bytes()
    assert not (copied / "video.mp4").samefile(place / "video.mp4")
    assert not (bare / "video.mp4").exists() and "<video" not in (bare / "video.html").read_text()
    linked = run("copied", "--overwrite") / "video.mp4"
    assert linked.samefile(place / "video.mp4")
    assert not (run("copied", "--overwrite", "--video", "copy") / "video.mp4").samefile(place / "video.mp4")
    drawn = run("drawn", "--annotated")
    assert "video_annotated.mp4" in (drawn / "video.html").read_text()
    with av.open(str(drawn / "video_annotated.mp4")) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert len(frames) == FRAMES and stream.average_rate == 30
    originals, (height, width, _) = list(read_frames(place / "video.mp4")), frames[0].shape
    assert width == 64 and height > 48
    # The picture is that of the video but for the label at its top, also in time: its noise is new every 30 frames.
    for index in (29, 30):
        errors = [np.abs(frames[index][24:48].astype(int) - original[24:]).mean() for original in originals]
        assert np.argmin(errors) // 30 == index // 30 and errors[index] < 12


def test_results_among_the_videos_are_not_scored_again(place, tmp_path):
    write_video(tmp_path / "one.mp4", 20)
    command = [tmp_path, "--checkpoint", place / "vadclip.pt", "--device", "cpu", "--output", tmp_path / "out"]
    for _ in range(2):
        assert detect(command).code == 0
        assert [row["name"] for row in table(tmp_path / "out/index.csv")] == ["one"]
    refused([tmp_path / "out", *command[1:]], "name another --output")


@pytest.mark.parametrize("source", ["words", "file"])
def test_own_classes_take_the_place_of_the_trained_ones(place, tmp_path, source):
    words = ["calm", "smoke=thick smoke", "fire"]
    (tmp_path / "classes.txt").write_text("# mine\n" + "\n".join(words) + "\n")
    given = words if source == "words" else [tmp_path / "classes.txt"]
    flags = ["--checkpoint", place / "vadclip.pt", "--device", "cpu", "--output", tmp_path, "--classes", *given]
    outcome = detect([place / "video.mp4", *flags])
    assert outcome.code == 0, outcome.err
    found = described(tmp_path)
    assert list(found["snippets"]["classes"]) == ["calm", "smoke", "fire"]
    assert found["settings"]["classes"]["smoke"] == "thick smoke"
    np.testing.assert_allclose(np.sum(list(found["snippets"]["classes"].values()), axis=0), 1, atol=1e-5)
    assert detect([place / "video.mp4", *flags[:4], "--output", tmp_path / "trained"]).code == 0
    assert described(tmp_path / "trained")["snippets"]["anomaly"] == found["snippets"]["anomaly"]


def refused(argv, *says):
    outcome = detect(argv)
    assert outcome.code == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome
    for words in says:
        assert words in outcome.err, outcome.err


def test_own_classes_are_refused_where_weights_belong_to_the_trained_ones(place, tmp_path):
    for method, reason in (("anomalyclip", "prompt_learner.ctx"), ("iefvad", "does not distinguish classes")):
        write_model(tmp_path / "model.pt", method)
        flags = ["--checkpoint", tmp_path / "model.pt", "--device", "cpu", "--output", tmp_path / "out", "--classes"]
        # As many as before, too: the shapes would fit.
        for classes in (["calm", "fire"], [f"class {number}" for number in range(14)]):
            refused([place / "video.mp4", *flags, *classes], "--classes", reason)


def test_bad_command_lines_are_one_line(place, tmp_path):
    out = ["--output", tmp_path / "out"]
    model = ["--checkpoint", place / "vadclip.pt", *out]
    for classes in (["calm"], ["calm", "calm"], ["calm", "=fire"], ["calm", "fire="]):
        refused([place / "video.mp4", *model, "--classes", *classes], "--classes takes at least two")
    refused(model, "--stream")
    refused([place / "video.mp4", "--stream", "x", *model], "--stream")
    refused([tmp_path / "none.mp4", *model], "none.mp4")
    refused(["rtsp://camera/live", *model], "--stream")
    refused([place / "video.mp4", "--checkpoint", tmp_path / "none.pt", *out], "none.pt")
    refused([place / "video.mp4", *model, "--threshold", 0.3], "0.4", "0.3")
    refused([place / "video.mp4", *model, "--crop", 10], "crop")
    state = torch.load(place / "vadclip.pt", weights_only=True)["model_state_dict"]
    write_torch(tmp_path / "bare.pt", state)
    refused([place / "video.mp4", "--checkpoint", tmp_path / "bare.pt", *out], "--dataset")
    write_torch(tmp_path / "other.pt", {"x": torch.zeros(1)})
    refused([place / "video.mp4", "--checkpoint", tmp_path / "other.pt", *out], "--method")


def test_a_released_file_is_read_with_what_the_command_line_says_of_it(place, tmp_path):
    file = torch.load(place / "vadclip.pt", weights_only=True)
    write_torch(tmp_path / "bare.pt", file["model_state_dict"])
    sizes = {"visual_width": WIDTH, "embed_dim": WIDTH} | file["hparams"]["options"]
    (tmp_path / "model.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in sizes.items()))
    flags = ["--method", "vadclip", "--dataset", "ucf", "--clip", "toy", "--config", tmp_path / "model.yaml"]
    command = [place / "video.mp4", "--checkpoint", tmp_path / "bare.pt", "--output", tmp_path / "bare", *flags]
    outcome = detect([*command, "--device", "cpu"])
    assert outcome.code == 0, outcome.err
    known = [place / "video.mp4", "--checkpoint", place / "vadclip.pt", "--output", tmp_path / "ours"]
    assert detect([*known, "--device", "cpu"]).code == 0
    one, other = described(tmp_path / "bare"), described(tmp_path / "ours")
    assert one["snippets"] == other["snippets"] and one["segments"] == other["segments"]


def test_two_streams_need_the_weights_of_both(place, tmp_path):
    write_model(tmp_path / "iefvad.pt", "iefvad")
    write_torch(tmp_path / "clip.pt", load_clip("toy", WIDTH).state)
    command = [place / "video.mp4", "--checkpoint", tmp_path / "iefvad.pt", "--output", tmp_path / "out"]
    refused([*command, "--clip", tmp_path / "clip.pt"], "--event-clip")
    refused(command, "--clip", str(WIDTH))
    flags = ["--clip", tmp_path / "clip.pt", "--event-clip", tmp_path / "clip.pt", "--device", "cpu"]
    assert detect([*command, *flags]).code == 0
    write_torch(tmp_path / "wide.pt", load_clip("toy", 2 * WIDTH).state)
    refused([*command, "--clip", tmp_path / "clip.pt", "--event-clip", tmp_path / "wide.pt"], "width", "event")


def test_codes_for_labels_are_shown_by_their_meaning(place, tmp_path):
    write_model(tmp_path / "xd.pt", "vadclip", XD)
    flags = ["--checkpoint", tmp_path / "xd.pt", "--output", tmp_path / "out", "--device", "cpu"]
    assert detect([place / "video.mp4", *flags]).code == 0
    assert list(described(tmp_path / "out")["snippets"]["classes"]) == XD.prompts
