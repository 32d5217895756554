"""A dataset of one's own: its YAML file, and the steps of docs/own-data.md through the command line."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from tiny import SCHEDULE_FLAGS, WIDTH, quietly, strings

from clipfusionvad.__main__ import main
from clipfusionvad.data.annotations import read_annotations
from clipfusionvad.datasets import find_dataset, read_dataset
from clipfusionvad.engine.checkpoint import dataset_of, read_model_file
from clipfusionvad.io.foreign_checkpoints import read_checkpoint

PARKING = """
title: Parking garage
classes:
  Quiet: an empty parking garage
  Theft: someone breaking into a car
  Protest: people shouting and holding signs
fps: 25
"""
OWN = ["--dataset", "parking.yaml"]
SMALL = ["--clip", "toy", "--embed-dim", WIDTH, "--visual-width", WIDTH, "--visual-length", 32, "--attn-window", 8]


@pytest.fixture
def garage(tmp_path, monkeypatch):
    """The user's folder: a dataset file, features in class folders below train/ and test/, and a truth file."""
    monkeypatch.chdir(tmp_path)
    Path("parking.yaml").write_text(PARKING)
    rng, truth = np.random.default_rng(0), ["video,frames,label,start,end"]
    for split, column, number in [*product(("train",), range(3), range(4)), *product(("test",), range(3), range(2))]:
        label, snippets = ("Quiet", "Theft", "Protest")[column], 20 + 3 * number
        name, folder = f"{split}_{label.lower()}{number}", Path("features", split, label)
        rows = rng.normal(size=(snippets, WIDTH))
        rows[5:12, column] += 6 * (column > 0)
        folder.mkdir(parents=True, exist_ok=True)
        for crop in (0, 5):
            np.save(folder / f"{name}__{crop}.npy", rows.astype(np.float16))
        if split == "test":
            truth.append(f"{name},{16 * snippets + 7},{label},{'80,192' if column else ','}")
    Path("truth.csv").write_text("\n".join(truth) + "\n")


def run(command, *argv, code=0):
    done = quietly(main, strings([command, *argv]))
    assert done.code == code and (code == 0 or done.err.count("\n") == 1), done
    return done


def lists(*more, code=0):
    return run("lists", *OWN, "--features", "features", "--output", "list", *more, code=code)


def train(*more, code=0):
    flags = [*SMALL, *SCHEDULE_FLAGS, "--output-dir", "runs/parking", "--device", "cpu"]
    return run("train", *OWN, *flags, *more, code=code)


def test_from_features_to_an_exported_model(garage):
    lists("--annotations", "truth.csv")
    names = "parking_train.csv parking_test.csv parking_truth.csv gt_parking.npy gt_segment_parking.npy"
    assert {path.name for path in Path("list").iterdir()} == {*names.split(), "gt_label_parking.npy"}
    # The truth that is written holds what the given one says.
    dataset = read_dataset("parking.yaml")
    assert read_annotations("list/parking_truth.csv", dataset) == read_annotations("truth.csv", dataset)
    # Every crop of 4 videos of 3 classes; a class whose name has "test" in it is still a class.
    listed = Path("list/parking_train.csv").read_text()
    assert len(listed.splitlines()) == 1 + 4 * 3 * 2 and listed.count(",Protest") == 8
    done = train("--gt-path", "list/parking_truth.csv")
    assert "Parking garage: 24 training rows, 6 test videos" in done.out
    assert Path("model/model_parking.pth").is_file()

    flags = ["--method", "clipfusionvad", "--gt-path", "list/parking_truth.csv", "--metrics-json", "m.json"]
    assert "warning" not in run("test", *OWN, *flags, "--output-dir", "tested").err
    metrics = json.loads(Path("m.json").read_text())
    assert metrics == json.loads(Path("runs/parking/metrics.json").read_text())["best"]
    assert {"auc1", "map", "mauc"} <= metrics.keys() and set(metrics["per_class"]) == {"Theft", "Protest"}

    assert "parking" in run("export", "model/model_parking.pth", "--output", "exported.pth").out
    assert any(key.startswith("clipmodel.") for key in read_checkpoint("exported.pth", "model"))
    # The run's options are a config again.
    train("--config", "runs/parking/options.yaml", "--use-checkpoint", "--max-epoch", 3)
    # A model stores its classes and refuses others.
    Path("parking.yaml").write_text(PARKING.replace("Protest", "Fire"))
    assert "Protest" in run("test", *OWN, "--gt-path", "list/parking_truth.csv", code=2).err
    Path("parking.yaml").unlink()
    stored = dataset_of(read_model_file("model/model_parking.pth"))
    assert (stored.name, stored.prompts[1], stored.labels[0]) == ("parking", "someone breaking into a car", "Quiet")


