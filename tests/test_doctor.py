"""python -m clipfusionvad doctor: nothing in a clean demo set, and every planted mistake with its file and row."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import quietly

import ucf_option
from clipfusionvad.__main__ import main as package_main
from clipfusionvad.commands.doctor import GROUPS
from clipfusionvad.datasets import UCF
from clipfusionvad.demo import demo_folder, make_demo
from clipfusionvad.doctor.findings import ERROR, NOTE, SHOWN, WARNING, Finding, examine, lines, name_of
from clipfusionvad.doctor.survey import take_survey
from clipfusionvad.files import write_torch
from clipfusionvad.npy import read_array

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The demo set of UCF-Crime, never written to."""
    folder = tmp_path_factory.mktemp("clean")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_demo(UCF)
    return folder


@dataclass
class Demo:
    """A copy of the demo set to spoil, of which the current folder is the parent; files are linked, so replaced."""

    clean: Path
    flags: list[str] = field(default_factory=list)
    folder: Path = demo_folder(UCF)

    @property
    def train(self) -> Path:
        return self.folder / "list" / UCF.list_files["train"]

    @property
    def test(self) -> Path:
        return self.folder / "list" / UCF.list_files["test"]

    @property
    def truth(self) -> Path:
        return self.folder / "list" / UCF.list_files["truth"]

    def array(self, kind: str) -> Path:
        return self.folder / "list" / UCF.truth_files[kind]

    def use_arrays(self) -> None:
        flags = {"--gt-path": "frames", "--gt-segment-path": "segments", "--gt-label-path": "labels"}
        self.flags += [item for flag, kind in flags.items() for item in (flag, str(self.array(kind)))]

    def file(self, row: list[str]) -> Path:
        return self.train.parent / row[0]

    def survey(self):
        return take_survey(ucf_option.parse_args(["--demo", *self.flags]), UCF)


@pytest.fixture
def demo(clean, tmp_path, monkeypatch):
    # One case needs the other stream, and links it itself.
    ignore = shutil.ignore_patterns("event")
    shutil.copytree(clean, tmp_path, copy_function=os.link, dirs_exist_ok=True, ignore=ignore)
    monkeypatch.chdir(tmp_path)
    return Demo(clean)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def write_rows(path, rows):
    path.unlink()
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    np.save(path, array)


def at(rows, stem):
    """The number of the row that names a feature file; the header is row 1."""
    return next(number for number, row in enumerate(rows, 1) if Path(row[0]).stem == stem)


def edit(path, change):
    """Change the rows of a CSV file in place, and return what the change returns."""
    rows = rows_of(path)
    found = change(rows)
    write_rows(path, rows)
    return found


def change_features(demo, change, stem="Arson009_x264__1"):
    rows = rows_of(demo.train)
    number = at(rows, stem)
    path = demo.file(rows[number - 1])
    save(path, change(np.load(path)))
    return demo.train, number


def add_training_video(demo, label, name, features, crops=(0, 1, 2)):
    """New rows at the end of the training list; where the first of them is."""

    def change(rows):
        for crop, array in zip(crops, features, strict=True):
            path = demo.folder / "features" / "rgb" / "more" / label / f"{name}__{crop}.npy"
            save(path, array)
            rows.append([os.path.relpath(path, demo.train.parent), label])
        return demo.train, len(rows) - len(crops) + 1

    return edit(demo.train, change)


def read_tested(demo, index=0):
    row = rows_of(demo.test)[1:][index]
    return row, np.load(demo.file(row))


def change_arrays(demo, kind, change):
    demo.use_arrays()
    array = read_array(demo.array(kind), "")
    save(demo.array(kind), change(array))
    return demo.array(kind)


def with_segment(index, segments):
    def change(array):
        array[index] = segments
        return array

    return change


# Every mistake is planted by a function that returns (file, row) of the finding; its name is the case's.


def overlap_same_row(demo):
    row, _ = read_tested(demo)
    return demo.train, edit(demo.train, lambda rows: rows.append(row) or len(rows))


def overlap_in_disguise(demo):
    """Another folder, crop, case and content."""
    row, features = read_tested(demo)
    name = Path(row[0]).stem.removesuffix("__5").upper()
    return add_training_video(demo, row[1], name, [features[1:]], crops=[0])


def copied_row_in_training(demo):
    return demo.train, edit(demo.train, lambda rows: rows.append(rows[7]) or len(rows))


