"""Exported files as users go on with them, and methods that cannot be exported."""

import importlib
import json
import sys

import numpy as np
import onnxruntime
import pytest
from made_videos import write_video
from small_detect import detect, write_model
from tiny import Tiny, make_tiny, quietly, strings

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.io.errors import UserError, error_line
from clipfusionvad.tools.export.forms import TrainedModel, form_of
from clipfusionvad.tools.export.graph import TOLERANCE, run_onnx
from clipfusionvad.tools.export.scorer import random_video


def run(*argv):
    return quietly(package_main, strings(argv))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Test data with a model file, and the same model as safetensors; never written to."""
    tiny = make_tiny("ucf", tmp_path_factory.mktemp("data"))
    write_model(tiny.work / "model.pth", tiny.method)
    done = run("export", tiny.work / "model.pth", "--output", tiny.work / "model.safetensors")
    assert done.code == 0, done.err
    return tiny


@pytest.mark.parametrize("command", ["test", "detect", "insight"])
def test_commands_read_safetensors_like_the_checkpoint(command, place: Tiny, tmp_path):
    video = write_video(tmp_path / "video.mp4", 40) if command == "detect" else None
    data = ["--test-list", place.test_list, "--gt-path", place.folder / "truth.csv", "--device", "cpu"]
    found = []
    for name in ("model.pth", "model.safetensors"):
        model, out = place.work / name, tmp_path / name
        match command:
            case "test":
                written = tmp_path / f"{name}.json"
                done = place.test("--model-path", model, "--metrics-json", written)
            case "detect":
                written = out / "video.csv"
                done = detect([video, "--checkpoint", model, "--output", out, "--device", "cpu", "--video", "none"])
            case _:
                written = tmp_path / f"{name}.csv"
                done = run("insight", "gates", model, "--output", tmp_path / f"{name}.png", *data)
        assert done.code == 0, done.err
        found.append(written.read_text())
    assert found[0] == found[1] and len(found[0].splitlines()) > 1


@pytest.mark.slow
def test_a_released_file_becomes_onnx(tmp_path):
    model = write_model(tmp_path / "model.pth", "vadclip")
    assert run("export", tmp_path / "model.pth", "--output", tmp_path / "released.pth").code == 0
    sizes = {"embed-dim": 64, "visual-width": 64, "visual-length": 32, "attn-window": 8, "visual-layers": 1}
    sizes |= {"prompt-prefix": 2, "prompt-postfix": 2}
    (tmp_path / "sizes.yaml").write_text("".join(f"{name}: {size}\n" for name, size in sizes.items()))
    flags = ["--method", "vadclip", "--dataset", "ucf", "--config", tmp_path / "sizes.yaml", "--clip", "toy"]
    done = run("export", tmp_path / "released.pth", *flags, "--output", tmp_path / "m.onnx")
    assert done.code == 0, done.err
    (streams,) = random_video(model, 70)
    anomaly, classes = model.score_video(streams.numpy())
    found = run_onnx((tmp_path / "m.onnx").read_bytes(), None)({"features": streams.numpy()})
    np.testing.assert_allclose(found["anomaly"], anomaly, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found["classes"], classes, rtol=0, atol=TOLERANCE)
    about = onnxruntime.InferenceSession(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(about["clipfusionvad"])["method"] == "vadclip"


METHOD = """
import torch
from clipfusionvad.models import Method
from clipfusionvad.models.base import Scores, VADOutput

class Odd(Method):
    name = "odd"

    def __init__(self):
        super().__init__()
        self.visual_length, self.visual_width = 4, 8
        self.layer = torch.nn.Linear(8, 1)

    def forward(self, visual, lengths=None):
        x = self.layer(visual)
        {line}
        return VADOutput(x)

    def losses(self, output, targets, lengths):
        raise NotImplementedError

    def scores(self, output):
        return Scores((output.coarse_logits.sigmoid().squeeze(-1),))
"""
# A line that torch cannot follow, the form, and what the message names.
UNTRACEABLE = {
    "x = torch.from_numpy(x.numpy())": (".pt2", "line {number} of odd_method.py (x = torch.from_numpy(x.numpy()))"),
    "x = x if x.mean() > 0 else -x": (".onnx", "line {number} of odd_method.py (x = x if x.mean() > 0 else -x)"),
    "x = torch.special.i1(x)": (".onnx", "bessel_i1"),
}


@pytest.mark.parametrize("line", UNTRACEABLE)
def test_what_cannot_be_followed_is_one_line_that_names_it(line, tmp_path, monkeypatch, capfd):
    suffix, named = UNTRACEABLE[line]
    program = METHOD.format(line=line)
    (tmp_path / "odd_method.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_method", raising=False)
    importlib.invalidate_caches()
    model = importlib.import_module("odd_method").Odd()
    path = tmp_path / f"m{suffix}"
    with pytest.raises(UserError, match="odd cannot be exported") as refused:
        form_of(path).write(path, TrainedModel(model, None, {}, None))
    message = error_line(refused.value)
    number = program.splitlines().index(f"        {line}") + 1
    assert named.format(number=number) in message and len(message) < 500
    assert capfd.readouterr() == ("", "")
    assert not path.exists()


def test_no_memory_is_not_taken_for_a_bad_operation(tmp_path, monkeypatch):
    def full(scorer):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    write_model(tmp_path / "model.pth", "iefvad")
    monkeypatch.setattr("clipfusionvad.tools.export.graph.export_program", full)
    done = run("export", tmp_path / "model.pth", "--output", tmp_path / "m.pt2")
    assert done.code == 2 and done.err.startswith("error: more memory is needed") and done.err.count("\n") == 1
