"""Exported graphs against the way that a test goes, for every method; the command's files, cards and refusals."""

import io
import json
import os
import re
import runpy
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_detect import write_model
from tiny import METHOD_FLAGS, make_tiny, quietly, skip_without_packages, small_options, strings

from clipfusionvad import create_model
from clipfusionvad.__main__ import main as package_main
from clipfusionvad.data.sampling import GridSampling, WindowSampling
from clipfusionvad.datasets import DATASETS
from clipfusionvad.engine.checkpoint import read_model_file
from clipfusionvad.io.errors import UserError, error_line
from clipfusionvad.models import find_method
from clipfusionvad.tools import export as exporting
from clipfusionvad.tools.export import GRAPHS, TOLERANCE, VideoScorer, random_video, run_onnx, score_by_method

WIDTHS = {"embed_dim": 64, "visual_width": 64}
WINDOWS = {**WIDTHS, "visual_length": 16, "attn_window": 8, "visual_layers": 1}
GRID = {**WIDTHS, "num_segments": 4, "seg_length": 4, "emb_size": 16, "heads": 2}
PAPER = {**WIDTHS, "visual_length": 16, "prompt_encoder": "toy"}
STREAMS = {"visual_width": 64, "visual_length": 16, "visual_head": 4, "visual_layers": 1, "num_refinement_steps": 2}
# Around one window of 16 and of 256 snippets, and the longest video of the four datasets.
LENGTHS = [1, 15, 16, 17, 255, 256, 257, 6749]
# A case per method and variant, by graph; each with the classes of one dataset.
MODELS = {
    "fusion": ("clipfusionvad", "ucf", WINDOWS),
    "plain": ("vadclip", "xd", {**WINDOWS, "visual_length": 256, "attn_window": 64}),
    "paper": ("reflipvad", "shanghaitech", PAPER),
    "repo": ("reflipvad_repo", "ucf", {**WINDOWS, "prompt_encoder": "toy"}),
    "grid": ("anomalyclip", "msad", GRID),
    "concat": ("anomalyclip", "xd", {**GRID, "concat_features": True}),
    "gaussian": ("iefvad", "ucf", {**STREAMS, "noise_model": "gaussian"}),
    "student_t": ("iefvad", "xd", {**STREAMS, "noise_model": "student_t"}),
}


def small(method):
    own = find_method(method).option_names()
    return {key: value for key, value in (WIDTHS | small_options(method)).items() if key in own}


# Of the other methods one each.
MODELS |= {
    method: (method, "ucf", small(method))
    for method in METHOD_FLAGS
    if method not in {name for name, *_ in MODELS.values()}
}
OTHERS = {
    "no graph, gam, product": ("clipfusionvad", "xd", {**WINDOWS, "graph": False, "gam": False, "product": False}),
    "fixed prompts": ("clipfusionvad", "msad", {**WINDOWS, "prompts": "fixed", "aggregator": False}),
    "wider, longer": ("vadclip", "ucf", {**WINDOWS, "visual_length": 24, "attn_window": 12, "visual_layers": 3}),
    "heads": ("clipfusionvad", "shanghaitech", {**WINDOWS, "visual_head": 4, "similarity_graph": False}),
    "no glimpse": ("reflipvad", "xd", {**PAPER, "glimpse": False, "product": False}),
    "odd windows": ("reflipvad", "msad", {**PAPER, "visual_length": 15, "glimpse_window": 4}),
    "plain grid": ("anomalyclip", "xd", {**GRID, "depth": 2, "num_segments": 3, "num_topk": 2}),
    "no recentring": ("anomalyclip", "ucf", {**GRID, "recentre": False, "temporal": "mlp"}),
    "direct, magnitude": ("anomalyclip", "ucf", {**GRID, "prompts": "direct", "selection": "magnitude"}),
    "short": ("anomalyclip", "xd", {**GRID, "temporal": "short"}),
    "long": ("anomalyclip", "xd", {**GRID, "temporal": "long", "prompts": "fixed"}),
    "mtn": ("anomalyclip", "shanghaitech", {**GRID, "temporal": "mtn"}),
    "more steps": ("iefvad", "ucf", {**STREAMS, "visual_layers": 3, "num_refinement_steps": 10, "mask_padding": True}),
    "mean": ("iefvad", "xd", {**STREAMS, "visual_layers": 0, "num_refinement_steps": 0, "fusion": "mean"}),
}


