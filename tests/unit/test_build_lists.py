"""The lists command: what it builds from folders, splits and annotations, and what it refuses."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import quietly

from clipfusionvad.__main__ import main
from clipfusionvad.data.annotations import read_annotations
from clipfusionvad.data.lists import read_list, read_split
from clipfusionvad.data.truth import read_truth
from clipfusionvad.datasets import DATASETS, UCF, XD
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.npy import read_array

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SHARED_DIR") or ROOT.parent / "shared")
ANNOTATION = "Abuse002_x264  Abuse  5  20  -1  -1  \nArson001_x264  Arson  0  9  12  99  \n"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the shared data folder, {SHARED} (SHARED_DIR)")


def save(folder, name, rows=2):
    path = folder / f"{name}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.zeros((rows, 1), np.float16))
    return path


@pytest.fixture
def project(tmp_path):
    """Two training and three test videos of UCF-Crime, with the crops 0 and 5."""
    names = ["Abuse/Abuse001", "Abuse/Abuse002", "Arson/Arson001", "Training_Normal_Videos_Anomaly/Normal_Videos001"]
    for rows, name in enumerate([*names, "Testing_Normal_Videos_Anomaly/Normal_Videos_003"], 1):
        for crop in (0, 5):
            save(tmp_path / "features", f"{name}_x264__{crop}", rows)
    (tmp_path / "annotations.txt").write_text(ANNOTATION)
    return tmp_path


def run(folder, *more, dataset="ucf", annotations="annotations.txt"):
    argv = ["lists", "--dataset", dataset, "--features", str(folder / "features"), "--output", str(folder / "list")]
    if annotations:
        argv += ["--annotations", str(folder / annotations)]
    return main([*argv, *map(str, more)])


def rows_of(path):
    with open(path, newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def stems(path):
    return [Path(listed).stem for listed, _ in rows_of(path)]


def test_lists_and_truth(project, capsys):
    assert run(project) == 0
    lists = project / "list"
    assert rows_of(lists / "ucf_CLIP_rgb.csv") == [
        ("../features/Abuse/Abuse001_x264__0.npy", "Abuse"),
        ("../features/Abuse/Abuse001_x264__5.npy", "Abuse"),
        ("../features/Training_Normal_Videos_Anomaly/Normal_Videos001_x264__0.npy", "Normal"),
        ("../features/Training_Normal_Videos_Anomaly/Normal_Videos001_x264__5.npy", "Normal"),
    ]
    assert stems(lists / "ucf_CLIP_rgbtest.csv") == [
        "Abuse002_x264__5",
        "Arson001_x264__5",
        "Normal_Videos_003_x264__5",
    ]
    frames = np.load(lists / "gt_ucf.npy")
    assert frames.dtype == np.float32 and len(frames) == 16 * (2 + 3 + 5)
    assert np.flatnonzero(frames).tolist() == [*range(5, 20), *range(32, 41), *range(44, 80)]
    segments, labels = (read_array(lists / f"gt_{kind}_ucf.npy", "") for kind in ("segment", "label"))
    assert segments.tolist() == [[["5", "20"]], [["0", "9"], ["12", "99"]], [[0, 80]]]
    assert labels.tolist() == [["Abuse"], ["Arson", "Arson"], ["A"]]
    captured = capsys.readouterr()
    assert captured.err == "" and "test frames: 160, 37.500 % abnormal" in captured.out

    entries = read_list(lists / "ucf_CLIP_rgbtest.csv", dataset=UCF)
    arrays = [lists / UCF.truth_files[name] for name in ("frames", "segments", "labels")]
    released = read_truth(*arrays, entries, [2, 3, 5], UCF)
    keyed = read_truth(lists / "ucf_truth.csv", None, None, entries, [2, 3, 5], UCF)
    assert [a.tolist() for a in released.frames] == [b.tolist() for b in keyed.frames]
    assert (released.segments, released.labels) == (keyed.segments, keyed.labels)


def test_true_lengths_go_into_the_keyed_truth_only_and_features_elsewhere_are_absolute(project, tmp_path_factory):
    (project / "t.csv").write_text(
        "video,frames,label,start,end\nAbuse002_x264,35,Abuse,5,20\nArson001_x264,,Arson,0,9\n"
    )
    output = tmp_path_factory.mktemp("else") / "list"
    assert run(project, "--output", output, annotations="t.csv") == 0
    assert len(np.load(output / "gt_ucf.npy")) == 160
    assert [Path(path).is_absolute() for path, _ in rows_of(output / "ucf_CLIP_rgb.csv")] == [True] * 4
    keyed = read_annotations(output / "ucf_truth.csv", UCF)
    frames = {"Abuse002_x264": 35, "Arson001_x264": 48, "Normal_Videos_003_x264": 80}
    assert {name: keyed[name].frames for name in frames} == frames


ALL = ["Abuse001_x264", "Abuse002_x264", "Arson001_x264", "Normal_Videos001_x264", "Normal_Videos_003_x264"]
TEST_NAMES = "Arson/Arson001_x264.mp4\nArson/Arson777_x264.mp4"
TRAIN_CSV = "path,label\n/x/Abuse001_x264__0.npy,Abuse\n/x/Normal_Videos001_x264__0.npy,Normal\n"
BOTH = {"train.txt": "Abuse001_x264\n", "eval.csv": "video,label\nAbuse002_x264,Abuse\n"}


@pytest.mark.parametrize(
    "files, train, test, warning",
    [
        ({"Anomaly_Test.txt": TEST_NAMES}, [0, 1, 3, 4], [2], r"1 videos in .*Arson777_x264"),
        ({"my_train.csv": TRAIN_CSV}, [0, 3], [1, 2, 4], ""),
        (BOTH, [0], [1], "3 videos are in no split file"),
    ],
)
def test_split_files_decide_before_annotations(project, capsys, files, train, test, warning):
    for name, content in files.items():
        (project / name).write_text(content)
    assert run(project, "--split", *(project / name for name in files)) == 0
    found = sorted(stems(project / "list/ucf_CLIP_rgb.csv"))
    assert found == [f"{ALL[place]}__{crop}" for place in train for crop in (0, 5)]
    assert sorted(stems(project / "list/ucf_CLIP_rgbtest.csv")) == [f"{ALL[place]}__5" for place in test]
    assert re.search(warning, capsys.readouterr().err)


def test_split_formats_and_unusable_split_files(tmp_path):
    path = tmp_path / "split.txt"
    for content in (
        b"a/v=x__#1.mp4\nv__2\n",
        b"video,label\nv=x__#1,A\nv__2,A\n",
        b"path,label\n/x/v=x__#1__0.npy,A\nv__2__11.npy,A\n",
    ):
        path.write_bytes(content)
        assert read_split(path) == {"v=x__#1", "v__2"}
    for content in (b"", b"\n", b"video,label\n", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"split\.txt"):
            read_split(path)


def test_folders_with_one_side_only_and_with_other_arrays(project, capsys):
    assert run(project, "--exclude", "Abuse001*") == 0
    assert not (project / "list/ucf_CLIP_rgb.csv").exists()
    assert len(rows_of(project / "list/ucf_CLIP_rgbtest.csv")) == 4
    warned = capsys.readouterr().err
    assert "become the test set" in warned and "no training videos" in warned and "2 files left out" in warned
    # Files that are not of one crop are skipped and counted.
    np.save(project / "features/gt.npy", np.zeros(7))
    np.save(project / "features/Abuse/Abuse009.npy", np.zeros((10, 2, 4), np.float32))
    assert run(project, "--exclude", "Normal*", "Abuse/*_x264__5.npy", "--test-crop", 0) == 0
    warned = capsys.readouterr().err
    assert "6 files left out" in warned and "2 files skipped" in warned and "features/gt.npy" in warned
    assert stems(project / "list/ucf_CLIP_rgb.csv") == ["Abuse001_x264__0"]
    # Only the training set.
    save(project / "alone/features", "train/Abuse001_x264__0")
    assert run(project / "alone", annotations=None) == 0
    assert [path.name for path in (project / "alone/list").iterdir()] == ["ucf_CLIP_rgb.csv"]
    assert "no test videos" in capsys.readouterr().err


def test_class_from_folder_and_from_annotation(tmp_path):
    save(tmp_path / "features", "Robbery/cam one")
    save(tmp_path / "features", "misc/gate 7", 3)
    (tmp_path / "t.csv").write_text("video,label,start,end\ngate 7,Stealing,1,4\n")
    assert run(tmp_path, annotations="t.csv") == 0
    assert rows_of(tmp_path / "list/ucf_CLIP_rgb.csv") == [("../features/Robbery/cam one.npy", "Robbery")]
    assert rows_of(tmp_path / "list/ucf_CLIP_rgbtest.csv") == [("../features/misc/gate 7.npy", "Stealing")]


def test_xd_with_one_and_with_two_annotation_files(tmp_path, capsys):
    name = "v=a__#1_label_B2-G-0"
    save(tmp_path / "features", f"{name}__0")
    (tmp_path / "pairs.txt").write_text(f"{name}.mp4 0 9\n")
    (tmp_path / "classes.txt").write_text(f"{name} B2 0 4 G 3 8\n")

    def read(kind):
        return read_array(tmp_path / "list" / XD.truth_files[kind], "").tolist()

    assert run(tmp_path, dataset="xd", annotations="pairs.txt") == 0
    assert (sum(read("frames")), read("segments"), read("labels")) == (9, [[["0", "9"]] * 2], [["B2", "G"]])
    assert run(tmp_path, dataset="xd", annotations="classes.txt") == 0
    assert (sum(read("frames")), read("labels")) == (8, [["B2", "G"]])
    both = ["--annotations", tmp_path / "classes.txt", tmp_path / "pairs.txt"]
    capsys.readouterr()
    assert run(tmp_path, *both, dataset="xd") == 0
    assert (sum(read("frames")), read("segments")) == (9, [[["0", "4"], ["3", "8"]]])
    assert "disagree in 1 frames of 1 videos" in capsys.readouterr().err


def write(text, *names):
    return lambda project: [(project / name).write_text(text) for name in names]


def add(name):
    return lambda project: save(project / "features", name)


def truncate(project):
    path = project / "features/Abuse/Abuse001_x264__0.npy"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "harm, more, part",
    [
        (add("misc/street"), [], "street.npy"),
        (add("Arson/Arson001_x264__3"), ["--exclude", "Arson*5.npy"], "Arson001_x264 has no crop 5, only 0, 3"),
        (add("copy/Abuse002_x264__5"), [], "same crop of Abuse002_x264"),
        (truncate, [], "Abuse001_x264__0.npy is truncated"),
        (write("Abuse002_x264 Abuse 5\n", "annotations.txt"), [], "line 1"),
        (write(ANNOTATION + "Normal_Videos_003_x264 Abuse 1 2\n", "annotations.txt"), [], "Normal_Videos_003_x264"),
        (add("test/Abuse007_x264__5"), [], "Abuse007_x264"),
        (write("a file in the way", "list"), [], "list"),
        (write("Abuse002_x264\n", "train.txt", "test.txt"), ["--split", "train.txt", "test.txt"], "Abuse002_x264"),
        (None, ["--features", "list.py"], "list.py"),
        (None, ["--features", "empty"], "no feature files"),
        (None, ["--annotations", "nowhere"], "nowhere"),
        (None, ["--annotations", "a", "b", "c"], "at most two"),
        (None, ["--annotations", "annotations.txt", "annotations.txt"], "same kind"),
        (None, ["--split", "nowhere"], "nowhere"),
        (None, ["--dataset", "ufc"], "ufc"),
        (None, ["--test-crop", "five"], "five"),
        (None, ["--nonsense"], "--nonsense"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(project, capsys, monkeypatch, harm, more, part):
    monkeypatch.chdir(project)
    Path("empty").mkdir()
    if harm:
        harm(project)
    try:
        code = run(project, *more)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and part in captured.err
    assert not (project / "list").is_dir()


def test_script_runs_from_anywhere_without_installation(project):
    for name in DATASETS:
        assert f'"--dataset", "{name}"' in (ROOT / "list" / f"{name}.py").read_text(encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, ROOT / "list/ucf.py", "--features", "features", "--output", "list"]
    command += ["--annotations", "annotations.txt"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (project / "list/gt_ucf.npy").exists()


def doctor_quirks(folder, dataset):
    """The videos that the doctor notes in built lists as quirks of the released ones; it finds nothing worse."""
    kinds = {"--gt-path": "frames", "--gt-segment-path": "segments", "--gt-label-path": "labels"}
    files = {"--train-list": dataset.list_files["train"], "--test-list": dataset.list_files["test"]}
    files |= {flag: dataset.truth_files[kind] for flag, kind in kinds.items()}
    flags = [item for flag, file in files.items() for item in (flag, str(folder / "list" / file))]
    checks = "unknown-label train-test-overlap misplaced-videos duplicate-rows crop-labels truth-unreadable "
    checks += "truth-length normal-with-truth segment-order segment-labels"
    argv = ["doctor", "--dataset", dataset.name, *flags, "--json", str(folder / "found.json"), "--only"]
    outcome = quietly(main, [*argv, *checks.split()])
    found = json.loads((folder / "found.json").read_text())["findings"]
    assert outcome.code == 0 and {finding["level"] for finding in found} <= {"note"}, outcome.out
    official = ("as in the official annotation", "'lists --protocol clean' corrects it")
    return {(finding["what"].split()[0], finding["check"]) for finding in found if finding["advice"] in official}


def benchmark(dataset, folder):
    """Zero features with the true number of snippets of every test video; returns those numbers by name."""
    column = {"ucf": "n_snippets_floor16", "xd": "n_snippets_i3d"}[dataset.name]
    with open(SHARED / f"data/benchmarks/{dataset.name}_test_videos.csv", newline="") as file:
        snippets = {row["video"]: int(row[column]) for row in csv.DictReader(file)}
    for name, count in snippets.items():
        save(folder, f"{name}__{dataset.test_crop}", count)
    return snippets


@needs_shared
@pytest.mark.parametrize("with_split", [False, True])
@pytest.mark.parametrize(
    "dataset, truth, annotations, split, known_lengths",
    [
        (UCF, "ucf_test_gt_floor16", ["Temporal_Anomaly_Annotation.txt"], "Anomaly_Test.txt", 147),
        (XD, "xd_test_gt_i3d", ["annotations_multiclasses.txt", "annotations.txt"], "test_videos.csv", 278),
    ],
    ids=["ucf", "xd"],
)
def test_the_benchmarks_are_rebuilt(tmp_path, capsys, dataset, truth, annotations, split, known_lengths, with_split):
    lists = SHARED / "data/lists" / dataset.name
    snippets = benchmark(dataset, tmp_path / "features")
    more = ["--annotations", *(lists / name for name in annotations)]
    if with_split:
        more += ["--split", lists / split]
    assert run(tmp_path, *more, dataset=dataset.name) == 0
    built = {kind: tmp_path / "list" / name for kind, name in dataset.truth_files.items()}

    names = [entry.video for entry in read_list(tmp_path / "list" / dataset.list_files["test"], dataset=dataset)]
    assert names == list(snippets), "the order is that of the released list"
    frames = np.load(built["frames"])
    np.testing.assert_array_equal(frames, np.load(SHARED / f"data/benchmarks/{truth}_uint8.npy"))

    segments, labels = (read_array(built[kind], "") for kind in ("segments", "labels"))
    released = {kind: read_array(lists / dataset.truth_files[kind], "") for kind in ("segments", "labels")}
    assert labels.tolist() == released["labels"].tolist()
    normal = [names == ["A"] for names in labels]
    # Intervals of anomalous videos are equal, text and all. Those of normal videos are as long as the
    # features, and the features of the released arrays had a snippet more in a few videos than these counts.
    triples = list(zip(segments, released["segments"], normal, strict=True))
    assert all(s == r for s, r, n in triples if not n)
    assert sum(s == r for s, r, n in triples if n) == known_lengths
    assert all(s[0][0] == r[0][0] == 0 and 0 <= r[0][1] - s[0][1] <= 16 for s, r, n in triples if n)

    order = [snippets[name] for name in names]
    entries = read_list(tmp_path / "list" / dataset.list_files["test"], dataset=dataset)
    again = read_truth(built["frames"], built["segments"], built["labels"], entries, order, dataset)
    np.testing.assert_array_equal(np.concatenate(again.frames), frames)
    assert {video for video, _ in doctor_quirks(tmp_path, dataset)} == dataset.annotation_quirks
