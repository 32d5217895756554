"""What the program knows about features, names and truth is compared before it computes anything."""

import json
import shutil

import numpy as np
import pytest
from tiny import quietly, strings

from clipfusionvad.__main__ import main
from clipfusionvad.data.annotations import read_annotations
from clipfusionvad.data.features import recorded_frames
from clipfusionvad.datasets import UCF

TRUTH = "video,frames,label,start,end\nAbuse002_x264,,Abuse,5,9\nNormal_Videos_003_x264,,Normal,,\n"
NAMES = ("Abuse001_x264", "Abuse002_x264", "Normal_Videos001_x264", "Normal_Videos_003_x264")


def record(name, stride, reduce="mean", state="done", time="2026-01-01"):
    return json.dumps({"video": name, "state": state, "time": time, "options": {"stride": stride, "reduce": reduce}})


def write_features(folder, names=NAMES, rows=7):
    for name in names:
        path = folder / f"features/{name}__0.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.ones((rows, 4), np.float16))
    (folder / "truth.csv").write_text(TRUTH)


def lists(folder, *more, annotations=True):
    argv = ["lists", "--dataset", "ucf", "--features", folder / "features", "--output", folder / "list"]
    argv += ["--test-crop", 0, *(["--annotations", folder / "truth.csv"] if annotations else [])]
    return quietly(main, strings(argv, more))


def refused(outcome, *parts):
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and outcome.err.startswith("error: ")
    for part in parts:
        assert part in outcome.err, outcome.err


def test_recorded_frames_of_a_row(tmp_path):
    lines = [
        record("a/x", 4),
        record("a/x", 8, time="2026-02-01"),
        record("y", 8, "none"),
        record("z", 8, state="begun"),
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join([*lines, "cut o", "[]", "7"]) + "\n")
    (tmp_path / "manifest-1-of-2.jsonl").write_text(record("b/w", 32) + "\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/manifest.jsonl").write_bytes(b"\xff\x00 of another program")
    paths = [tmp_path / name for name in ("a/x__0.npy", "a/../a/x__9.npy", "y.npy", "z.npy", "b/w__1.npy", "b/x.npy")]
    assert list(recorded_frames(paths).values()) == [8, 8, 1, 32]


def test_lists_refuse_another_stride_than_that_of_the_extraction(tmp_path):
    write_features(tmp_path)
    manifest = tmp_path / "features/manifest.jsonl"
    manifest.write_text("".join(record(name, 8) + "\n" for name in NAMES))
    refused(lists(tmp_path), "rows cover 8 frames", "give --frames-per-snippet 8")
    assert not (tmp_path / "list").exists()
    assert lists(tmp_path, "--no-truth").code == 0
    assert lists(tmp_path, "--frames-per-snippet", 8).code == 0
    assert read_annotations(tmp_path / "list/ucf_truth.csv", UCF)["Abuse002_x264"].frames == 56
    manifest.write_text("".join(record(name, stride) + "\n" for name, stride in zip(NAMES, (8, 8, 8, 16), strict=True)))
    refused(lists(tmp_path), "extract all files with the same --stride")


def test_train_test_and_doctor_refuse_another_stride_also_from_packed_features(tiny):
    names = {path.stem.rpartition("__")[0] for path in (tiny.folder / "features").glob("*.npy")}
    manifest = tiny.folder / "features/manifest.jsonl"
    manifest.write_text("".join(record(name, 8) + "\n" for name in names))
    says = "rows cover 8 frames each (record of its extraction), but --frames-per-snippet is 16", "give --frames-per"
    refused(tiny.test(), *says)
    refused(tiny.train(), *says)
    flags = tiny.train_flags("--only", "recorded-stride")
    doctor = quietly(main, ["doctor", "--dataset", tiny.dataset, *flags])
    assert doctor.code == 1 and "error    recorded-stride" in doctor.out and "warning  recorded-stride" in doctor.out
    assert quietly(main, ["pack", "--dataset", tiny.dataset, *tiny.train_flags()]).code == 0
    manifest.unlink()
    refused(tiny.test(), *says)
    assert "rows cover" not in tiny.test("--no-packed").err
    manifest.write_text("".join(record(name, 16) + "\n" for name in names))
    assert tiny.test("--no-packed").code == 0