# Graphs take seconds each: those of ablations, and all of torch.export, are made where EXPORT=all.
SLOW = {case: pytest.mark.slow for case in MODELS if case != "grid"}
GRAPH_CASES = [(".pt2", "paper"), *(pytest.param(".onnx", case, marks=SLOW.get(case, ())) for case in MODELS)]
if os.environ.get("EXPORT") == "all":
    GRAPH_CASES = [(suffix, case) for suffix in GRAPHS for case in (*MODELS, *OTHERS)]


def build(case):
    method, dataset, options = (MODELS | OTHERS)[case]
    skip_without_packages(method)
    torch.manual_seed(0)
    model = create_model(method, DATASETS[dataset].prompts, clip="toy", **options).eval()
    with torch.no_grad():
        for name, value in model.named_buffers():
            if value.is_floating_point() and name.endswith(("running_mean", "running_var", "ncentroid")):
                value.copy_(0.1 + torch.rand(value.shape))
    return model


def expect_equal(run, model, lengths=LENGTHS):
    """Outputs of a graph against ``score_video`` and, for the other branches, ``score_windows``."""
    for count in lengths:
        streams = [stream.numpy() for stream in random_video(model, count)]
        found, wanted = run(streams), score_by_method(model, streams)
        assert list(found) == list(wanted)
        anomaly, classes = model.score_video(streams)
        tested = {"anomaly": anomaly} | ({} if classes is None else {"classes": classes})
        assert ("classes" in found) == (classes is not None)
        for name, value in [*wanted.items(), *tested.items()]:
            np.testing.assert_allclose(found[name], value, rtol=0, atol=TOLERANCE, err_msg=f"{name}, {count} snippets")


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_windows_of_tensors_equal_those_of_arrays(count, segments, frames):
    features = np.random.default_rng(count).standard_normal((count, 3)).astype(np.float32)
    for sampling in (WindowSampling(segments * frames), GridSampling(segments, frames)):
        windows, lengths = sampling.windows(features)
        for ours, other in zip(sampling.tensor_windows(torch.from_numpy(features)), (windows, lengths), strict=True):
            np.testing.assert_array_equal(ours.numpy(), other)
        rows = windows.reshape(-1, 3)
        for restored in (sampling.tensor_restore(torch.from_numpy(rows), count).numpy(), sampling.restore(rows, count)):
            np.testing.assert_array_equal(restored, features)


@pytest.mark.parametrize("case", [*MODELS, *OTHERS])
def test_the_scorer_scores_as_the_model_does_without_clip(case):
    model = build(case)
    before, scorer = model.state_dict().keys(), VideoScorer(model)
    with torch.inference_mode():
        expect_equal(lambda streams: scorer(*map(torch.from_numpy, streams)), model)
    assert not any("clipmodel" in name for name in scorer.state_dict())
    assert model.state_dict().keys() == before


@pytest.mark.parametrize(("suffix", "case"), GRAPH_CASES)
def test_a_graph_scores_as_the_model_does(suffix, case):
    model = build(case)
    to_bytes, load = GRAPHS[suffix]
    content = to_bytes(VideoScorer(model), {"x": 1})
    expect_equal(load(content), model)
    # The toy's table of tokens alone is more than that.
    assert len(content) < 49408 * 64
    if suffix == ".pt2":
        extra = {"clipfusionvad": ""}
        torch.export.load(io.BytesIO(content), extra_files=extra)
        assert json.loads(extra["clipfusionvad"]) == {"x": 1}


def export(*argv):
    return quietly(package_main, strings(["export", *argv]))


