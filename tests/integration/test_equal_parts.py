"""Features whose rows stand for equal parts of a video: lists, training, test, saved scores and detection agree."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from made_videos import write_video
from sklearn.metrics import average_precision_score, roc_auc_score
from small_detect import detect
from tiny import METHOD_FLAGS, SCHEDULE_FLAGS, SHARED_FLAGS, WIDTH, quietly, strings

from clipfusionvad import load_model
from clipfusionvad.__main__ import main
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.metrics import count_frames, snippet_edges
from clipfusionvad.report.curves import pool
from clipfusionvad.report.scores import read_scores

PARTS = 12
# Frames of the test videos: a multiple of the parts, others, and one with fewer frames than parts.
FRAMES = {"Abuse001": 240, "Abuse002": 1001, "Normal_003": 97, "Normal_004": 5}
EVENTS = {"Abuse001": [(33, 90)], "Abuse002": [(0, 7), (500, 1001)]}
TRUTH = "list/ucf_truth.csv"
SMALL = [*SHARED_FLAGS, *METHOD_FLAGS["vadclip"], *SCHEDULE_FLAGS, "--method", "vadclip", "--device", "cpu"]


def slow_part(frame, frames, parts):
    return next(i for i in range(parts) if i * frames // parts <= frame < (i + 1) * frames // parts)


@pytest.mark.parametrize(("frames", "parts"), [(240, 12), (1001, 32), (97, 12), (5, 12), (31, 32), (1, 1)])
def test_every_frame_is_counted_in_its_part(frames, parts):
    truth = np.random.default_rng(frames).integers(0, 2, frames)
    expected = np.zeros((2, parts), dtype=int)
    for frame in range(frames):
        expected[:, slow_part(frame, frames, parts)] += truth[frame], 1
    np.testing.assert_array_equal(count_frames(truth, parts, None), expected)
    assert snippet_edges(parts, frames, None)[[0, -1]].tolist() == [0, frames]


def run(command, *argv, code=0):
    done = quietly(main, strings([command, "--dataset", "ucf", *argv]))
    assert done.code == code and (code == 0 or done.err.count("\n") == 1), done
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Features of 12 rows for every video, annotations with frames, and a run on them."""
    folder = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train = [f"{name}{number:03}" for name, number in product(("Abuse", "Normal_"), range(101, 104))]
        for side, names in (("train", train), ("test", FRAMES)):
            Path("features", side).mkdir(parents=True)
            for name in names:
                np.save(Path("features", side, name), rng.normal(size=(PARTS, WIDTH)).astype(np.float16))
        rows = [f"{name},{FRAMES[name]},Abuse,{start},{end}" for name in EVENTS for start, end in EVENTS[name]]
        rows += [f"{name},{FRAMES[name]},Normal,," for name in FRAMES if name not in EVENTS]
        Path("truth.csv").write_text("\n".join(["video,frames,label,start,end", *rows]) + "\n")
        built = ["--features", "features", "--output", "list", "--annotations", "truth.csv"]
        assert "test frames: 1343" in run("lists", *built, "--segments", "equal").out
        run("train", *SMALL, "--segments", "equal", "--gt-path", TRUTH, "--output-dir", "run")
    return folder


