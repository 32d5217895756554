"""Exported graphs against the way that a test goes, for every method; the command's files, cards and refusals."""

import io
import json
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_detect import write_model
from tiny import METHOD_FLAGS, quietly, skip_without_packages, strings

from clipfusionvad import create_model
from clipfusionvad.__main__ import main as package_main
from clipfusionvad.data.sampling import GridSampling, WindowSampling
from clipfusionvad.datasets import DATASETS
from clipfusionvad.engine.checkpoint import read_model_file
from clipfusionvad.io.errors import UserError
from clipfusionvad.tools.export import graph
from clipfusionvad.tools.export.graph import (
    TOLERANCE,
    Checked,
    check_graph,
    export_program,
    onnx_bytes,
    pt2_bytes,
    run_onnx,
    run_pt2,
)
from clipfusionvad.tools.export.scorer import VideoScorer, random_video, score_by_method

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


def expect_equal(run, model, names, lengths):
    """Outputs of a graph against ``score_video`` and, for the other branches, ``score_windows``."""
    for count in lengths:
        streams = [stream.numpy() for stream in random_video(model, count, seed=count)]
        found, wanted = run(dict(zip(names, streams, strict=True))), score_by_method(model, streams)
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=TOLERANCE, err_msg=f"{name}, {count} snippets")
        anomaly, classes = model.score_video(streams)
        np.testing.assert_allclose(found["anomaly"], anomaly, rtol=0, atol=TOLERANCE)
        assert ("classes" in found) == (classes is not None)
        if classes is not None:
            np.testing.assert_allclose(found["classes"], classes, rtol=0, atol=TOLERANCE)


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_windows_of_tensors_equal_those_of_arrays(count, segments, frames):
    features = np.random.default_rng(count).standard_normal((count, 3)).astype(np.float32)
    for sampling in (WindowSampling(segments * frames), GridSampling(segments, frames)):
        windows, lengths = sampling.windows(features)
        ours, our_lengths = sampling.tensor_windows(torch.from_numpy(features))
        np.testing.assert_array_equal(ours.numpy(), windows)
        assert our_lengths.tolist() == lengths.tolist()
        rows = windows.reshape(-1, 3)
        restored = sampling.tensor_restore(torch.from_numpy(rows), count)
        np.testing.assert_array_equal(restored.numpy(), features)
        np.testing.assert_array_equal(restored.numpy(), sampling.restore(rows, count))


@pytest.mark.parametrize("case", [*MODELS, *OTHERS])
def test_the_scorer_scores_as_the_model_does(case):
    model = build(case)
    scorer = VideoScorer(model)

    def run(features):
        with torch.inference_mode():
            found = scorer(*(torch.from_numpy(features[name]) for name in scorer.inputs))
        return {name: value.numpy() for name, value in found.items()}

    expect_equal(run, model, scorer.inputs, LENGTHS)


def test_weights_that_scoring_does_not_read_are_left_out_and_the_model_keeps_them():
    model = build("fusion")
    before = dict(model.state_dict())
    kept = VideoScorer(model).state_dict()
    assert not any(".clipmodel." in name or "text_prompt" in name for name in kept)
    read = {name.removeprefix("method.") for name in kept}
    assert {"linear.weight", "gc1.weight", "temporal.resblocks.0.attn.in_proj_weight"} <= read
    assert model.state_dict().keys() == before.keys()


# Graphs take seconds each: those of ablations are made where EXPORT=all.
EVERYTHING = [*MODELS, *OTHERS] if os.environ.get("EXPORT") == "all" else list(MODELS)


@pytest.mark.parametrize("case", EVERYTHING)
def test_onnx_scores_as_the_model_does(case):
    model = build(case)
    scorer = VideoScorer(model)
    content = onnx_bytes(export_program(scorer), scorer, {"x": 1})
    expect_equal(run_onnx(content, scorer), model, scorer.inputs, LENGTHS)
    # The toy's table of tokens alone is more than that.
    assert len(content) < 49408 * 64


@pytest.mark.parametrize("case", EVERYTHING if EVERYTHING != list(MODELS) else ["paper"])
def test_pt2_scores_as_the_model_does(case):
    model = build(case)
    scorer = VideoScorer(model)
    content = pt2_bytes(export_program(scorer), scorer, {"x": 1})
    expect_equal(run_pt2(content, scorer), model, scorer.inputs, LENGTHS)
    assert len(content) < 49408 * 64
    extra = {"clipfusionvad": ""}
    torch.export.load(io.BytesIO(content), extra_files=extra)
    assert json.loads(extra["clipfusionvad"]) == {"x": 1}


def export(*argv):
    return quietly(package_main, strings(["export", *argv]))


def python_of(card):
    return re.search(r"^```python\n(.*?)^```", card.read_text(), re.MULTILINE | re.DOTALL).group(1)


