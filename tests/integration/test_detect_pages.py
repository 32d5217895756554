"""The pages of detection: pictures, annotated intervals, score and class, sizes."""

import base64
import json
import os
import re

import cv2
import numpy as np
import pandas as pd
import pytest
from made_videos import picture, write_video
from small_detect import FRAMES, detect, make_place, score

from clipfusionvad.datasets import UCF
from clipfusionvad.extraction.decode import VideoInfo
from clipfusionvad.metrics.segments import Thresholds, find_segments
from clipfusionvad.tools.detect import page


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and a video; never written to."""
    return make_place(tmp_path_factory.mktemp("detect"))


@pytest.fixture
def scored(place, tmp_path):
    """Score a video and return the folder of the results, ``tmp_path / name``."""

    def scored(name, *flags, video=place / "video.mp4"):
        return score(video, place / "vadclip.pt", tmp_path / name, *flags)

    return scored


def described(folder, name="video"):
    return json.loads((folder / f"{name}.json").read_text())


def table(path):
    return pd.read_csv(path, keep_default_na=False).to_dict("records")


def pictures_of(text):
    """The moments of a page: seconds and picture (H, W, 3) of each."""
    found = re.findall(r'data-time="([\d.]+)".*?base64,([^"]+)"', text, re.DOTALL)
    return [(float(seconds), read_jpeg(encoded)) for seconds, encoded in found]


def read_jpeg(encoded):
    return cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]


def frame_shown(jpeg):
    """The frame of a made video of FRAMES frames that a picture shows."""
    small = cv2.resize(jpeg, (64, 48), interpolation=cv2.INTER_AREA).astype(int)
    return np.argmin([np.abs(small - picture(index)).mean() for index in range(FRAMES)])


@pytest.mark.parametrize("source", ["video.mp4", "video.h264", "video"])
@pytest.mark.parametrize("threshold", [0, 1])
def test_a_page_and_the_index_show_the_frames_of_the_highest_snippets(source, threshold, tmp_path, scored):
    path = tmp_path / "in" / source
    path.parent.mkdir()
    if source == "video":
        path.mkdir()
        for index in range(FRAMES):
            cv2.imwrite(str(path / f"{index:03}.png"), picture(index)[:, :, ::-1])
    else:
        write_video(path, FRAMES)
    # A raw stream is found by its name only.
    given = path if source.endswith("h264") else path.parent
    out = scored("out", "--threshold", threshold, "--low-threshold", threshold, "--fps", 30, video=given)
    found, page_text = described(out), (out / "video.html").read_text()
    scores, bounds = np.array(found["snippets"]["anomaly"]), np.minimum(16 * np.arange(6), FRAMES)
    # In the middle of each snippet; the last one, of six frames, shows its first.
    middles = [8, 24, 40, 56, 64]
    parts = [np.arange(5)] if threshold == 0 else [np.array(part) for part in ([0, 1], [2, 3], [4])]
    highest = [part[np.argmax(scores[part])] for part in parts]
    shown = pictures_of(page_text)
    assert [frame_shown(jpeg) for _, jpeg in shown] == [middles[at] for at in highest]
    times = [(bounds[at] + bounds[at + 1]) / 60 for at in highest]
    np.testing.assert_allclose([seconds for seconds, _ in shown], times, atol=2e-3)
    assert shown[0][1].shape == (120, 160, 3) and len(found["segments"]) == 1 - threshold
    assert frame_shown(read_jpeg(found["thumbnail"])) == middles[scores.argmax()]
    assert given == path or found["thumbnail"] in (out / "index.html").read_text()


def test_annotated_intervals_stand_beside_what_is_found(place, tmp_path):
    names = ("one", "two_x264", "three", "four")
    (tmp_path / "in").mkdir()
    for name in names:
        os.link(place / "video.mp4", tmp_path / "in" / f"{name}.mp4")
    rows = ["one,70,Fighting,16,32", "one,70,Arson,60,90", "two,,normal,,", "three,,Arson,500,600", "five,,normal,,"]
    (tmp_path / "truth.csv").write_text("video,frames,label,start,end\n" + "\n".join(rows))
    flags = ["--checkpoint", place / "vadclip.pt", "--device", "cpu", "--output", tmp_path / "out"]
    outcome = detect([tmp_path / "in", *flags, "--annotations", tmp_path / "truth.csv"])
    assert outcome.code == 0 and "does not annotate 1 of 4 videos, such as four" in outcome.err
    assert "three has 70 frames, but is annotated from frame 500 to 600" in outcome.err
    first, second = described(tmp_path / "out", "one")["truth"]
    assert (first["start_frame"], first["end_frame"], first["label"]) == (16, 32, "Fighting")
    assert (second["start_frame"], second["end_frame"], second["label"]) == (60, 70, "Arson")
    seconds = [first["start"], first["end"], second["start"], second["end"]]
    np.testing.assert_allclose(seconds, np.array([16, 32, 60, 70]) / 30, atol=1e-3)
    assert [described(tmp_path / "out", name)["truth"] for name in names[1:]] == [[], [], None]
    text = " ".join((tmp_path / "out" / "one.html").read_text().split())
    assert "annotated: Fighting 0:00.5 to 0:01.1, Arson 0:02.0 to 0:02.3" in text
    assert "does not name this video" in (tmp_path / "out" / "four.html").read_text()
    for says in ("annotates none of the videos", "unknown class 'Swimming'"):
        words = [place / "video.mp4", *flags[:-1], tmp_path / "no", "--annotations", tmp_path / "truth.csv"]
        outcome = detect(words)
        assert outcome.code == 2 and says in outcome.err and outcome.err.count("\n") == 1
        (tmp_path / "truth.csv").write_text("video,frames,label,start,end\nvideo,,Swimming,16,32")
    assert not (tmp_path / "no").exists()


def test_a_page_says_which_frames_were_read_and_what_a_test_reads(scored):
    plain, mirrored = scored("plain"), scored("mirrored", "--crop", 5)
    settings = described(plain)["settings"]
    assert (settings["crop"], settings["tail"]) == (0, "ceil")
    for name in (
        "crop 0 (centre) of each frame",
        "a test on UCF-Crime reads crop 5 (centre, mirrored)",
        "--tail floor",
    ):
        assert name in settings["features"] and name in (plain / "video.html").read_text()
    assert "test on" not in described(mirrored)["settings"]["features"]
    assert "--tail floor" in described(mirrored)["settings"]["features"]


def made_detection(snippets, classes, bounds, **values):
    times = np.arange(bounds[-1] + 1) / 30
    scores = np.where(np.arange(snippets) % 12 < 3, 0.9, 0.1)
    thresholds = Thresholds(merge_seconds=0.1)
    segments = find_segments(scores, classes, bounds, times[bounds], UCF.labels, thresholds)
    info = VideoInfo("v.mp4", 30.0, None, 320, 240, "h264")
    return page.Detection(info, scores, classes, bounds, times, tuple(UCF.labels), thresholds, segments, **values)


SETTINGS = {"checkpoint": "m.pt", "method": "m", "dataset": "d", "clip": {"rgb": "c"}, "features": "f"}


def test_the_longest_test_video_and_a_whole_test_set_make_small_pages(tmp_path):
    rng = np.random.default_rng(0)
    jpeg = rng.bytes(5000)
    classes = rng.dirichlet(np.ones(14), 6749)
    found = made_detection(6749, classes, 16 * np.arange(6750), pictures=[jpeg] * 6749)
    record = page.write_detection(tmp_path, "long", found, SETTINGS, None)
    assert len(record["segments"]) == 563 and (tmp_path / "long.html").stat().st_size < 1_500_000
    page.write_index(tmp_path, "all", [page.index_row(f"video {index}", record) for index in range(290)])
    assert (tmp_path / "index.html").stat().st_size < 3_000_000


def test_score_and_class_are_named_wherever_they_stand(tmp_path, scored, place):
    shares = np.zeros((6, 14))
    shares[:, 0], shares[:, UCF.labels.index("Fighting")], shares[:, UCF.labels.index("Arson")] = 0.78, 0.12, 0.1
    record = page.write_detection(tmp_path, "v", made_detection(6, shares, 16 * np.arange(7)), SETTINGS, None)
    assert (record["verdict"], record["segments"][0]["class_unsure"]) == ("Fighting", True)
    text = (tmp_path / "v.html").read_text()
    assert ">Fighting 0.12 (unsure)</td>" in text and '<td class="number">0.90</td>' in text and "v · m.pt" in text
    (row,) = table(tmp_path / "v_segments.csv")
    assert (row["label"], row["class_unsure"]) == ("Fighting", True)
    page.write_index(tmp_path, "i", [page.index_row("v", page.read_record(tmp_path / "v.json"))])
    (row,) = table(tmp_path / "index.csv")
    assert (row["verdict"], row["class_probability"], row["confidence"]) == ("Fighting", 0.12, 0.9)
    assert ">Fighting 0.12 (unsure)</td>" in (tmp_path / "index.html").read_text()
    flags = ["--checkpoint", place / "vadclip.pt", "--output", tmp_path / "out", "--threshold", 0]
    out = detect([place / "video.mp4", *flags]).out
    assert re.search(r"video: class \w+ 0\.\d\d( \(unsure\))?, anomaly score 0\.\d\d; highest score", out), out


def test_a_page_links_the_files_beside_it(scored):
    folder = scored("out")
    text = (folder / "video.html").read_text(encoding="utf-8")
    linked = set(re.findall(r'<a href="([^"]+)" download>', text))
    assert linked == {path.name for path in folder.iterdir() if path.suffix in (".json", ".csv", ".png")} - {
        "index.csv"
    }


@pytest.mark.parametrize("other", ["index", "video_seconds", "video_annotated"])
def test_videos_whose_results_would_be_one_file_are_refused(place, tmp_path, other):
    (tmp_path / "videos").mkdir()
    for name in ("video", other):
        (tmp_path / f"videos/{name}.mp4").symlink_to(place / "video.mp4")
    outcome = detect([tmp_path / "videos", "--checkpoint", place / "vadclip.pt", "--output", tmp_path / "out"])
    assert outcome.code == 2 and f"{other}.mp4 and those of" in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
