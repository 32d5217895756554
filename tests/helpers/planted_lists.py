"""Mistakes in lists and features, each planted by a function that returns (file, row) of what must be found."""

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from spoilt_demo import add_training_video, at, change_features, edit, read_tested, rows_of, save, write_rows
from tiny import quietly

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.io.files import write_torch
from clipfusionvad.tools.doctor import ERROR, NOTE, WARNING


def overlap_same_row(demo):
    row, _ = read_tested(demo)
    return demo.train, edit(demo.train, lambda rows: rows.append(row) or len(rows))


def overlap_in_disguise(demo):
    """Another folder, crop, case and content."""
    row, features = read_tested(demo)
    name = Path(row[0]).stem.removesuffix("__5").upper()
    return add_training_video(demo, row[1], name, [features[1:]], crops=[0])


def copied_row(demo, listed):
    return listed, edit(listed, lambda rows: rows.append(rows[7]) or len(rows))


def relabelled(demo, listed, stem, label):
    number = at(rows_of(listed), stem)
    edit(listed, lambda rows: rows[number - 1].__setitem__(1, label))
    return listed, number


def left_out(demo, label):
    write_rows(demo.train, [row for row in rows_of(demo.train) if row[1] != label])
    return demo.train, None


def rewritten(demo, change):
    write_rows(demo.train, change(rows_of(demo.train)))
    return demo.train, None


def with_flags(demo, file, *flags):
    demo.flags += map(str, flags)
    return file, None


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


def file_truncated(demo, listed):
    path = demo.file(rows_of(listed)[4])
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-10])
    return listed, 5


def another_models_test_list(demo):
    for row in rows_of(demo.test)[1:]:
        save(demo.file(row), np.load(demo.file(row)) * np.float16(2))
    return demo.test, None


def paths_of_another_machine(demo):
    edit(demo.train, lambda rows: rows[4].__setitem__(0, "D:\\features\\" + Path(rows[4][0]).name))
    return demo.train, 5


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


def model_of_another_dataset(demo):
    path = demo.folder / "model_clipfusionvad.pt"
    made = {"method": "clipfusionvad", "dataset": "xd", "options": {}, "clip": "toy"}
    write_torch(path, {"format": "clipfusionvad-1", "made": made, "model_state_dict": {"w": torch.zeros(2)}})
    return path, None


def event_stream_not_there(demo):
    demo.flags += ["--method", "iefvad"]
    events = demo.folder / "features" / "event"
    shutil.copytree(demo.clean / events, events, copy_function=os.link)
    row = rows_of(demo.train)[4]
    Path(str(demo.file(row)).replace("/rgb/", "/event/")).unlink()
    return demo.train, 5


def _normalise(features):
    return (features / np.linalg.norm(features.astype(float), axis=1)[:, None]).astype(features.dtype)