def test_no_common_name_is_an_error_and_usual_endings_are_recognised(tmp_path):
    write_features(tmp_path, [f"clip-{name}" for name in NAMES])
    outcome = lists(tmp_path)
    assert outcome.code == 2
    write_features(tmp_path / "other", ["Arson001_x264", "Normal_Videos009_x264"])
    refused(lists(tmp_path / "other"), "(Abuse002_x264 there, Arson001_x264 in the features): rename")
    assert not (tmp_path / "other/list").exists()
    (tmp_path / "test.txt").write_text("Robbery001\n")
    refused(lists(tmp_path / "other", "--split", tmp_path / "test.txt", annotations=False), "(Robbery001 there, ")
    write_features(tmp_path / "i3d", [f"{name}_i3d" for name in NAMES])
    outcome = lists(tmp_path / "i3d")
    assert outcome.code == 0 and "2 annotated videos have features of a similar name" in outcome.err
    listed = (tmp_path / "i3d/list/ucf_CLIP_rgbtest.csv").read_text()
    assert listed.count("\n") == 3 and "Abuse002_x264_i3d__0.npy" in listed and "Normal_Videos_003_x264_i3d" in listed
    truth = read_annotations(tmp_path / "i3d/list/ucf_truth.csv", UCF)
    assert truth["Abuse002_x264_i3d"].segments == [(5, 9)]
    (tmp_path / "i3d/test.txt").write_text("Abuse/Abuse001.mp4\nArson009.mp4\n")
    outcome = lists(tmp_path / "i3d", "--split", tmp_path / "i3d/test.txt", annotations=False)
    refused(outcome, "Abuse001_x264_i3d is Abuse, but has no annotation")


def test_partial_matches_are_counted_and_listed(tmp_path):
    write_features(tmp_path)
    more = "".join(f"Arson{number:03d}_x264,,Arson,1,2\n" for number in range(12))
    (tmp_path / "truth.csv").write_text(TRUTH + more)
    outcome = lists(tmp_path)
    names = ", ".join(f"Arson{number:03d}_x264" for number in range(10))
    assert outcome.code == 0 and f"12 annotated videos have no feature file (2 have): {names}, …" in outcome.err


def test_lists_say_when_nothing_names_the_test_videos_or_what_happens_in_them(tmp_path):
    write_features(tmp_path)
    refused(lists(tmp_path, annotations=False), "it is unknown which videos", "--annotations FILE or --split FILE")
    (tmp_path / "truth.csv").write_text("video,label,start,end\nAbuse002_x264,,,\n")
    refused(lists(tmp_path), "Abuse002_x264")
    (tmp_path / "own.yaml").write_text("name: own\nclasses: {quiet: nothing, Theft: theft}\n")
    (tmp_path / "truth.csv").write_text("video,label,start,end\ngate,,,\n")
    write_features(tmp_path / "own", ["Theft/gate", "Theft/door", "quiet/wall"])
    (tmp_path / "own/truth.csv").write_text("video,label,start,end\ngate,,,\n")
    refused(lists(tmp_path / "own", "--dataset", tmp_path / "own.yaml"), "gate is Theft, but has no annotation")


@pytest.mark.parametrize("again", ["another crop", "the same row"])
def test_a_test_video_listed_twice_is_refused_with_keyed_truth(tiny, again):
    rows = tiny.test_list.read_text().splitlines()
    extra = rows[1]
    if again == "another crop":
        extra = extra.replace("__5", "__0")
        path = tiny.folder / rows[1].rpartition(",")[0]
        shutil.copy(path, tiny.folder / extra.rpartition(",")[0])
    tiny.test_list.write_text("\n".join([*rows, extra]) + "\n")
    says = f"row {len(rows) + 1}: ", "is of the same video as row 2 ", "list one crop of each test video"
    refused(tiny.test("--gt-path", tiny.folder / "truth.csv"), *says)
    refused(tiny.train("--gt-path", tiny.folder / "truth.csv"), *says)


def test_what_lists_skip_is_named_with_the_command_that_converts_it(tmp_path):
    write_features(tmp_path)
    np.save(tmp_path / "features/Arson001_x264.npy", np.ones((7, 10, 4), np.float32))
    outcome = lists(tmp_path)
    assert outcome.code == 0 and "Arson001_x264.npy has shape (7, 10, 4)" in outcome.err
    assert "'python -m clipfusionvad convert-features'" in outcome.err
    for name, content in (("crops", np.ones((7, 10, 4))), ("flat", np.ones(7))):
        (tmp_path / name / "features").mkdir(parents=True)
        np.save(tmp_path / name / "features/Arson001_x264.npy", content)
        refused(lists(tmp_path / name, annotations=False), f"has shape {content.shape}")
    (tmp_path / "packed/features").mkdir(parents=True)
    np.savez(tmp_path / "packed/features/all.npz", content)
    refused(lists(tmp_path / "packed", annotations=False), "the first file is", "all.npz", "convert-features")
    (tmp_path / "packed/features/._Arson001_x264__0.npy").write_bytes(b"\x00\x05\x16\x07")
    refused(lists(tmp_path / "packed", annotations=False), "all.npz")