CARDS = {
    "m.onnx": ("iefvad", "(300,)", "| `rgb` (input) | (L, 64) |", "| `event` (input) | (L, 64) |"),
    "m.pt2": ("vadclip", "([300])", "| `features` (input) | (L, 64) |", "`anomaly_fine`", "| `classes` | (L, 14) |"),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_command_writes_a_graph_with_a_card_whose_example_runs(name, tmp_path, monkeypatch, capsys):
    method, printed, *rows = CARDS[name]
    model, path = write_model(tmp_path / "model.pth", method), tmp_path / "out" / name
    outcome = export(tmp_path / "model.pth", "--output", path)
    assert outcome.code == 0 and "largest difference from PyTorch" in outcome.out, outcome.err
    card = path.with_name(f"{name}.md").read_text()
    assert all(text in card for text in [*rows, "| `anomaly` | (L,) |", "Not measured", "- Robbery: "])
    monkeypatch.chdir(path.parent)
    exec(re.search(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL).group(1), {})
    assert printed in capsys.readouterr().out
    if name == "m.onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
        assert shapes == {"rgb": ["snippets", 64], "event": ["snippets", 64], "anomaly": ["snippets"]}
        about = json.loads(session.get_modelmeta().custom_metadata_map["clipfusionvad"])
        assert about["method"] == model.name and list(about["classes"]) == DATASETS["ucf"].labels


@pytest.mark.parametrize("method", METHOD_FLAGS)
def test_safetensors_bring_the_model_back_or_are_refused(method, tmp_path):
    skip_without_packages(method)
    write_model(tmp_path / "model.pth", method)
    assert (done := export(tmp_path / "model.pth", "--output", tmp_path / "m.safetensors")).code == 0, done.err
    before, after = read_model_file(tmp_path / "model.pth"), read_model_file(tmp_path / "m.safetensors")
    assert after.hparams == before.hparams and after.method == method
    assert after.state.keys() == before.state.keys()
    assert all(torch.equal(after.state[key], before.state[key]) for key in before.state)
    # As good as the checkpoint for every other command.
    assert export(tmp_path / "m.safetensors", "--output", tmp_path / "again.safetensors").code == 0
    whole = (tmp_path / "m.safetensors").read_bytes()
    assert (tmp_path / "again.safetensors").read_bytes() == whole
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (3, 20, len(whole) - 1)]
    for content in (*flipped, whole[:-7], b""):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="bad.safetensors"):
            read_model_file(tmp_path / "bad.safetensors")


def test_metrics_that_the_checkpoint_knows_are_in_the_card(tmp_path):
    write_model(tmp_path / "model.pth", "iefvad")
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    torch.save({**content, "metrics": {"auc1": 0.8125, "ap1": 0.25, "ano_auc1": 0.5}}, tmp_path / "model.pth")
    for step in ("model.pth", "m.safetensors"):
        assert export(tmp_path / step, "--output", tmp_path / "m.safetensors").code == 0
        card = (tmp_path / "m.safetensors.md").read_text()
        assert "81.25" in card and "25.00" in card and "Not measured" not in card
    torch.save({**content, "metrics": {"auc1": "high"}}, tmp_path / "model.pth")
    outcome = export(tmp_path / "model.pth", "--output", tmp_path / "x.safetensors")
    assert outcome.code == 2 and "metrics" in outcome.err and not (tmp_path / "x.safetensors").exists()