def copied_row_in_test(demo):
    return demo.test, edit(demo.test, lambda rows: rows.append(rows[7]) or len(rows))


def one_videos_features_under_two_names(demo):
    rows = rows_of(demo.train)
    numbers = [at(rows, f"{name}__{crop}") for name in ("Abuse001_x264", "Arson009_x264") for crop in range(3)]
    files = [demo.file(rows[number - 1]) for number in numbers]
    for source, target in zip(files[:3], files[3:], strict=True):
        save(target, np.load(source))
    return demo.train, numbers[3]


def two_crops_the_same(demo):
    rows = rows_of(demo.train)
    first = at(rows, "Abuse001_x264__0")
    save(demo.file(rows[first]), np.load(demo.file(rows[first - 1])))
    return demo.train, first + 1


def crop_of_another_video(demo):
    return change_features(demo, lambda features: np.concatenate([features, features[:2] * 2]))


def crop_missing(demo):
    edit(demo.train, lambda rows: rows.pop(at(rows, "Abuse002_x264__0") - 1))
    return demo.train, at(rows_of(demo.train), "Abuse002_x264__1")


def crop_too_many(demo):
    rows = rows_of(demo.train)
    number = at(rows, "Abuse003_x264__0")
    array = np.load(demo.file(rows[number - 1]))
    path = demo.file(rows[number - 1]).with_name("Abuse003_x264__7.npy")
    save(path, array[::-1])
    edit(demo.train, lambda rows: rows.append([os.path.relpath(path, demo.train.parent), "Abuse"]))
    return demo.train, number


def crop_labelled_differently(demo):
    number = at(rows_of(demo.train), "Abuse001_x264__1")
    edit(demo.train, lambda rows: rows[number - 1].__setitem__(1, "Arrest"))
    return demo.train, number


def label_misspelt(demo):
    number = at(rows_of(demo.train), "Abuse001_x264__1")
    edit(demo.train, lambda rows: rows[number - 1].__setitem__(1, "Abus"))
    return demo.train, number


def label_against_the_name(demo):
    number = at(rows_of(demo.test), "Abuse501_x264__5")
    edit(demo.test, lambda rows: rows[number - 1].__setitem__(1, "Normal"))
    demo.flags += ["--gt-path", "none"]
    return demo.test, number


def mixed_test_crops(demo):
    def change(rows):
        old = demo.file(rows[4])
        new = old.with_name(old.name.replace("__5", "__3"))
        save(new, np.load(old))
        rows[4][0] = os.path.relpath(new, demo.test.parent)

    edit(demo.test, change)
    return demo.test, 5


def two_crops_tested(demo):
    row, features = read_tested(demo, 3)
    path = demo.file(row).with_name(demo.file(row).name.replace("__5", "__4"))
    save(path, features[::-1])
    new = [os.path.relpath(path, demo.test.parent), row[1]]
    return demo.test, edit(demo.test, lambda rows: rows.append(new) or len(rows))


def normal_videos_left_out(demo):
    write_rows(demo.train, [row for row in rows_of(demo.train) if row[1] != "Normal"])
    return demo.train, None


def class_left_out(demo):
    write_rows(demo.train, [row for row in rows_of(demo.train) if row[1] != "Arson"])
    return demo.train, None


def file_not_there(demo):
    rows = rows_of(demo.train)
    demo.file(rows[4]).unlink()
    return demo.train, 5


def file_truncated(demo):
    path = demo.file(rows_of(demo.train)[4])
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-10])
    return demo.train, 5


def all_crops_in_one_file(demo):
    return change_features(demo, lambda features: np.stack([features] * 3))


def no_snippets(demo):
    return change_features(demo, lambda features: features[:0])


def not_a_number(demo):
    return change_features(demo, lambda features: np.where(np.eye(*features.shape) > 0, np.float16("nan"), features))


def features_of_another_width(demo):
    return change_features(demo, lambda features: features[:, :32])


def features_normalised(demo):
    return change_features(demo, lambda f: (f / np.linalg.norm(f.astype(float), axis=1)[:, None]).astype(f.dtype))


def another_models_test_list(demo):
    for row in rows_of(demo.test)[1:]:
        save(demo.file(row), np.load(demo.file(row)) * np.float16(2))
    return demo.test, None


def another_precision(demo):
    return change_features(demo, lambda features: features.astype(np.float32))


def snippets_zero(demo):
    return change_features(demo, lambda features: np.where(np.arange(len(features))[:, None] < 3, 0, features))


