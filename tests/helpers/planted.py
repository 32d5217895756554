"""A copy of the demo set, and mistakes planted in it by functions that return (file, row) of what must be found."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from tiny import quietly

import ucf_option
from clipfusionvad.__main__ import main as package_main
from clipfusionvad.cli.options import settings_of
from clipfusionvad.datasets import UCF
from clipfusionvad.io.files import write_torch
from clipfusionvad.io.npy import read_array
from clipfusionvad.tools.demo import demo_folder
from clipfusionvad.tools.doctor import ERROR, NOTE, WARNING
from clipfusionvad.tools.doctor.scan import DatasetScan


class Demo:
    """A copy of the demo set to spoil, of which the current folder is the parent; files are linked, so replaced."""

    def __init__(self, clean: Path) -> None:
        self.clean, self.flags, self.folder = clean, [], demo_folder(UCF)
        self.train, self.test, self.truth = (
            self.folder / "list" / UCF.list_files[part] for part in ("train", "test", "truth")
        )

    def array(self, kind):
        return self.folder / "list" / UCF.truth_files[kind]

    def use_arrays(self):
        flags = {"--gt-path": "frames", "--gt-segment-path": "segments", "--gt-label-path": "labels"}
        self.flags += [item for flag, kind in flags.items() for item in (flag, str(self.array(kind)))]

    def with_flags(self, file, *flags):
        self.flags += map(str, flags)
        return file, None

    def file(self, row):
        return self.train.parent / row[0]

    def features(self, number, listed=None):
        """The file of a row (1 is the header) and its array."""
        path = self.file(rows_of(listed or self.train)[number - 1])
        return path, np.load(path)

    def add(self, listed, label, files):
        """New rows at the end of a list, with features by file name; where the first of them is."""
        paths = [self.folder / "features" / "rgb" / "more" / label / f"{name}.npy" for name in files]
        for path, array in zip(paths, files.values(), strict=True):
            save(path, array)
        return append(listed, *([os.path.relpath(path, listed.parent), label] for path in paths))

    def scan(self):
        return DatasetScan(settings_of(ucf_option.parse_args(["--demo", *self.flags]), UCF))


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def write_rows(path, rows):
    path.unlink()
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path, None


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    np.save(path, array)


def at(path, stem):
    """The number of the row of a list that names a feature file; the header is row 1."""
    return next(number for number, row in enumerate(rows_of(path), 1) if Path(row[0]).stem == stem)


def append(path, *rows):
    old = rows_of(path)
    write_rows(path, [*old, *rows])
    return path, len(old) + 1


def set_cells(listed, number, **cells):
    """Change cells of a row by column name."""
    rows = rows_of(listed)
    rows[number - 1] = [cells.get(column, cell) for column, cell in zip(rows[0], rows[number - 1], strict=True)]
    write_rows(listed, rows)
    return listed, number


def overlap_in_disguise(demo):
    """Another folder, crop, case and content."""
    path, features = demo.features(2, demo.test)
    name = path.stem.removesuffix("__5").upper()
    return demo.add(demo.train, rows_of(demo.test)[1][1], {f"{name}__0": features[1:]})


def copied(demo, pairs):
    """The features of one video under the name of another; the last file is what is found."""
    for source, target in pairs.items():
        save(demo.features(at(demo.train, target))[0], demo.features(at(demo.train, source))[1])
    return demo.train, at(demo.train, list(pairs.values())[0])


def crop_missing(demo):
    number = at(demo.train, "Abuse002_x264__0")
    write_rows(demo.train, [row for index, row in enumerate(rows_of(demo.train), 1) if index != number])
    return demo.train, number


def crop_too_many(demo):
    number = at(demo.train, "Abuse003_x264__0")
    demo.add(demo.train, "Abuse", {"Abuse003_x264__7": demo.features(number)[1][::-1]})
    return demo.train, number


def mixed_test_crops(demo):
    path, features = demo.features(5, demo.test)
    new = path.with_name(path.name.replace("__5", "__3"))
    save(new, features)
    return set_cells(demo.test, 5, path=os.path.relpath(new, demo.test.parent))


def two_crops_tested(demo):
    path, features = demo.features(5, demo.test)
    return demo.add(demo.test, rows_of(demo.test)[4][1], {path.stem.replace("__5", "__4"): features[::-1]})


def file_truncated(demo, listed):
    path, _ = demo.features(5, listed)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-10])
    return listed, 5


def another_models_test_list(demo):
    for row in rows_of(demo.test)[1:]:
        save(demo.file(row), np.load(demo.file(row)) * np.float16(2))
    return demo.test, None


def paths_of_another_machine(demo):
    return set_cells(demo.train, 5, path="D:\\features\\" + demo.features(5)[0].name)


def store_out_of_date(demo):
    assert quietly(package_main, ["pack", "--dataset", "ucf", "--demo"]).code == 0
    demo.features(4, demo.test)[0].touch()
    return demo.test.with_suffix(".pack"), None


def under_two_names_in_both_lists(demo):
    rows, rng = rows_of(demo.test), np.random.default_rng(0)
    _, features = demo.features(len(rows), demo.test)
    noise = [0.1 * rng.normal(size=features.shape).astype(np.float16) for _ in range(3)]
    demo.add(demo.train, rows[-1][1], {f"Normal_Videos999_x264__{crop}": features + noise[crop] for crop in range(3)})
    return demo.test, len(rows)


def model_of_another_dataset(demo):
    path = demo.folder / "model_clipfusionvad.pt"
    made = {"method": "clipfusionvad", "dataset": "xd", "options": {}, "clip": "toy"}
    write_torch(path, {"format": "clipfusionvad-1", "made": made, "model_state_dict": {"w": torch.zeros(2)}})
    return path, None


def event_stream_not_there(demo):
    events = demo.folder / "features" / "event"
    shutil.copytree(demo.clean / events, events, copy_function=os.link)
    Path(str(demo.features(5)[0]).replace("/rgb/", "/event/")).unlink()
    demo.with_flags("", "--method", "iefvad")
    return demo.train, 5


def without(demo, label):
    return write_rows(demo.train, [row for row in rows_of(demo.train) if row[1] != label])


def relabelled(listed, stem, label):
    return set_cells(listed, at(listed, stem), label=label)


def label_against_name(demo):
    demo.with_flags("", "--gt-path", "none")
    return relabelled(demo.test, "Abuse501_x264__5", "Normal")


def lists_swapped(demo):
    return demo.with_flags(demo.train, "--train-list", demo.test, "--test-list", demo.train)


def found_elsewhere(demo):
    demo.with_flags("", "--feature-root", demo.folder / "features" / "rgb")
    return paths_of_another_machine(demo)


two_names = {f"Abuse001_x264__{crop}": f"Arson009_x264__{crop}" for crop in range(3)}
# mistake: (how it is planted, check that must find it, its level)
MISTAKES = {
    "overlap, same row": (lambda d: append(d.train, rows_of(d.test)[1]), "train-test-overlap", ERROR),
    "overlap in disguise": (overlap_in_disguise, "train-test-overlap", ERROR),
    "copied row in training": (lambda d: append(d.train, rows_of(d.train)[7]), "duplicate-rows", WARNING),
    "copied row in test": (lambda d: append(d.test, rows_of(d.test)[7]), "duplicate-rows", ERROR),
    "one video under two names": (lambda d: copied(d, two_names), "same-features", ERROR),
    "two crops the same": (lambda d: copied(d, {"Abuse001_x264__0": "Abuse001_x264__1"}), "same-features", WARNING),
    "crop missing": (crop_missing, "training-crops", WARNING),
    "crop too many": (crop_too_many, "training-crops", WARNING),
    "crop labelled differently": (lambda d: relabelled(d.train, "Abuse001_x264__1", "Arrest"), "crop-labels", ERROR),
    "label misspelt": (lambda d: relabelled(d.train, "Abuse001_x264__1", "Abus"), "unknown-label", ERROR),
    "label against the name": (label_against_name, "label-against-name", ERROR),
    "mixed test crops": (mixed_test_crops, "test-crops", WARNING),
    "two crops tested": (two_crops_tested, "test-crops", ERROR),
    "no normal videos": (lambda d: without(d, "Normal"), "one-kind-only", ERROR),
    "no videos of a class": (lambda d: without(d, "Arson"), "classes-absent", NOTE),
    "file not there": (lambda d: d.features(5)[0].unlink() or (d.train, 5), "file-missing", ERROR),
    "file truncated": (lambda d: file_truncated(d, d.train), "file-unreadable", ERROR),
    "truncated in the test list": (lambda d: file_truncated(d, d.test), "file-unreadable", ERROR),
    "another model's test list": (another_models_test_list, "feature-norms", ERROR),
    "columns swapped": (
        lambda d: write_rows(d.train, [["path", "label"], *(row[::-1] for row in rows_of(d.train)[1:])]),
        "list-unreadable",
        ERROR,
    ),
    "header left out": (lambda d: write_rows(d.train, rows_of(d.train)[1:]), "list-unreadable", ERROR),
    "paths of another machine": (paths_of_another_machine, "file-missing", ERROR),
    "paths found elsewhere": (found_elsewhere, "foreign-paths", NOTE),
    "store out of date": (store_out_of_date, "stale-store", ERROR),
    "under two names in both lists": (under_two_names_in_both_lists, "near-duplicates", WARNING),
    "training on the test list": (lambda d: d.with_flags(d.test, "--train-list", d.test), "lists-swapped", ERROR),
    "lists the wrong way round": (lists_swapped, "lists-swapped", ERROR),
    "model of another dataset": (model_of_another_dataset, "model-file", ERROR),
    "no calibration": (lambda d: d.with_flags("no.pt", "--calibration", "no.pt"), "normal-centroid-file", ERROR),
    "no event stream": (event_stream_not_there, "file-unreadable", ERROR),
}


def change_features(change):
    def plant(demo):
        number = at(demo.train, "Arson009_x264__1")
        path, features = demo.features(number)
        save(path, change(features))
        return demo.train, number

    return plant


def _normalise(features):
    return (features / np.linalg.norm(features.astype(float), axis=1)[:, None]).astype(features.dtype)


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
MISTAKES |= {name: (change_features(change), check, level) for name, (change, check, level) in FEATURES.items()}


def change_arrays(demo, **changes):
    """Change released arrays of truth by functions; the last file is what is found."""
    demo.use_arrays()
    for kind, change in changes.items():
        save(demo.array(kind), change(read_array(demo.array(kind), "")))
    return demo.array(kind), None


def first_item(make):
    """A change of the first video's item."""

    def change(array):
        array[0] = make(array[0])
        return array

    return change


