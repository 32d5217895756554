"""A dataset of one's own: its YAML file, and the steps of docs/own-data.md through the command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tiny import SCHEDULE_FLAGS, WIDTH, quietly, strings

from clipfusionvad.__main__ import main
from clipfusionvad.data.annotations import read_annotations
from clipfusionvad.datasets import find_dataset, read_dataset
from clipfusionvad.engine.checkpoint import dataset_of, read_model_file
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.foreign_checkpoints import read_checkpoint

PARKING = """
title: Parking garage
classes:
  Quiet: an empty parking garage
  Theft: someone breaking into a car
  Protest: people shouting and holding signs
fps: 25
"""
SMALL = ["--clip", "toy", "--embed-dim", WIDTH, "--visual-width", WIDTH, "--visual-length", 32, "--attn-window", 8]


@pytest.fixture
def garage(tmp_path, monkeypatch):
    """The user's folder: a dataset file, features in class folders below train/ and test/, and a truth file."""
    monkeypatch.chdir(tmp_path)
    Path("parking.yaml").write_text(PARKING)
    rng = np.random.default_rng(0)
    truth = ["video,frames,label,start,end"]
    for split, count in (("train", 4), ("test", 2)):
        for column, label in enumerate(("Quiet", "Theft", "Protest")):
            for number in range(count):
                name, snippets = f"{split}_{label.lower()}{number}", 20 + 3 * number
                rows = rng.normal(size=(snippets, WIDTH))
                rows[5:12, column] += 6 * (column > 0)
                folder = Path("features", split, label)
                folder.mkdir(parents=True, exist_ok=True)
                for crop in (0, 5):
                    np.save(folder / f"{name}__{crop}.npy", rows.astype(np.float16))
                if split == "test":
                    bounds = "80,192" if column else ","
                    truth.append(f"{name},{16 * snippets + 7},{label},{bounds}")
    Path("truth.csv").write_text("\n".join(truth) + "\n")
    return tmp_path


def run(*argv):
    return quietly(main, strings(argv))


def lists(*more):
    return run("lists", "--dataset", "parking.yaml", "--features", "features", "--output", "list", *more)


def train(*more):
    flags = [*SMALL, *SCHEDULE_FLAGS, "--output-dir", "runs/parking", "--device", "cpu"]
    return run("train", "--dataset", "parking.yaml", *flags, *more)


def test_from_features_to_an_exported_model(garage):
    done = lists("--annotations", "truth.csv")
    assert done.code == 0, done
    assert {path.name for path in Path("list").iterdir()} == {
        *("parking_train.csv", "parking_test.csv", "parking_truth.csv"),
        *("gt_parking.npy", "gt_segment_parking.npy", "gt_label_parking.npy"),
    }
    # The truth that is written holds what the given one says.
    dataset = read_dataset("parking.yaml")
    assert read_annotations("list/parking_truth.csv", dataset) == read_annotations("truth.csv", dataset)
    # Every crop of 4 videos of 3 classes; a class whose name has "test" in it is still a class.
    assert len(Path("list/parking_train.csv").read_text().splitlines()) == 1 + 4 * 3 * 2
    assert Path("list/parking_train.csv").read_text().count(",Protest") == 8
    done = train("--gt-path", "list/parking_truth.csv")
    assert done.code == 0, done
    assert "Parking garage: 24 training rows, 6 test videos" in done.out
    assert Path("model/model_parking.pth").is_file() and Path("runs/parking/metrics.json").is_file()

    flags = ["--method", "clipfusionvad", "--gt-path", "list/parking_truth.csv", "--metrics-json", "m.json"]
    done = run("test", "--dataset", "parking.yaml", *flags, "--output-dir", "tested")
    assert done.code == 0, done
    assert "warning" not in done.err
    metrics = json.loads(Path("m.json").read_text())
    assert metrics == json.loads(Path("runs/parking/metrics.json").read_text())["best"]
    assert {"auc1", "map", "mauc"} <= metrics.keys() and set(metrics["per_class"]) == {"Theft", "Protest"}

    done = run("export", "model/model_parking.pth", "--output", "exported.pth")
    assert done.code == 0 and "parking" in done.out
    assert any(key.startswith("clipmodel.") for key in read_checkpoint("exported.pth", "model"))
    # The run's options are a config again.
    done = train("--config", "runs/parking/options.yaml", "--use-checkpoint", "--max-epoch", 3)
    assert done.code == 0, done