def snippets_all_the_same(demo):
    return change_features(demo, lambda features: np.repeat(features[:1], len(features), axis=0))


def columns_swapped(demo):
    write_rows(demo.train, [["path", "label"], *([label, path] for path, label in rows_of(demo.train)[1:])])
    return demo.train, None


def header_left_out(demo):
    write_rows(demo.train, rows_of(demo.train)[1:])
    return demo.train, None


def paths_of_another_machine(demo):
    edit(demo.train, lambda rows: rows[4].__setitem__(0, "D:\\features\\" + Path(rows[4][0]).name))
    return demo.train, 5


def paths_found_elsewhere(demo):
    demo.flags += ["--feature-root", str(demo.folder / "features" / "rgb")]
    return paths_of_another_machine(demo)


def store_out_of_date(demo):
    assert quietly(package_main, ["pack", "--dataset", "ucf", "--demo"]).code == 0
    demo.file(rows_of(demo.test)[3]).touch()
    return demo.test.with_suffix(".pack"), None


def under_two_names_in_both_lists(demo):
    row, features = read_tested(demo, -1)
    rng = np.random.default_rng(0)
    crops = [features + 0.1 * rng.normal(size=features.shape).astype(np.float16) for _ in range(3)]
    add_training_video(demo, row[1], "Normal_Videos999_x264", crops)
    return demo.test, len(rows_of(demo.test))


def training_on_the_test_list(demo):
    demo.flags += ["--train-list", str(demo.test)]
    return demo.test, None


def lists_the_wrong_way_round(demo):
    demo.flags += ["--train-list", str(demo.test), "--test-list", str(demo.train)]
    return demo.train, None


def row_per_frame(demo):
    demo.flags += ["--frames-per-snippet", "1"]
    return demo.truth, None


def normal_with_segments(demo):
    edit(demo.truth, lambda rows: rows[-1].__setitem__(slice(2, 5), ["Normal", "10", "50"]))
    return demo.truth, len(rows_of(demo.truth))


def normal_with_frames(demo):
    return change_arrays(demo, "frames", lambda frames: np.append(frames[:-5], np.ones(5, frames.dtype))), None


def anomalous_not_annotated(demo):
    edit(demo.truth, lambda rows: rows.pop(1))
    return demo.truth, None


def anomalous_without_segment(demo):
    change_arrays(demo, "labels", with_segment(0, ["A"]))
    return change_arrays(demo, "segments", with_segment(0, [[0, 16]])), None


def segment_past_the_end(demo):
    return change_arrays(demo, "segments", with_segment(0, [["90000", "90100"]])), None


def segment_negative(demo):
    return change_arrays(demo, "segments", with_segment(0, [["-5", "40"]])), None


def segment_backwards(demo):
    return change_arrays(demo, "segments", with_segment(0, [["50", "40"]])), None


def segments_overlapping(demo):
    def change(array):
        array[0] = [array[0][0], array[0][0]]
        return array

    change_arrays(demo, "labels", lambda labels: with_segment(0, [labels[0][0]] * 2)(labels))
    return change_arrays(demo, "segments", change), None


def segment_of_another_class(demo):
    edit(demo.truth, lambda rows: rows[1].__setitem__(2, "Shooting"))
    return demo.truth, None


def frames_cut_short(demo):
    return change_arrays(demo, "frames", lambda frames: frames[:-100]), None


def frames_of_another_order(demo):
    """The anomalous videos' frames the other way round: normal videos stay normal, and the sum is the same."""
    segments, count = read_array(demo.array("segments"), ""), 26
    normal = sum(int(item[0][1]) for item in segments[count:])
    return change_arrays(demo, "frames", lambda f: np.concatenate([f[: len(f) - normal][::-1], f[-normal:]])), None


def another_order_of_the_test_list(demo):
    demo.use_arrays()
    edit(demo.test, lambda rows: rows.__setitem__(slice(1, None), rows[:0:-1]))
    return demo.array("frames"), None


def model_of_another_dataset(demo):
    path = demo.folder / "model_clipfusionvad.pt"
    made = {"method": "clipfusionvad", "dataset": "xd", "options": {}, "clip": "toy"}
    write_torch(path, {"format": "clipfusionvad-1", "made": made, "model_state_dict": {"w": torch.zeros(2)}})
    return path, None


def calibration_not_there(demo):
    demo.flags += ["--calibration", "nowhere.pt"]
    return "", None