def test_a_graph_that_differs_is_not_left(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model.pth", "iefvad")
    (tmp_path / "m.pt2").write_text("from before")
    outcome = export(tmp_path / "model.pth", "--output", tmp_path / "m.pt2")
    assert outcome.code == 2 and "m.pt2 was not written by 'export' and is not replaced" in outcome.err
    (tmp_path / "m.pt2.md").write_text("card from before")
    for change, message in (
        (lambda value: value + np.float32(2e-5), "anomaly differs"),
        (lambda value: value * np.nan, "anomaly differs"),
        (lambda value: value[:-1], "the exported graph gives"),
    ):

        def run(streams, change=change):
            return {name: change(value) for name, value in score_by_method(model, streams).items()}

        monkeypatch.setitem(GRAPHS, ".pt2", (lambda scorer, about: b"", lambda content, run=run: run))
        outcome = export(tmp_path / "model.pth", "--output", tmp_path / "m.pt2")
        assert outcome.code == 2 and message in outcome.err
        assert (tmp_path / "m.pt2").read_text() == "from before"
        assert (tmp_path / "m.pt2.md").read_text() == "card from before"


REFUSED = {
    "unknown suffix": ["model.pth", "--output", "m.bin"],
    "does not name its dataset: pass --dataset": ["released.pth", "--output", "m.onnx"],
    "in the released form already": ["released.pth", "--output", "m.pth"],
    "not found": ["nothing.pth", "--output", "m.onnx"],
    "pip install onnx": ["model.pth", "--output", "m.onnx"],
    "error: more memory is needed": ["model.pth", "--output", "m.pt2"],
}


@pytest.mark.parametrize(("message", "argv"), REFUSED.items())
def test_what_cannot_be_exported_is_one_line(message, argv, tmp_path, monkeypatch):
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    monkeypatch.setattr(exporting, "export_program", Mock(side_effect=full))
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model.pth", "iefvad")
    torch.save(read_model_file(tmp_path / "model.pth").state, tmp_path / "released.pth")
    outcome = export(*argv)
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model.pth", "released.pth"}


METHOD = """
import torch
from clipfusionvad.models import Method
from clipfusionvad.models.base import Probabilities, VADOutput

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
        return Probabilities((output.coarse_logits.sigmoid().squeeze(-1),))
"""
# A line that torch cannot follow, the form, and what the message names.
UNTRACEABLE = {
    "x = torch.from_numpy(x.numpy())": (".pt2", "line {number} of odd_method.py (x = torch.from_numpy(x.numpy()))"),
    "x = x if x.mean() > 0 else -x": (".onnx", "line {number} of odd_method.py (x = x if x.mean() > 0 else -x)"),
    "x = torch.special.i1(x)": (".onnx", "bessel_i1"),
}


@pytest.mark.parametrize("line", UNTRACEABLE)
def test_what_cannot_be_followed_is_one_line_that_names_it(line, tmp_path, capfd):
    suffix, named = UNTRACEABLE[line]
    program = METHOD.format(line=line)
    (tmp_path / "odd_method.py").write_text(program)
    model = runpy.run_path(tmp_path / "odd_method.py")["Odd"]()
    with pytest.raises(UserError, match="odd cannot be exported") as refused:
        exporting.export_graph(model, suffix, {})
    message = error_line(refused.value)
    number = program.splitlines().index(f"        {line}") + 1
    assert named.format(number=number) in message and len(message) < 500
    assert capfd.readouterr() == ("", "")


def test_a_test_reads_safetensors_like_the_checkpoint(tmp_path):
    tiny, found = make_tiny("ucf", tmp_path / "data"), []
    write_model(tiny.work / "model.pth", tiny.method)
    assert export(tiny.work / "model.pth", "--output", tiny.work / "model.safetensors").code == 0
    for name in ("model.pth", "model.safetensors"):
        done = tiny.test("--model-path", tiny.work / name, "--metrics-json", tmp_path / "metrics.json")
        assert done.code == 0, done.err
        found.append(json.loads((tmp_path / "metrics.json").read_text()))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_released_file_becomes_onnx(tmp_path):
    model = write_model(tmp_path / "model.pth", "vadclip")
    assert export(tmp_path / "model.pth", "--output", tmp_path / "released.pth").code == 0
    sizes = "{embed-dim: 64, visual-width: 64, visual-length: 32, attn-window: 8, visual-layers: 1, "
    (tmp_path / "sizes.yaml").write_text(sizes + "prompt-prefix: 2, prompt-postfix: 2}")
    flags = ["--method", "vadclip", "--dataset", "ucf", "--config", tmp_path / "sizes.yaml", "--clip", "toy"]
    done = export(tmp_path / "released.pth", *flags, "--output", tmp_path / "m.onnx")
    assert done.code == 0, done.err
    expect_equal(run_onnx((tmp_path / "m.onnx").read_bytes()), model, [70])
