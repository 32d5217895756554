"""Checkpoints as people bring them: wrapped, prefixed, of another program, to start from; and folders of runs."""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from refusal import assert_refused
from tiny import make_tiny, package_main, quietly, strings

from clipfusionvad import load_weights
from clipfusionvad.engine.checkpoint import read_model_file


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny benchmark with a trained model, never written to."""
    tiny = make_tiny("ucf", tmp_path_factory.mktemp("data") / "tiny").at(tmp_path_factory.mktemp("trained"))
    assert tiny.train().code == 0
    return tiny


@pytest.fixture
def work(trained, tmp_path):
    return trained.at(tmp_path)


def weights_of(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


def prefixed(prefix):
    return lambda state: {prefix + key: value for key, value in state.items()}


FORMS = {
    "DataParallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both in a wrapper": lambda state: {"model": prefixed("module._orig_mod.")(state), "epoch": 3},
    "an attribute": prefixed("model.net."),
    "a part compiled": lambda state: {k.replace("temporal.", "temporal._orig_mod."): v for k, v in state.items()},
    "Lightning": lambda state: {"state_dict": prefixed("model.")(state), "epoch": np.int64(3), "best": np.float64(0.5)},
    "a wrapper of another name, numpy arrays": lambda state: {"net_g": {k: v.numpy() for k, v in state.items()}},
    "beside objects": lambda state: {
        "model": state,
        "args": argparse.Namespace(lr=1e-5),
        "from": Path("a"),
        "x": defaultdict(list),
    },
    "wrapped twice": lambda state: {"checkpoint": {"net": state, "ap": np.float32(1)}, "optimizer": {}},
}


@pytest.mark.parametrize("form", FORMS)
def test_usual_forms_of_a_state_dict_are_read(form, trained, work, tmp_path):
    state = weights_of(trained.work / "model.pth")
    torch.save(FORMS[form](state), tmp_path / "theirs.pth")
    file = read_model_file(tmp_path / "theirs.pth")
    assert file.method == "clipfusionvad" and file.state.keys() == state.keys()
    flags = ["--model-path", tmp_path / "theirs.pth", "--metrics-json", tmp_path / "theirs.json"]
    assert work.test(*flags).code == 0
    assert work.test("--model-path", trained.work / "model.pth", "--metrics-json", tmp_path / "ours.json").code == 0
    assert (tmp_path / "theirs.json").read_text() == (tmp_path / "ours.json").read_text()


def test_what_cannot_be_told_is_named(trained, work, tmp_path):
    state = weights_of(trained.work / "model.pth")
    torch.save({"teacher": state, "student": state, "epoch": 3}, tmp_path / "both.pth")
    says = "holds several state dicts: save one of teacher, student"
    assert_refused(work.test, work, "--model-path", tmp_path / "both.pth", says=says)
    torch.save({"epoch": 3, "args": {"lr": 1e-5}}, tmp_path / "none.pth")
    assert_refused(
        work.test, work, "--model-path", tmp_path / "none.pth", says="no state dict: its keys are epoch, args"
    )
    torch.save(prefixed("a.")(state) | {"b.extra": torch.ones(1)}, tmp_path / "two.pth")
    assert_refused(work.test, work, "--model-path", tmp_path / "two.pth", says="unknown a.")


def test_a_training_checkpoint_with_numpy_numbers_is_resumed_and_not_replaced(trained, work, tmp_path):
    """As the original code saves it: ``ap`` comes from scikit-learn."""
    ours = torch.load(trained.work / "run/last.pt", weights_only=True)
    path = tmp_path / "theirs.pth"
    content = {"epoch": 0, "model_state_dict": prefixed("module.")(ours["model_state_dict"]), "ap": np.float64(0.25)}
    torch.save(content | {"optimizer_state_dict": {"state": {}, "param_groups": []}}, path)
    before = path.read_bytes()
    done = work.train("--use-checkpoint", "--checkpoint-path", path)
    assert done.code == 0, done.err
    assert (
        "resuming from" in done.out
        and f"{path} was not written by this program, or is damaged, and is not replaced" in done.out
    )
    assert path.read_bytes() == before and (tmp_path / "run/last.pt").is_file()
    for flag in ("--model-path", "--checkpoint-path"):
        assert_refused(work.train, work, "--overwrite", flag, path, says=(str(path), "is not replaced", flag))
    flags = ["--use-checkpoint", "--checkpoint-path", path, "--output-dir", tmp_path / "new", "--max-epoch", 1]
    done = work.train(*flags, "--model-path", tmp_path / "tested.pth")
    assert done.code == 0 and (tmp_path / "new/report.html").is_file(), done.err
    flags = ["--model-path", path, "--metrics-json", path]
    assert_refused(work.test, work, *flags, says=f"{path} is not a text file and is not replaced")
    notes = tmp_path / "notes.json"
    notes.write_text("my notes")
    assert_refused(work.train, work, "--overwrite", "--metrics-json", notes, says="notes.json")


def test_the_folder_of_a_run_is_its_best_model(trained, work, tmp_path):
    run = trained.work / "run"
    assert read_model_file(run).path == str(run / "best.pt")
    model_flags = ["--model-path", run, "--metrics-json", tmp_path / "folder.json", "--output-dir", tmp_path / "test"]
    assert work.test(*model_flags).code == 0
    assert quietly(package_main, strings(["export", run, "--output", tmp_path / "model.safetensors"])).code == 0
    (tmp_path / "empty").mkdir()
    assert_refused(work.test, work, "--model-path", tmp_path / "empty", says="holds no weights, neither best.pt nor")
    near = trained.work / "modell.pth"
    assert_refused(work.test, work, "--model-path", near, says=("model file not found", "'model.pth'"))
    assert_refused(work.test, work, "--model-path", "nowhere/x.pth", says="training writes it")


def test_the_file_says_its_method(tmp_path):
    tiny = make_tiny("ucf", tmp_path / "data").of("vadclip").at(tmp_path)
    assert tiny.train("--max-epoch", 1).code == 0
    other = make_tiny("ucf", tmp_path / "other").at(tmp_path / "work")
    flags = other.test_flags("--model-path", tmp_path / "model.pth")
    place = flags.index("--method") if "--method" in flags else None
    argv = flags if place is None else flags[:place] + flags[place + 2 :]
    done = quietly(package_main, ["test", "--dataset", "ucf", *argv])
    assert done.code == 0 and "vadclip on UCF-Crime" in done.out


def test_a_training_starts_from_the_weights_of_a_model(trained, work, tmp_path):
    path, first = trained.work / "model.pth", tmp_path / "first.pt"
    original = weights_of(path)
    done = work.train("--init-from", path, "--lr", 1e-12, "--max-epoch", 1)
    assert done.code == 0 and f"weights of {path}" in done.out, done.err
    for key, value in weights_of(tmp_path / "run/last.pt").items():
        if value.is_floating_point() and "running" not in key:
            torch.testing.assert_close(value, original[key], rtol=0, atol=1e-6)
    assert f"init_from: {path}" in (tmp_path / "run/options.yaml").read_text()
    with open(tmp_path / "run/data.csv") as file:
        assert any(row["part"] == "init_from" and row["sha256"] for row in csv.DictReader(file))
    # Another window: what it sizes is named and stays initial; the rest comes from the file.
    done = work.train("--init-from", trained.work / "run", "--visual-length", 64, "--overwrite", "--max-epoch", 1)
    assert done.code == 0, done.err
    assert "initial values of frame_position_embeddings.weight" in done.out
    torch.save(prefixed("module.")(original), first)
    assert_refused(work.train, work, "--overwrite", "--init-from", first, "--visual-layers", 2, says="missing temporal")


def test_another_dataset_keeps_the_weights_of_its_classes(tmp_path):
    """Learned prompts of each class are those of its own classes, also where there are as many."""
    first = make_tiny("ucf", tmp_path / "ucf").of("anomalyclip").at(tmp_path / "first")
    second = make_tiny("xd", tmp_path / "xd").of("anomalyclip").at(tmp_path / "second")
    assert first.train("--max-epoch", 1).code == 0
    done = second.train("--max-epoch", 1, "--init-from", first.work / "model.pth")
    assert done.code == 0, done.err
    said = next(line for line in done.out.splitlines() if line.startswith("weights of"))
    assert "initial values of" in said and "prompt_learner.ctx" in said
    assert np.isfinite(list(load_losses(second.work / "run/losses.csv"))).all()


def load_losses(path):
    with open(path) as file:
        yield from (float(row["loss"]) for row in csv.DictReader(file))


def test_weights_load_from_a_run_folder_in_python(trained):
    from clipfusionvad import create_model
    from clipfusionvad.datasets import UCF

    options = read_model_file(trained.work / "run").hparams["options"]
    model = create_model("clipfusionvad", UCF.prompts, clip="toy", **options)
    load_weights(model, trained.work / "run")