def test_without_annotations_whole_videos_are_judged(garage):
    done = lists(code=2)
    assert "has no annotation" in done.err and "--no-truth" in done.err and not Path("list").exists()
    lists("--no-truth")
    assert {path.name for path in Path("list").iterdir()} == {"parking_train.csv", "parking_test.csv"}
    assert "gt_parking.npy" in train(code=2).err
    train("--gt-path", "none")
    best = json.loads(Path("runs/parking/metrics.json").read_text())["best"]
    assert {"auc1", "ap1"} <= best.keys() and "map" not in best
    run("test", *OWN, "--gt-path", "none", "--output-dir", "tested")
    assert Path("tested/test_metrics.json").is_file()


def test_a_split_file_instead_of_folders_and_several_folders_of_one_class(garage):
    Path("features/test").rename("features/more")
    Path("test_videos.txt").write_text("".join(f"{p.stem[:-3]}\n" for p in Path("features/more").rglob("*__0.npy")))
    aliases = "aliases: {theft: Trouble, Protest: Trouble}"
    Path("parking.yaml").write_text(f"classes: {{Quiet: nothing, Trouble: trouble}}\n{aliases}\n")
    Path("truth.csv").write_text(re.sub("Theft|Protest", "Trouble", Path("truth.csv").read_text()))
    lists("--annotations", "truth.csv", "--split", "test_videos.txt")
    assert len(Path("list/parking_test.csv").read_text().splitlines()) == 1 + 6
    assert Path("list/parking_train.csv").read_text().count(",Trouble") == 16


def test_what_a_file_may_say(tmp_path):
    path = tmp_path / "shop.yml"
    more = "name: till-7\nmulti_label: true\ntest_crop: 5\naliases: {night: Quiet}\nlabel_pattern: '^([A-Za-z]+)_'\n"
    path.write_text(PARKING + more)
    dataset = find_dataset(str(path))
    assert (dataset.name, dataset.title, dataset.fps, dataset.test_crop) == ("till-7", "Parking garage", 25, 5)
    assert dataset.labels == ["Quiet", "Theft", "Protest"] and dataset.prompts[0] == "an empty parking garage"
    assert dataset.label_of("theft_3") == "Theft" and dataset.label_of("1", "NIGHT") == "Quiet"
    assert dataset.codes("Theft-Protest") == ["Theft", "Protest"]
    path.write_text("classes: {normal: '0', fire: fire}")
    assert read_dataset(path).name == "shop" and read_dataset(path).fps == 30


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "dataset file not found"),
        ("", "lines of the form"),
        ("classes: {a: b", "not readable YAML"),
        ("clases: {a: b, c: d}", "did you mean 'classes'"),
        ("title: X\n", "two labels or more"),
        ("classes: {normal: calm, 1: one}", "put it in quotes"),
        ("classes: {no: calm, fire: fire}", "put it in quotes"),
        ("classes: {normal: calm, fire: }", "put it in quotes"),
        ("classes: {normal: calm, fire: a, Fire: b}", "only in case"),
        ("classes: {normal: calm, A: b}", "marks normal videos"),
        ("classes: [normal, fire]", "classes cannot be"),
        ("classes: {a: b, c: d}\nname: ucf\n", "a benchmark"),
        ("classes: {a: b, c: d}\nname: my data\n", "letters, digits"),
        ("classes: {a: b, c: d}\nfps: fast\n", "fps cannot be 'fast'"),
        ("classes: {a: b, c: d}\nfps: 0\n", "more than 0"),
        ("classes: {a: b, c: d}\ntest_crop: true\n", "test_crop cannot be True"),
        ("classes: {a: b, c: d}\naliases: {x: e}\n", "unknown label 'e'"),
        ("classes: {a: b, c: d}\nlabel_pattern: '('\n", "not a regular expression"),
        ("classes: {a: b, c: d}\nlabel_pattern: abc\n", "parentheses"),
    ],
)
def test_a_bad_file_is_one_line(text, says, tmp_path):
    path = tmp_path / "own.yaml"
    if text is not None:
        path.write_text(text)
    done = run("lists", "--dataset", path, "--features", tmp_path, "--output", tmp_path / "list", code=2)
    assert done.err.startswith("error: ") and "own.yaml" in done.err and says in done.err
