"""Files that version 0.1.0 (commit 1eeca1f) wrote are read, and give the numbers that it printed: tests/data/old/."""

import base64
import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import package_main, quietly, strings

from clipfusionvad import load_model
from clipfusionvad.data.features import load_video
from clipfusionvad.data.lists import add_streams, read_list
from clipfusionvad.report.scores import read_scores

OLD = Path(__file__).resolve().parents[1] / "data" / "old"
EXPECTED = json.loads((OLD / "expected.json").read_text())
BRANCH_METRICS = ("auc1", "ap1", "auc2", "ap2")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    packed = base64.b64decode((OLD / "old.tar.xz.base64").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def old(unpacked, tmp_path, monkeypatch):
    """The current folder: a copy of the old files, which a test may change."""
    shutil.copytree(unpacked, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def run(*words, code=0):
    outcome = quietly(package_main, strings(words))
    assert outcome.code == code, outcome.err + outcome.out
    return outcome


def metrics_of(name, *more):
    data = "wide" if EXPECTED["models"][name]["width"] == 32 else "data"
    flags = ["--clip", "toy", "--test-list", f"{data}/test.csv", "--gt-path", f"{data}/truth.csv", "--device", "cpu"]
    run("test", "--dataset", "ucf", "--model-path", f"models/{name}.pth", *flags, "--metrics-json", "m.json", *more)
    return json.loads(Path("m.json").read_text())


def assert_same(found, expected, tolerance=1e-6):
    """Every expected metric is there with the same value; new metrics may be added."""
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[key], value, tolerance)
        else:
            assert found[key] == pytest.approx(value, abs=tolerance), key


def flags_of(options):
    """The command line that gives these recorded options."""
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            if name not in ("demo", "overwrite"):
                yield f"--{flag}" if value else f"--no-{flag}"
        elif value is not None:
            yield from [f"--{flag}", *(value if isinstance(value, list) else [value])]


@pytest.mark.parametrize("name", EXPECTED["models"])
def test_a_model_file_gives_the_old_metrics(old, name):
    expected = EXPECTED["models"][name]
    found = metrics_of(name, "--method", expected["method"], *expected["flags"], "--output-dir", "tested")
    assert_same(found, expected["metrics"])
    # In Python too, with its CLIP: it holds no text features yet.
    model = load_model(f"models/{name}.pth", device="cpu")
    entries = read_list("wide/test.csv" if expected["width"] == 32 else "data/test.csv")
    if len(model.streams) > 1:
        entries = add_streams(entries, ["features", "events"], "test.csv")
    for entry, video in zip(entries, read_scores("tested/test_scores.npz").scores, strict=True):
        np.testing.assert_allclose(model.score_video(load_video(entry.paths))[0], video.anomaly[0], atol=1e-5)


def test_an_interrupted_training_goes_on_to_the_old_result(old):
    options = yaml.safe_load(Path("runs/interrupted/options.yaml").read_text())
    run("train", "--use-checkpoint", *flags_of(options))
    with open("runs/interrupted/losses.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(losses, EXPECTED["resumed"]["losses"], rtol=1e-3)
    best = json.loads(Path("runs/interrupted/metrics.json").read_text())["best"]
    assert_same({key: best[key] for key in BRANCH_METRICS}, EXPECTED["resumed"]["metrics"], tolerance=0.02)


def test_a_packed_store_is_used(old):
    expected = EXPECTED["models"]["finished"]
    shutil.rmtree("data/features")
    metrics = metrics_of("finished", "--test-list", "packed/test.csv", "--no-check")
    assert_same(metrics, expected["metrics"])
    options = yaml.safe_load(Path("runs/finished/options.yaml").read_text())
    options |= {name: options[name].replace("data", "packed") for name in ("train_list", "test_list", "gt_path")}
    run("train", *flags_of(options | {"output_dir": "again", "model_path": "again.pth", "check": False}))
    new, before = (np.genfromtxt(Path(run, "losses.csv"), delimiter=",")[1:] for run in ("again", "runs/finished"))
    np.testing.assert_allclose(new, before, rtol=1e-3, atol=1e-6)


def test_an_interrupted_sweep_trains_only_what_is_missing(old):
    finished = Path("sweep/full/seed1/losses.csv")
    before = finished.stat().st_mtime
    options = yaml.safe_load(Path("sweep/full/seed1/options.yaml").read_text())
    for name in ("output_dir", "model_path", "checkpoint_path", "seed", "method"):
        options.pop(name, None)
    run("sweep", "cells.yaml", "--seeds", 1, 2, "--jobs", 1, "--output-dir", "sweep", *flags_of(options))
    assert finished.stat().st_mtime == before
    with open("sweep/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["cell"], int(row["seed"]), row["state"]) for row in rows] == [
        (row["cell"], row["seed"], "done") for row in EXPECTED["sweep"]
    ]
    for row, expected in zip(rows, EXPECTED["sweep"], strict=True):
        assert_same({key: float(row[key]) for key in BRANCH_METRICS}, {k: expected[k] for k in BRANCH_METRICS}, 0.02)


def test_folders_are_reported_compared_checked_and_repeated(old):
    auc = f"{100 * EXPECTED['models']['finished']['metrics']['auc1']:.2f}"
    run("report", "runs/finished")
    assert auc in Path("runs/finished/report.html").read_text()
    table = run("table", "runs/finished", "runs/seeds", "runs/test", "sweep", "--bootstrap", 0).out
    assert auc in table and f"{100 * EXPECTED['seeds']['auc1']:.2f}" in table
    run("doctor", "--run", "runs/finished", "--only", "run", "--json", "found.json")
    assert not [item for item in json.loads(Path("found.json").read_text())["findings"] if item["level"] == "error"]
    # Code and processor differ: rounding may swap two snippets, which moves a metric of so few videos by hundredths.
    shutil.copy("models/finished.pth", "finished.pth")
    for folder in ("runs/finished", "runs/test"):
        assert "match" in run("rerun", folder, "--tolerance", 0.05).out