def test_the_command_writes_onnx_with_a_card_whose_example_runs(tmp_path, monkeypatch, capsys):
    import onnxruntime

    model = write_model(tmp_path / "model.pth", "iefvad")
    outcome = export(tmp_path / "model.pth", "--output", tmp_path / "out/m.onnx")
    assert outcome.code == 0, outcome.err
    assert "largest difference from PyTorch" in outcome.out
    session = onnxruntime.InferenceSession(tmp_path / "out/m.onnx")
    shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {"rgb": ["snippets", 64], "event": ["snippets", 64], "anomaly": ["snippets"]}
    expect_equal(run_onnx((tmp_path / "out/m.onnx").read_bytes(), None), model, ("rgb", "event"), LENGTHS)
    about = json.loads(session.get_modelmeta().custom_metadata_map["clipfusionvad"])
    assert about["method"] == model.name and list(about["classes"]) == DATASETS["ucf"].labels
    card = tmp_path / "out/m.onnx.md"
    assert "Not measured" in card.read_text() and "Robbery" in card.read_text()
    monkeypatch.chdir(tmp_path / "out")
    exec(python_of(card), {})
    assert "(300,)" in capsys.readouterr().out


def test_the_command_writes_pt2_with_a_card_whose_example_runs(tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "model.pth", "vadclip")
    assert export(tmp_path / "model.pth", "--output", tmp_path / "m.pt2").code == 0
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "m.pt2.md").read_text()
    assert "| `features` (input) | (L, 64) |" in text and "| `classes` | (L, 14) |" in text and "`anomaly_fine`" in text
    exec(python_of(tmp_path / "m.pt2.md"), {})
    assert "torch.Size([300])" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHOD_FLAGS)
def test_safetensors_bring_the_model_back(method, tmp_path):
    skip_without_packages(method)
    write_model(tmp_path / "model.pth", method)
    assert (done := export(tmp_path / "model.pth", "--output", tmp_path / "m.safetensors")).code == 0, done.err
    before, after = read_model_file(tmp_path / "model.pth"), read_model_file(tmp_path / "m.safetensors")
    assert after.hparams == before.hparams and after.method == method
    assert after.state.keys() == before.state.keys()
    assert all(torch.equal(after.state[key], before.state[key]) for key in before.state)
    # As good as the checkpoint for every other command.
    assert export(tmp_path / "m.safetensors", "--output", tmp_path / "again.safetensors").code == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


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


@pytest.mark.parametrize("place", [3, 20, -1])
def test_damaged_safetensors_are_refused(place, tmp_path):
    write_model(tmp_path / "model.pth", "iefvad")
    assert export(tmp_path / "model.pth", "--output", tmp_path / "m.safetensors").code == 0
    written = bytearray((tmp_path / "m.safetensors").read_bytes())
    written[place] ^= 1
    for content in (bytes(written), bytes(written[:-7]), b""):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="bad.safetensors"):
            read_model_file(tmp_path / "bad.safetensors")


def test_a_graph_that_differs_is_not_left(tmp_path, monkeypatch):
    write_model(tmp_path / "model.pth", "iefvad")
    (tmp_path / "m.pt2").write_text("from before")

    def wrong(content, scorer):
        run = run_pt2(content, scorer)
        return lambda features: {name: value + np.float32(2e-5) for name, value in run(features).items()}

    monkeypatch.setattr(graph, "run_pt2", wrong)
    outcome = export(tmp_path / "model.pth", "--output", tmp_path / "m.pt2")
    assert outcome.code == 2 and "anomaly differs" in outcome.err
    assert (tmp_path / "m.pt2").read_text() == "from before"
    assert not (tmp_path / "m.pt2.md").exists()


def test_nan_and_other_shapes_do_not_pass_the_check():
    model = build("student_t")
    scorer = VideoScorer(model)

    def of(change):
        return lambda features: {
            name: change(value) for name, value in score_by_method(model, list(features.values())).items()
        }

    assert isinstance(check_graph(of(lambda value: value), scorer, model), Checked)
    with pytest.raises(UserError, match="differs"):
        check_graph(of(lambda value: value * np.nan), scorer, model)
    with pytest.raises(UserError, match="gives"):
        check_graph(of(lambda value: value[:-1]), scorer, model)


REFUSED = {
    "unknown suffix": ["model.pth", "--output", "m.bin"],
    "does not name its dataset: pass --dataset": ["released.pth", "--output", "m.onnx"],
    "in the released form already": ["released.pth", "--output", "m.pth"],
    "not found": ["nothing.pth", "--output", "m.onnx"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_exported_is_one_line(message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model.pth", "iefvad")
    torch.save(read_model_file(tmp_path / "model.pth").state, tmp_path / "released.pth")
    outcome = export(*REFUSED[message])
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model.pth", "released.pth"}


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    write_model(tmp_path / "model.pth", "iefvad")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    outcome = export(tmp_path / "model.pth", "--output", tmp_path / "m.onnx")
    assert outcome.code == 2 and "pip install onnx" in outcome.err and not (tmp_path / "m.onnx").exists()