def test_the_model_and_its_scores_remember_it(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = run("test", "--model-path", "run/best.pt", "--gt-path", TRUTH, "--output-dir", "tested")
    assert "warning" not in done.err
    tested = read_scores(Path("tested/test_scores.npz"))
    scores, truth = [], []
    for entry, video in zip(tested.videos.entries, tested.scores, strict=True):
        frames = FRAMES[entry.video]
        abnormal = [t for start, end in EVENTS.get(entry.video, []) for t in range(start, end)]
        truth += [t in abnormal for t in range(frames)]
        scores += [video.anomaly[:, slow_part(t, frames, PARTS)] for t in range(frames)]
    metrics = json.loads(Path("tested/test_metrics.json").read_text())
    for branch, curve in enumerate(np.array(scores).T, start=1):
        assert metrics[f"auc{branch}"] == pytest.approx(roc_auc_score(truth, curve), abs=1e-12)
        assert metrics[f"ap{branch}"] == pytest.approx(average_precision_score(truth, curve), abs=1e-12)
    # In Python the number of frames must be given.
    model, features = load_model("run", device="cpu"), np.load("features/test/Abuse002.npy")
    assert model.frames_per_snippet is None and np.isnan(model.score_video(features).to_pandas()["start"]).all()
    with pytest.raises(UserError, match="equal parts of a video: pass the number of its frames"):
        model.score_frames(features)
    names = [entry.video for entry in tested.videos.entries]
    start = sum(FRAMES[name] for name in names[: names.index("Abuse002")])
    found = model.score_frames(features, FRAMES["Abuse002"]).anomaly
    np.testing.assert_allclose(found, [score[0] for score in scores[start : start + len(found)]], atol=1e-5)
    # Training tested its best weights with the same frames, and so do figures from saved scores.
    assert metrics["auc1"] == json.loads(Path("run/metrics.json").read_text())["best"]["auc1"]
    pooled = pool(tested.scores, tested.videos)
    assert (pooled.frames.sum(), pooled.positives.sum()) == (1343, 57 + 508)
    assert pooled.truth.sum() == 1343 and len(pooled.frames) == PARTS * len(FRAMES)
    run_again = run("test", "--model-path", "run/best.pt", "--gt-path", TRUTH, "--show-options")
    assert "equal" in next(line for line in run_again.out.splitlines() if line.startswith("--segments "))


def test_unknown_numbers_of_frames_name_the_file_that_lacks_them(folder, monkeypatch):
    monkeypatch.chdir(folder)
    test = ["--model-path", "run/best.pt", "--gt-path"]
    err = run("test", *test, "list/gt_ucf.npy", code=2).err
    assert "list/gt_ucf.npy does not hold the number of frames of each video" in err and TRUTH in err
    Path("some.csv").write_text(Path(TRUTH).read_text().replace("Normal_003,97", "Normal_003,"))
    err = run("test", *test, "some.csv", code=2).err
    assert "does not hold the number" in err and "for 1 videos, the first is Normal_003 (list row 4)" in err
    assert "--segments fixed" in run("test", *test, "none", code=2).err
    built = ["--features", "features", "--output", "lists", "--segments", "equal", "--annotations"]
    assert "the number of frames of test video Normal_003" in run("lists", *built, "some.csv", code=2).err
    assert not Path("lists").exists()
    # Rows of a fixed number of frames do not fit these features; the message says what would.
    flags = ["--segments", "fixed", "--gt-path", "list/gt_ucf.npy"]
    assert "give --segments equal" in run("test", "--model-path", "run/best.pt", *flags, code=2).err
    assert "give --segments equal" in run("test", *test, TRUTH, "--segments", "fixed").err
    assert (
        "give --segments equal"
        in quietly(main, strings(["doctor", "--dataset", "ucf", *SMALL, "--gt-path", TRUTH])).out
    )


def test_lengths_may_come_from_a_file_beside_the_annotations(folder, monkeypatch, tmp_path):
    """UCF-Crime's text holds none."""
    monkeypatch.chdir(folder)
    lines = [f"{name}.mp4 Abuse " + " ".join(f"{start} {end}" for start, end in EVENTS[name]) for name in EVENTS]
    lines += [f"{name} Normal -1 -1" for name in FRAMES if name not in EVENTS]
    Path(tmp_path, "text.txt").write_text("\n".join(lines) + "\n")
    built = ["--features", "features", "--output", tmp_path / "list", "--segments", "equal", "--annotations"]
    err = run("lists", *built, tmp_path / "text.txt", code=2).err
    assert "no annotation holds the number of frames of test video Abuse001" in err and "columns video,frames" in err
    rows = "".join(f"{name}.mp4,{frames}\n" for name, frames in FRAMES.items())
    Path(tmp_path, "lengths.csv").write_text(f"video,frames\n{rows}Abuse101,50\n")
    run("lists", *built, tmp_path / "text.txt", tmp_path / "lengths.csv")
    for name in ("ucf_truth.csv", "gt_ucf.npy"):
        assert Path(tmp_path, "list", name).read_bytes() == Path("list", name).read_bytes()
    # A video whose length is known is not a test video for that.
    assert "Abuse101" in Path(tmp_path, "list/ucf_CLIP_rgb.csv").read_text()
    Path(tmp_path, "lengths.csv").write_text("video,frames\nAbuse001,many\n")
    err = run("lists", *built, tmp_path / "text.txt", tmp_path / "lengths.csv", code=2).err
    assert "lengths.csv, row 2: 'many' is not a whole number of frames" in err


def test_detection_makes_the_same_equal_parts(folder, monkeypatch):
    monkeypatch.chdir(folder)
    model = ["--checkpoint", "run/best.pt", "--device", "cpu", "--clip", "toy"]
    assert read_checkpoint("run/best.pt", "model file")["hparams"]["parts"] == PARTS
    write_video("long.mp4", frames=250)
    write_video("short.mp4", frames=20)
    done = detect(["long.mp4", "short.mp4", *model, "--output", "found", "--video", "none"])
    assert done.code == 0, done.err
    for name, frames in (("long", 250), ("short", 20)):
        record = json.loads(Path(f"found/{name}.json").read_text())
        seconds, fps = record["snippets"], record["video"]["fps"]
        edges = [i * frames // PARTS / fps for i in range(PARTS + 1)]
        assert seconds["start"] + seconds["end"][-1:] == pytest.approx(edges, abs=1e-6)
    done = detect(["--stream", "long.mp4", *model, "--output", "live"])
    assert done.code == 2 and "equal parts of whole videos" in done.err
    run("export", "run/best.pt", "--output", "x.pt")
