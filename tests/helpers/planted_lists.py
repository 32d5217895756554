"""Mistakes in lists and features, each planted by a function that returns (file, row) of what must be found."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from spoilt_demo import add_training_video, at, change_features, edit, read_tested, rows_of, save, write_rows
from tiny import quietly

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.io.files import write_torch
from clipfusionvad.tools.doctor.findings import ERROR, NOTE, WARNING


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


def file_truncated(demo, listed=None):
    listed = listed or demo.train
    path = demo.file(rows_of(listed)[4])
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-10])
    return listed, 5


def truncated_in_the_test_list(demo):
    return file_truncated(demo, demo.test)


def another_models_test_list(demo):
    for row in rows_of(demo.test)[1:]:
        save(demo.file(row), np.load(demo.file(row)) * np.float16(2))
    return demo.test, None


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


def _changing(name, change):
    def plant(demo):
        return change_features(demo, change)

    plant.__name__ = name
    return plant


def _normalise(features):
    return (features / np.linalg.norm(features.astype(float), axis=1)[:, None]).astype(features.dtype)


# name: (change of one training file's features, check that must find it, its level)
FEATURES = {
    "crop_of_another_video": (lambda f: np.concatenate([f, f[:2] * 2]), "crop-lengths", WARNING),
    "all_crops_in_one_file": (lambda f: np.stack([f] * 3), "file-unreadable", ERROR),
    "no_snippets": (lambda f: f[:0], "file-unreadable", ERROR),
    "not_a_number": (lambda f: np.where(np.eye(*f.shape) > 0, np.float16("nan"), f), "file-unreadable", ERROR),
    "another_width": (lambda f: f[:, :32], "feature-width", ERROR),
    "normalised": (_normalise, "feature-norms", ERROR),
    "another_precision": (lambda f: f.astype(np.float32), "feature-dtype", WARNING),
    "snippets_zero": (lambda f: np.where(np.arange(len(f))[:, None] < 3, 0, f), "blank-snippets", WARNING),
    "snippets_all_the_same": (lambda f: np.repeat(f[:1], len(f), axis=0), "blank-snippets", WARNING),
}
# mistake: (check that must find it, its level, checks that may report what follows from it)
MISTAKES = {
    overlap_same_row: ("train-test-overlap", ERROR, {"training-crops"}),
    overlap_in_disguise: ("train-test-overlap", ERROR, {"training-crops"}),
    copied_row_in_training: ("duplicate-rows", WARNING, set()),
    copied_row_in_test: ("duplicate-rows", ERROR, set()),
    one_videos_features_under_two_names: ("same-features", ERROR, set()),
    two_crops_the_same: ("same-features", WARNING, set()),
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
    truncated_in_the_test_list: ("file-unreadable", ERROR, {"truth-unreadable"}),
    another_models_test_list: ("feature-norms", ERROR, set()),
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
    model_of_another_dataset: ("model-file", ERROR, set()),
    calibration_not_there: ("normal-centroid-file", ERROR, set()),
    event_stream_not_there: ("file-unreadable", ERROR, set()),
}
MISTAKES |= {_changing(name, change): (check, level, set()) for name, (change, check, level) in FEATURES.items()}
