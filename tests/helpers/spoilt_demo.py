"""A copy of the demo set to plant mistakes in, and ways to do it."""

import csv
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import ucf_option
from clipfusionvad.cli.options import settings_of
from clipfusionvad.datasets import UCF
from clipfusionvad.io.npy import read_array
from clipfusionvad.tools.demo import demo_folder
from clipfusionvad.tools.doctor.scan import DatasetScan


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

    def scan(self):
        return DatasetScan(settings_of(ucf_option.parse_args(["--demo", *self.flags]), UCF))


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
    return demo.array(kind), None


def with_segment(index, segments):
    def change(array):
        array[index] = segments
        return array

    return change
