"""A method defined outside the package trains, tests and scores through the ordinary programs.

It has one branch, no classes, no text and none of the other methods' options.
"""

from __future__ import annotations

import json
from typing import Annotated

import numpy as np
import pytest
from tiny import LENGTH, WIDTH, make_tiny, quietly, strings
from torch import nn

import ucf_test
import ucf_train
from clipfusionvad import create_model, load_weights, models
from clipfusionvad.io.option import size
from clipfusionvad.losses import coarse_mil_loss
from clipfusionvad.models import Method, register_method
from clipfusionvad.models.base import Scores, VADOutput, VisualLength, VisualWidth


class SnippetClassifier(Method):
    """A perceptron on each snippet."""

    name = "perceptron"

    def __init__(
        self,
        classes,
        *,
        visual_length: VisualLength = 256,
        visual_width: VisualWidth = 512,
        hidden: Annotated[int, size("hidden units")] = 32,
    ):
        super().__init__()
        self.visual_length, self.visual_width = visual_length, visual_width
        self.layers = nn.Sequential(nn.Linear(visual_width, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, visual, lengths=None):
        return VADOutput(self.layers(visual))

    def losses(self, output, targets, lengths):
        return {"coarse": coarse_mil_loss(output.coarse_logits, targets, lengths)}

    def scores(self, output):
        return Scores((output.coarse_logits.sigmoid().squeeze(-1),))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Known for the length of a test."""
    monkeypatch.setitem(models._METHODS, SnippetClassifier.name, None)
    register_method(SnippetClassifier)


def test_train_test_and_score_through_the_command_line(tmp_path):
    tiny = make_tiny("ucf", tmp_path / "data")
    paths = ["--feature-root", tiny.folder, "--test-list", tiny.test_list, "--model-path", tmp_path / "model.pth"]
    paths += ["--gt-path", tiny.folder / "truth.csv", "--visual-length", LENGTH, "--visual-width", WIDTH]
    common = strings(["--method", "perceptron", "--clip", "toy", "--embed-dim", WIDTH, "--hidden", 16], paths)
    training = strings(
        ["--train-list", tiny.train_list, "--output-dir", tmp_path / "run", "--max-epoch", 3, "--batch-size", 4],
        ["--checkpoint-path", tmp_path / "checkpoint.pth", "--lr", 0.01],
    )
    trained = quietly(ucf_train.main, common + training)
    assert trained.code == 0, trained.err
    tested = quietly(ucf_test.main, [*common, "--metrics-json", str(tmp_path / "m.json")])
    assert tested.code == 0, tested.err

    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics.keys() == {"auc1", "ap1", "ano_auc1", "per_class"}
    assert metrics["auc1"] == json.loads((tmp_path / "run" / "metrics.json").read_text())["best"]["auc1"]
    losses = np.genfromtxt(tmp_path / "run" / "losses.csv", delimiter=",", names=True)["loss"]
    assert losses[-1] < losses[0]

    model = create_model("perceptron", ["a", "b"], "toy", visual_length=LENGTH, visual_width=WIDTH, hidden=16)
    load_weights(model, tmp_path / "model.pth")
    anomaly, classes = model.score_video(np.zeros((70, WIDTH), np.float32))
    assert anomaly.shape == (70,) and classes is None


def test_its_options_are_its_own(tmp_path):
    assert "unknown argument '--hidden'" in quietly(ucf_train.main, ["--method", "vadclip", "--hidden", "3"]).err
    assert (
        "unknown argument '--attn-window'"
        in quietly(ucf_test.main, ["--method", "perceptron", "--attn-window", "3"]).err
    )