# mistake: (how it is planted, check that must find it, its level)
MISTAKES = {
    "overlap, same row": (overlap_same_row, "train-test-overlap", ERROR),
    "overlap in disguise": (overlap_in_disguise, "train-test-overlap", ERROR),
    "copied row in training": (lambda d: copied_row(d, d.train), "duplicate-rows", WARNING),
    "copied row in test": (lambda d: copied_row(d, d.test), "duplicate-rows", ERROR),
    "one video's features under two names": (one_videos_features_under_two_names, "same-features", ERROR),
    "two crops the same": (two_crops_the_same, "same-features", WARNING),
    "crop missing": (crop_missing, "training-crops", WARNING),
    "crop too many": (crop_too_many, "training-crops", WARNING),
    "crop labelled differently": (lambda d: relabelled(d, d.train, "Abuse001_x264__1", "Arrest"), "crop-labels", ERROR),
    "label misspelt": (lambda d: relabelled(d, d.train, "Abuse001_x264__1", "Abus"), "unknown-label", ERROR),
    "label against the name": (
        lambda d: with_flags(d, "", "--gt-path", "none") and relabelled(d, d.test, "Abuse501_x264__5", "Normal"),
        "label-against-name",
        ERROR,
    ),
    "mixed test crops": (mixed_test_crops, "test-crops", WARNING),
    "two crops tested": (two_crops_tested, "test-crops", ERROR),
    "no normal videos": (lambda d: left_out(d, "Normal"), "one-kind-only", ERROR),
    "no videos of a class": (lambda d: left_out(d, "Arson"), "classes-absent", NOTE),
    "file not there": (lambda d: d.file(rows_of(d.train)[4]).unlink() or (d.train, 5), "file-missing", ERROR),
    "file truncated": (lambda d: file_truncated(d, d.train), "file-unreadable", ERROR),
    "truncated in the test list": (lambda d: file_truncated(d, d.test), "file-unreadable", ERROR),
    "another model's test list": (another_models_test_list, "feature-norms", ERROR),
    "columns swapped": (
        lambda d: rewritten(d, lambda rows: [rows[0], *(row[::-1] for row in rows[1:])]),
        "list-unreadable",
        ERROR,
    ),
    "header left out": (lambda d: rewritten(d, lambda rows: rows[1:]), "list-unreadable", ERROR),
    "paths of another machine": (paths_of_another_machine, "file-missing", ERROR),
    "paths found elsewhere": (
        lambda d: with_flags(d, "", "--feature-root", d.folder / "features" / "rgb") and paths_of_another_machine(d),
        "foreign-paths",
        NOTE,
    ),
    "store out of date": (store_out_of_date, "stale-store", ERROR),
    "under two names in both lists": (under_two_names_in_both_lists, "near-duplicates", WARNING),
    "training on the test list": (lambda d: with_flags(d, d.test, "--train-list", d.test), "lists-swapped", ERROR),
    "lists the wrong way round": (
        lambda d: with_flags(d, d.train, "--train-list", d.test, "--test-list", d.train),
        "lists-swapped",
        ERROR,
    ),
    "model of another dataset": (model_of_another_dataset, "model-file", ERROR),
    "no calibration": (
        lambda d: with_flags(d, "nowhere.pt", "--calibration", "nowhere.pt"),
        "normal-centroid-file",
        ERROR,
    ),
    "no event stream": (event_stream_not_there, "file-unreadable", ERROR),
}
# mistake: (change of one training file's features, check that must find it, its level)
FEATURES = {
    "crop of another video": (lambda f: np.concatenate([f, f[:2] * 2]), "crop-lengths", WARNING),
    "all crops in one file": (lambda f: np.stack([f] * 3), "file-unreadable", ERROR),
    "no snippets": (lambda f: f[:0], "file-unreadable", ERROR),
    "not a number": (lambda f: np.where(np.eye(*f.shape) > 0, np.float16("nan"), f), "file-unreadable", ERROR),
    "another width": (lambda f: f[:, :32], "feature-width", ERROR),
    "normalised": (_normalise, "feature-norms", ERROR),
    "another precision": (lambda f: f.astype(np.float32), "feature-dtype", WARNING),
    "snippets zero": (lambda f: np.where(np.arange(len(f))[:, None] < 3, 0, f), "blank-snippets", WARNING),
    "snippets all the same": (lambda f: np.repeat(f[:1], len(f), axis=0), "blank-snippets", WARNING),
}
MISTAKES |= {
    name: (partial(change_features, change=change), check, level) for name, (change, check, level) in FEATURES.items()
}
# mistake: other checks that may report what follows from it
FOLLOWS = {
    "overlap, same row": {"training-crops"},
    "overlap in disguise": {"training-crops"},
    "crop labelled differently": {"label-against-name"},
    "label misspelt": {"crop-labels"},
    "no normal videos": {"classes-absent"},
    "truncated in the test list": {"truth-unreadable"},
    "training on the test list": {"train-test-overlap"},
    "lists the wrong way round": {"test-crops", "truth-unreadable", "truth-of-training-videos", "frames-per-snippet"},
}