def event_stream_not_there(demo):
    demo.flags += ["--method", "iefvad"]
    events = demo.folder / "features" / "event"
    shutil.copytree(demo.clean / events, events, copy_function=os.link)
    row = rows_of(demo.train)[4]
    Path(str(demo.file(row)).replace("/rgb/", "/event/")).unlink()
    return demo.train, 5


TRUTH = {"normal-with-truth", "anomalous-without-truth", "truth-disagrees", "segment-bounds", "segment-labels"}
TRUTH |= {"truth-length", "segments-past-the-end", "segment-order"}
# mistake: (check that must find it, its level, checks that may speak of what follows from it)
MISTAKES = {
    overlap_same_row: ("train-test-overlap", ERROR, {"training-crops"}),
    overlap_in_disguise: ("train-test-overlap", ERROR, {"training-crops"}),
    copied_row_in_training: ("duplicate-rows", WARNING, set()),
    copied_row_in_test: ("duplicate-rows", ERROR, set()),
    one_videos_features_under_two_names: ("same-features", ERROR, set()),
    two_crops_the_same: ("same-features", WARNING, set()),
    crop_of_another_video: ("crop-lengths", WARNING, set()),
    crop_missing: ("training-crops", WARNING, set()),
    crop_too_many: ("training-crops", WARNING, set()),
    crop_labelled_differently: ("crop-labels", ERROR, {"label-against-name"}),
    label_misspelt: ("unknown-label", ERROR, {"crop-labels"}),
    label_against_the_name: ("label-against-name", ERROR, set()),
    mixed_test_crops: ("test-crops", WARNING, set()),
    two_crops_tested: ("test-crops", ERROR, set()),
    normal_videos_left_out: ("one-kind-only", ERROR, {"classes-absent"}),
    class_left_out: ("classes-absent", NOTE, set()),
    file_not_there: ("file-missing", ERROR, set()),
    file_truncated: ("file-unreadable", ERROR, set()),
    all_crops_in_one_file: ("file-unreadable", ERROR, set()),
    no_snippets: ("file-unreadable", ERROR, set()),
    not_a_number: ("file-unreadable", ERROR, set()),
    features_of_another_width: ("feature-width", ERROR, set()),
    features_normalised: ("feature-norms", ERROR, set()),
    another_models_test_list: ("feature-norms", ERROR, set()),
    another_precision: ("feature-dtype", WARNING, set()),
    snippets_zero: ("blank-snippets", WARNING, set()),
    snippets_all_the_same: ("blank-snippets", WARNING, set()),
    columns_swapped: ("list-unreadable", ERROR, set()),
    header_left_out: ("list-unreadable", ERROR, set()),
    paths_of_another_machine: ("file-missing", ERROR, set()),
    paths_found_elsewhere: ("foreign-paths", NOTE, set()),
    store_out_of_date: ("stale-store", ERROR, set()),
    under_two_names_in_both_lists: ("near-duplicates", WARNING, set()),
    training_on_the_test_list: ("lists-swapped", ERROR, {"train-test-overlap"}),
    lists_the_wrong_way_round: (
        "lists-swapped",
        ERROR,
        {"test-crops", "truth-unreadable", "truth-of-training-videos", "frames-per-snippet"},
    ),
    row_per_frame: ("frames-per-snippet", ERROR, {"truth-length"}),
    normal_with_segments: ("truth-unreadable", ERROR, set()),
    normal_with_frames: ("normal-with-truth", ERROR, set()),
    anomalous_not_annotated: ("truth-unreadable", ERROR, set()),
    anomalous_without_segment: ("anomalous-without-truth", ERROR, {"truth-length"}),
    segment_past_the_end: ("segment-bounds", ERROR, {"truth-disagrees"}),
    segment_negative: ("segment-bounds", ERROR, {"truth-disagrees"}),
    segment_backwards: ("segment-bounds", ERROR, {"truth-disagrees"}),
    segments_overlapping: ("segment-order", WARNING, set()),
    segment_of_another_class: ("segment-labels", ERROR, set()),
    frames_cut_short: ("truth-unreadable", ERROR, set()),
    frames_of_another_order: ("truth-disagrees", ERROR, {"anomalous-without-truth"}),
    another_order_of_the_test_list: ("normal-with-truth", ERROR, TRUTH),
    model_of_another_dataset: ("model-file", ERROR, set()),
    calibration_not_there: ("calibration-file", ERROR, set()),
    event_stream_not_there: ("file-unreadable", ERROR, set()),
}


