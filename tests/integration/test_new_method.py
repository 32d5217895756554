"""A method is one file: the files that docs/methods.md prints work as printed, and options do not leak."""

import functools
import importlib
import inspect
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import METHOD_FLAGS, make_tiny, method_flags, package_main, quietly, strings

from clipfusionvad import create_model, load_weights, models
from clipfusionvad.cli.options import build_parser
from clipfusionvad.datasets import DATASETS
from clipfusionvad.io.option import non_negative
from clipfusionvad.losses import valid_mask
from clipfusionvad.models import find_method, method_names
from clipfusionvad.models.layers.dual_branch import DualBranch
from clipfusionvad.report.table import RANKING

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
SECTIONS = {"perceptron": "## Add a method", "smoothfusion": "## Change the loss"}


@pytest.fixture
def tiny(tmp_path):
    return make_tiny("ucf", tmp_path / "data").at(tmp_path)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Put a file of the page beside the methods, for the length of a test."""

    def add(name):
        code = PAGE.split(f"{SECTIONS[name]}\n")[1].split("```python\n")[1].split("```")[0]
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
        monkeypatch.setitem(models._METHODS, name, None)
        monkeypatch.delitem(sys.modules, f"clipfusionvad.models.{name}", raising=False)
        importlib.import_module(f"clipfusionvad.models.{name}")
        monkeypatch.setitem(METHOD_FLAGS, name, method_flags(name))

    return add


def losses_of(run):
    return np.genfromtxt(run / "losses.csv", delimiter=",", names=True)


def test_a_method_from_one_file_trains_tests_sweeps_exports_and_scores(added, tiny, tmp_path):
    added("perceptron")
    tiny = tiny.of("perceptron")
    trained = tiny.train("--hidden", 16, "--max-epoch", 3)
    assert trained.code == 0, trained.err
    losses = losses_of(tmp_path / "run")["loss"]
    assert losses[-1] < losses[0]
    tested = tiny.test("--metrics-json", tmp_path / "m.json")
    assert tested.code == 0, tested.err
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics.keys() == {*(f"{name}1" for name in RANKING), "per_class"}
    assert metrics["auc1"] == json.loads((tmp_path / "run" / "metrics.json").read_text())["best"]["auc1"]

    model = create_model("perceptron", ["a", "b"], visual_length=32, visual_width=64, hidden=16)
    load_weights(model, tmp_path / "model.pth")
    anomaly, classes = model.score_video(np.zeros((70, 64), np.float32))
    assert anomaly.shape == (70,) and classes is None

    exported = quietly(package_main, strings(["export", tmp_path / "model.pth", "--output", tmp_path / "model.onnx"]))
    assert exported.code == 0, exported.err
    (tmp_path / "grid.yaml").write_text("grid:\n  hidden: [4, 8]\n")
    sweep = ["sweep", tmp_path / "grid.yaml", "--dataset", "ucf", "--seeds", 1, "--output-dir", tmp_path / "sweep"]
    flags = tiny.test_flags("--train-list", tiny.train_list, "--max-epoch", 1, "--batch-size", 3)
    flags = [flag for flag in flags if flag not in ("--model-path", str(tmp_path / "model.pth"))]
    swept = quietly(package_main, strings(sweep, flags))
    assert swept.code == 0, swept.err


def test_its_options_are_its_own(added):
    added("perceptron")
    for method, flag, value, says in (
        ("vadclip", "--hidden", "3", "--hidden is an option of perceptron, not of vadclip"),
        ("perceptron", "--attn-window", "3", "--attn-window is an option of "),
        ("perceptron", "--hidden", "0", "--hidden: must be a positive whole number, got '0'"),
    ):
        done = quietly(package_main, ["train", "--dataset", "ucf", "--method", method, flag, value])
        assert done.code == 2 and says in done.err


def test_a_loss_term_from_one_file_is_trained_and_recorded(added, tiny, tmp_path):
    added("smoothfusion")
    trained = tiny.of("smoothfusion").train("--smooth-weight", 0.5)
    assert trained.code == 0, trained.err
    losses = losses_of(tmp_path / "run")
    assert (losses["smooth"] > 0).all()
    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.value for event in curves.Scalars("train/smooth")] == pytest.approx(losses["smooth"])

    options = {"embed_dim": 64, "visual_width": 64, "visual_length": 16, "smooth_weight": 0.5}
    model = create_model("smoothfusion", ["normal", "fire"], clip="toy", **options).eval()
    targets, lengths = torch.eye(2), torch.tensor([16, 3])
    with torch.no_grad():
        output = model(torch.randn(2, 16, 64), lengths)
        scores = torch.sigmoid(output.coarse_logits)[..., 0].tolist()
        jumps = [(b - a) ** 2 for row, n in zip(scores, (16, 3), strict=True) for a, b in itertools.pairwise(row[:n])]
        terms = model.losses(output, targets, lengths)
    assert terms["smooth"].item() == pytest.approx(0.5 * sum(jumps) / len(jumps), rel=1e-4)
    assert valid_mask(lengths, 16).sum(1).tolist() == [16, 3]


def test_an_option_added_to_a_base_class_breaks_no_other_method(monkeypatch):
    original = DualBranch.__init__

    @functools.wraps(original)
    def with_option(self, *args, made_up_weight=1.0, **options):
        original(self, *args, **options)

    option = inspect.Parameter("made_up_weight", inspect.Parameter.KEYWORD_ONLY, default=1.0)
    signature = inspect.signature(original)
    with_option.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])
    hint = {"made_up_weight": Annotated[float, non_negative("weight of the coarse loss")]}
    with_option.__annotations__ = original.__annotations__ | hint
    before = {name: find_method(name).option_names() for name in method_names()}
    monkeypatch.setattr(DualBranch, "__init__", with_option)
    for name, old in before.items():
        method = find_method(name)
        takes_it = {"made_up_weight", "shared"} & inspect.signature(method).parameters.keys()
        new = {"made_up_weight"} if issubclass(method, DualBranch) and takes_it else set()
        assert set(method.option_names()) == {*old, *new}
        for dataset in DATASETS.values():
            shown = build_parser(dataset, method).format_help()
            assert ("--made-up-weight" in shown) == ("made_up_weight" in method.option_names())