def twice(array):
    return first_item(lambda item: [item[0]] * 2)(array)


def ends_abnormal(frames):
    return np.append(frames[:-5], np.ones(5, frames.dtype))


def normal_with_segments(demo):
    return set_cells(demo.truth, len(rows_of(demo.truth)), label="Normal", start="10", end="50")


def not_annotated(demo):
    return write_rows(demo.truth, np.delete(rows_of(demo.truth), 1, axis=0))


def anomalous_without_segment(demo):
    return change_arrays(demo, labels=first_item(lambda _: ["A"]), segments=first_item(lambda _: [[0, 16]]))


def frames_of_another_order(demo):
    """The anomalous videos' frames the other way round: normal videos stay normal, and the sum is the same."""
    normal = sum(int(item[0][1]) for item in read_array(demo.array("segments"), "")[26:])
    return change_arrays(demo, frames=lambda f: np.concatenate([f[: len(f) - normal][::-1], f[-normal:]]))


def another_order_of_the_test_list(demo):
    demo.use_arrays()
    header, *rows = rows_of(demo.test)
    write_rows(demo.test, [header, *rows[::-1]])
    return demo.array("frames"), None


TRUTH = {"normal-with-truth", "anomalous-without-truth", "truth-disagrees", "segment-bounds", "segment-labels"}
TRUTH |= {"truth-length", "segment-order"}
MISTAKES |= {
    "row per frame": (lambda d: d.with_flags(d.truth, "--frames-per-snippet", "1"), "frames-per-snippet", ERROR),
    "normal with segments": (normal_with_segments, "truth-unreadable", ERROR),
    "normal with frames": (lambda d: change_arrays(d, frames=ends_abnormal), "normal-with-truth", ERROR),
    "anomalous, not annotated": (not_annotated, "truth-unreadable", ERROR),
    "anomalous without segment": (anomalous_without_segment, "anomalous-without-truth", ERROR),
    "segments overlapping": (lambda d: change_arrays(d, labels=twice, segments=twice), "segment-order", WARNING),
    "segment of another class": (lambda d: (set_cells(d.truth, 2, label="Shooting")[0], None), "segment-labels", ERROR),
    "frames cut short": (lambda d: change_arrays(d, frames=lambda f: f[:-100]), "truth-unreadable", ERROR),
    "frames of another order": (frames_of_another_order, "truth-disagrees", ERROR),
    "another order of the test list": (another_order_of_the_test_list, "normal-with-truth", ERROR),
}
SEGMENTS = {
    "past the end": (["90000", "90100"], "segment-bounds", ERROR),
    "cut off": (["0", "90100"], "segment-bounds", NOTE),
    "empty": (["40", "40"], "segment-bounds", ERROR),
    "negative": (["-5", "40"], "truth-unreadable", ERROR),
    "backwards": (["50", "40"], "truth-unreadable", ERROR),
}
for name, (bounds, check, level) in SEGMENTS.items():
    change = first_item(lambda _, bounds=bounds: [bounds])
    MISTAKES[f"segment {name}"] = (lambda d, change=change: change_arrays(d, segments=change)), check, level
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
    "row per frame": {"truth-unreadable"},
    "anomalous without segment": {"truth-length"},
    "frames of another order": {"anomalous-without-truth"},
    "another order of the test list": TRUTH,
    "segment past the end": {"truth-disagrees"},
    "segment cut off": {"truth-disagrees"},
    "segment empty": {"truth-disagrees"},
}