def test_a_model_stores_its_classes_and_refuses_others(garage):
    lists("--annotations", "truth.csv")
    train("--gt-path", "list/parking_truth.csv", "--max-epoch", 1)
    Path("parking.yaml").write_text(PARKING.replace("Protest", "Fire"))
    done = run("test", "--dataset", "parking.yaml", "--gt-path", "list/parking_truth.csv")
    assert done.code == 2 and "Protest" in done.err and done.err.count("\n") == 1
    Path("parking.yaml").unlink()
    stored = dataset_of(read_model_file("model/model_parking.pth"))
    assert stored.name == "parking" and stored.prompts[1] == "someone breaking into a car" and stored.normal == "Quiet"


def test_without_annotations_whole_videos_are_judged(garage):
    done = lists()
    assert done.code == 2 and "no annotation says when" in done.err and "--no-truth" in done.err
    assert not Path("list").exists()
    done = lists("--no-truth")
    assert done.code == 0 and {path.name for path in Path("list").iterdir()} == {
        "parking_train.csv",
        "parking_test.csv",
    }
    done = train()
    assert done.code == 2 and done.err.count("\n") == 1 and "gt_parking.npy" in done.err
    done = train("--gt-path", "none")
    assert done.code == 0, done
    best = json.loads(Path("runs/parking/metrics.json").read_text())["best"]
    assert {"auc1", "ap1"} <= best.keys() and "map" not in best
    done = run("test", "--dataset", "parking.yaml", "--gt-path", "none", "--output-dir", "tested")
    assert done.code == 0, done
    assert Path("tested/test_metrics.json").is_file()


def test_a_split_file_instead_of_folders(garage):
    Path("features/test").rename("features/more")
    Path("test_videos.txt").write_text("".join(f"{p.stem[:-3]}\n" for p in Path("features/more").rglob("*__0.npy")))
    done = lists("--annotations", "truth.csv", "--split", "test_videos.txt")
    assert done.code == 0 and len(Path("list/parking_test.csv").read_text().splitlines()) == 1 + 6


def test_several_folders_may_be_one_class(garage):
    text = "name: two\nclasses: {Quiet: nothing, Trouble: trouble}\naliases: {theft: Trouble, Protest: Trouble}\n"
    Path("parking.yaml").write_text(text)
    Path("truth.csv").write_text(re.sub("Theft|Protest", "Trouble", Path("truth.csv").read_text()))
    assert lists("--annotations", "truth.csv").code == 0
    assert Path("list/two_train.csv").read_text().count(",Trouble") == 16


def test_what_a_file_may_say(tmp_path):
    path = tmp_path / "shop.yml"
    path.write_text(
        PARKING
        + "name: till-7\nmulti_label: true\ntest_crop: 5\naliases: {night: Quiet}\nlabel_pattern: '^([A-Za-z]+)_'\n"
    )
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
        ("", "lines of the form"),
        ("- a\n- b\n", "lines of the form"),
        ("classes: {a: b", "not readable YAML"),
        ("clases: {a: b, c: d}", "did you mean 'classes'"),
        ("title: X\n", "two labels or more"),
        ("classes: {normal: calm}", "two labels or more"),
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
    path.write_text(text)
    with pytest.raises(UserError, match="own.yaml") as refused:
        read_dataset(path)
    assert says in str(refused.value)
    done = run("lists", "--dataset", path, "--features", tmp_path, "--output", tmp_path / "list")
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1


def test_a_file_that_is_not_there(tmp_path):
    for command in ("train", "test", "lists", "uncertainty"):
        more = ["--features", "f", "--output", "o"] if command == "lists" else []
        done = run(command, "--dataset", tmp_path / "none.yaml", *more)
        assert done.code == 2 and "dataset file not found" in done.err, done