def test_nothing_is_found_in_the_clean_set(demo):
    assert examine(GROUPS["data"], demo.survey()) == []
    demo.use_arrays()
    assert examine(GROUPS["data"], demo.survey()) == []


@pytest.mark.parametrize("plant", MISTAKES, ids=lambda plant: plant.__name__)
def test_a_planted_mistake_is_found(plant, demo):
    check, level, follow = MISTAKES[plant]
    file, row = plant(demo)
    before = {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")}
    findings = examine(GROUPS["data"], demo.survey())
    found = [finding for finding in findings if (finding.check, finding.level) == (check, level)]
    assert found, findings
    text = [str(finding) for finding in found]
    assert any(str(file) in line and (row is None or f"row {row}" in line) for line in text), text
    assert {finding.check for finding in findings} <= {check} | follow, findings
    assert {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")} == before, "it changes nothing"


def test_features_that_point_elsewhere_are_found(demo):
    """CLIP's features share a direction, so the demo's are given one; then one file has another."""
    shared, other = np.random.default_rng(3).normal(size=(2, 64))
    for path in (demo.train, demo.test):
        for row in rows_of(path)[1:]:
            features = np.load(demo.file(row))
            strange = Path(row[0]).stem == "Arson009_x264__1"
            away = 4 * (other if strange else shared)
            save(demo.file(row), ((0 if strange else 0.5) * features + away).astype(np.float16))
            if strange:
                number = at(rows_of(path), "Arson009_x264__1")
    (found,) = examine([check for check in GROUPS["data"] if name_of(check) == "feature-direction"], demo.survey())
    assert (found.level, found.file, found.row) == (WARNING, str(demo.train), number)


def test_the_command_prints_finds_writes_and_exits(demo):
    outcome = quietly(package_main, ["doctor", "--dataset", "ucf", "--demo", "--only", "data"])
    assert outcome.code == 0 and "nothing found, in" in outcome.out
    file, row = label_misspelt(demo)
    outcome = quietly(package_main, ["doctor", "--dataset", "ucf", "--demo", "--only", "data", "--json", "found.json"])
    assert outcome.code == 1 and f"error    unknown-label: {file}, row {row}: unknown label 'Abus' (did you mean" in (
        outcome.out
    )
    kept = json.loads(Path("found.json").read_text())["findings"]
    assert {"level": "error", "check": "unknown-label", "file": str(file), "row": row}.items() <= kept[0].items()
    # A note alone is no error.
    outcome = quietly(package_main, ["doctor", "--dataset", "ucf", "--demo", "--only", "classes-absent"])
    assert outcome.code == 0 and outcome.err == ""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--only", "unknown-lable"], "did you mean 'unknown-label'"),
        (["--demo"], "--dataset is needed beside --demo"),
        (["--dataset", "ufc"], "did you mean 'ucf'"),
        (["--run", "nowhere"], "no such folder: nowhere"),
        (["--dataset", "ucf", "--only", "data", "--feature-root", "nowhere"], "feature root not found: nowhere"),
    ],
)
def test_bad_usage_is_one_line(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = argv if "--only" in argv else [*argv, "--only", "data", "run"]
    outcome = quietly(package_main, ["doctor", *argv])
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1


def test_without_options_the_lists_that_are_there_are_looked_at(demo, monkeypatch):
    monkeypatch.chdir(demo.folder)
    outcome = quietly(package_main, ["doctor", "--only", "data"])
    assert "UCF-Crime: list/" in outcome.out and "XD" not in outcome.out
    # The lists are the demo's, the options those of real features.
    assert outcome.code == 1 and "feature-width: list/" in outcome.out


def test_many_findings_of_a_check_are_counted():
    findings = [Finding(NOTE, "last", check="b")] + [Finding(ERROR, str(i), "f", i + 1, check="a") for i in range(20)]
    shown = list(lines(findings))
    assert len(shown) == SHOWN + 2 and "and 12 more" in shown[SHOWN] and shown[-1].startswith("note")


def test_every_check_is_listed_here_and_in_the_docs():
    listed = quietly(package_main, ["doctor", "--list"]).out
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    names = [name_of(check) for checks in GROUPS.values() for check in checks]
    assert len(set(names)) == len(names) >= 20
    for name, line in zip(names, listed.splitlines(), strict=True):
        group, told, about = line.split(maxsplit=2)
        assert told == name and group in GROUPS
        assert f"| `{name}` | {about} |" in page, f"docs/doctor.md lacks | `{name}` | {about} |"
