"""Analyses of models: what is computed beside a model is what the model computes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_tiny, quietly, strings
from torch.nn import functional as F

from clipfusionvad import create_model
from clipfusionvad.__main__ import main
from clipfusionvad.cli.insight import FROM_MODEL
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.truth import Truth
from clipfusionvad.datasets import UCF
from clipfusionvad.engine.evaluator import VideoDataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.models.clip import token_words, tokenize
from clipfusionvad.tools.analysis.attention import Layer, attention_weights, read_attention, record_attention
from clipfusionvad.tools.analysis.gates_and_graphs import blocks, read_gates, read_graphs
from clipfusionvad.tools.analysis.prompts import class_similarity, nearest_words
from clipfusionvad.tools.analysis.view import view

W, T = 32, 16
SIZES = {"embed_dim": W, "visual_width": W, "visual_length": T, "clip": "toy"}
BRANCHES = {**SIZES, "attn_window": 4, "visual_layers": 2, "visual_head": 2, "prompt_prefix": 2, "prompt_postfix": 1}


def small(method, **options):
    torch.manual_seed(1)
    return create_model(method, UCF.prompts, **options).eval()


@pytest.fixture(scope="module")
def main_model():
    return small("clipfusionvad", **BRANCHES)


def seen_by(model, snippets=22, name=None, width=W):
    """A view of a video with an event, without files."""
    rng = np.random.default_rng(2)
    frames = [np.zeros(16 * snippets, np.uint8), np.zeros(16 * snippets, np.uint8)]
    frames[1][16 * 17 : 16 * 20] = 1
    entries = [Entry(Path(f"{video}__0.npy"), label, 2) for video, label in (("n", "Normal"), ("a", "Abuse"))]
    videos = VideoDataset(entries, UCF, width, Truth(frames, [[], []], [[], []]))
    rows = len(model.streams) * width
    videos._loaded = {row: rng.standard_normal((snippets, rows)).astype(np.float32) for row in (0, 1)}
    return view(model, videos, name)


def test_weights_times_values_are_the_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 10, 8)
    visible = torch.rand(2, 1, 10, 10) > 0.3
    visible[..., 0] = True
    for mask in (None, visible, torch.randn(2, 1, 1, 10)):
        for scale in (None, 1.0):
            expected = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
            torch.testing.assert_close(attention_weights(q, k, mask, scale=scale) @ v, expected)
    module = torch.nn.MultiheadAttention(W, 4, batch_first=True).eval()
    x, padding = torch.randn(3, 10, W), torch.arange(10) >= torch.tensor([10, 6, 3])[:, None]
    with torch.no_grad(), record_attention(torch.nn.Sequential(module)) as found:
        module(x, x, x, key_padding_mask=padding, need_weights=False)
    with torch.no_grad():
        weights = module(x, x, x, key_padding_mask=padding, average_attn_weights=False)[1]
    torch.testing.assert_close(found["0"][0], weights)


def test_a_layer_is_laid_out_where_its_lines_run():
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3), (4, 3))
    places = np.arange(12).reshape(3, 4).T
    layer = Layer("rows", 1, weights, places, True)
    dense = layer.dense(12)
    for line, i, j in np.ndindex(weights.shape):
        assert dense[places[line, i], places[line, j]] == weights[line, i, j]
    assert dense.sum() == pytest.approx(12) and (dense > 0).sum() == 36
    np.testing.assert_allclose(layer.received(12), dense.sum(axis=0))
    even = Layer("even", 1, np.full((4, 3, 3), 1 / 3), places, True)
    assert even.effective(12) == pytest.approx(3) and layer.effective(12) < 3


GRID = {"embed_dim": W, "visual_width": W, "num_segments": 4, "seg_length": 3, "emb_size": 8, "heads": 2, "n_ctx": 2}
# Options, number of layers with attention, and how many places they attend to.
CASES = {
    "clipfusionvad": (BRANCHES, 2, {4}),
    "vadclip": (BRANCHES, 2, {4}),
    "iefvad": ({"visual_width": W, "visual_length": T, "visual_head": 4, "num_refinement_steps": 1}, 4, {T}),
    "reflipvad": ({**SIZES, "glimpse_window": 6, "prompt_encoder": "toy", "prompt_length": 4}, 1, {6}),
    "anomalyclip": ({**GRID, "clip": "toy"}, 2, {3, 4}),
}


@pytest.mark.parametrize("method", CASES)
def test_attention_of_every_method_is_found(method):
    options, layers, sees = CASES[method]
    model = small(method, **options)
    if model.centroid_buffers:
        model.ncentroid.zero_()
    seen = seen_by(model)
    found = read_attention(model, seen, 1)
    assert len(found) == layers and {layer.places.shape[1] for layer in found} == sees
    length = int(seen.lengths[1])
    for layer in found:
        whole = layer.dense(int(layer.places.max()) + 1)
        np.testing.assert_allclose(whole.sum(axis=1), 1, atol=1e-5)
        side = layer.places.shape[1]
        assert 1 <= layer.effective(length) <= side + 1e-3
    assert not any(module._forward_hooks for module in model.modules()), "hooks are taken off again"


def test_rows_of_a_view_are_the_snippets_at_their_places():
    model = small("anomalyclip", **CASES["anomalyclip"][0])
    model.ncentroid.zero_()
    seen = seen_by(model)
    flat = seen.windows.reshape(-1, W).numpy()
    rows = seen.rows.reshape(-1)
    assert (rows >= 0).all() and set(rows) == set(range(22))
    for place in range(len(rows)):
        twins = np.flatnonzero(rows == rows[place])
        assert (flat[twins] == flat[place]).all()
    windows = seen_by(small("vadclip", **BRANCHES))
    assert windows.rows[1, 6:].tolist() == [-1] * 10 and windows.rows[1, :6].tolist() == list(range(16, 22))
    assert windows.check_window(None) == 1 and windows.name == "a"
    with pytest.raises(UserError, match="no test video is called 'b'"):
        seen_by(model, name="b")


def test_gates_are_those_that_the_module_multiplies_with(main_model):
    seen = seen_by(main_model)
    gates, given = read_gates(main_model, seen), {}
    hook = main_model.gam_attention.register_forward_hook(lambda _, args, out: given.update(x=args[0], out=out))
    with torch.no_grad():
        main_model(seen.windows, seen.lengths)
    hook.remove()
    before, after = (given[name].flatten(0, 1)[:22].numpy() for name in ("x", "out"))
    np.testing.assert_allclose(before * gates["channel"] * gates["temporal"], after, atol=1e-6)
    with pytest.raises(UserError, match="has no global attention module .*clipfusionvad may have it"):
        read_gates(small("vadclip", **BRANCHES), seen)


def test_graphs_are_those_of_the_valid_snippets(main_model):
    seen = seen_by(main_model)
    found = read_graphs(main_model, seen, 1)
    with torch.no_grad():
        x = main_model.encode_temporal(seen.windows[1:])[0, :6].numpy().astype(np.float64)
    for i in range(6):
        cosine = [x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for j in range(6)]
        kept = np.exp([value if value > 0.7 else 0 for value in cosine])
        np.testing.assert_allclose(found.cosine[i], cosine, atol=1e-5)
        np.testing.assert_allclose(found.similarity[i], kept / kept.sum(), atol=1e-5)
        np.testing.assert_allclose(found.distance[i], np.exp(-np.abs(i - np.arange(6)) / np.e), atol=1e-6)
    assert read_graphs(small("vadclip", **BRANCHES, similarity_graph=False), seen, 0).similarity is None
    with pytest.raises(UserError, match="has no graph over snippets"):
        read_graphs(small("vadclip", **BRANCHES, graph=False), seen, 0)
    truth, matrix = np.array([1, 0, 0]), np.arange(9.0).reshape(3, 3)
    assert blocks(matrix, truth) == [0, 1.5, 4.5, 6]


def test_nearest_words_are_found_among_all():
    rng = np.random.default_rng(3)
    table = torch.from_numpy(rng.standard_normal((500, W)).astype(np.float32))
    context = table[[7, 42]] * 0.5 + 0.01
    found, _ = nearest_words(torch.stack([context, context.flip(0)]), table, ["a", "b"], count=2)
    assert found["class"].tolist() == ["a", "a", "b", "b"] and found["position"].tolist() == [1, 2, 1, 2]
    assert found["tokens"].str[0].tolist() == [7, 42, 42, 7] and (found["random_as_near"] == 0).all()
    for row, vector in enumerate(torch.cat([context, context.flip(0)])):
        cosines = F.cosine_similarity(vector[None], table).sort(descending=True)
        assert found["tokens"][row] == cosines.indices[:2].tolist()
        np.testing.assert_allclose(found["cosine"][row], cosines.values[:2], atol=1e-6)
        assert found["nearest_distance"][row] == pytest.approx((table - vector).norm(dim=1).min().item(), rel=1e-4)
    random, _ = nearest_words(torch.randn(60, W, generator=torch.Generator().manual_seed(5)), table, ["a"])
    assert 0.35 < random["random_as_near"].mean() < 0.65, "random vectors are as near as random vectors"
    np.testing.assert_allclose(np.diag(class_similarity(context)), 1, atol=1e-6)
    assert token_words(tokenize(["burglary anti"])[0, 1:3].tolist()) == ["burglary", "anti"]


LEARNED = {"reflipvad": "prompt_embeddings", "anomalyclip": "prompt_learner.ctx"}
LEARNED |= dict.fromkeys(("clipfusionvad", "vadclip"), "text_prompt_embeddings.weight")


@pytest.mark.parametrize("method", LEARNED)
def test_learned_vectors_are_those_that_the_prompts_show(method):
    model = small(method, **CASES[method][0])
    context, before, parameter = model.context_vectors(), model.encode_text(), model.get_parameter(LEARNED[method])
    with torch.no_grad():
        parameter.add_(torch.randn_like(parameter))
    assert context.shape[-1] == W and not torch.equal(context, model.context_vectors())
    assert not torch.allclose(before, model.encode_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of the same method on two datasets, and one whose prompts are bound to its classes."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for dataset, method in (("ucf", "clipfusionvad"), ("xd", "clipfusionvad"), ("xd", "anomalyclip")):
        if dataset not in made:
            made[dataset] = make_tiny(dataset, folder / dataset)
        work = folder / f"{dataset}_{method}"
        assert made[dataset].of(method).at(work).train("--max-epoch", 1).code == 0
        made[dataset, method] = work / "run"
    return made


@pytest.mark.parametrize("analysis", FROM_MODEL)
def test_every_analysis_of_a_model_writes_its_figure_and_numbers(analysis, runs, tmp_path):
    out = tmp_path / "out.png"
    argv = ["insight", analysis.__name__, runs["ucf", "clipfusionvad"], "--output", out, "--device", "cpu"]
    done = quietly(main, strings(argv))
    assert done.code == 0, done.err
    assert out.read_bytes().startswith(b"\x89PNG") and str(out) in done.out
    rows = list(csv.reader(out.with_suffix(".csv").open()))
    assert len(rows) > 1 and len({len(row) for row in rows}) == 1


def test_a_model_file_needs_the_options_of_a_test(runs, tmp_path):
    tiny, model, out = runs["ucf"], runs["ucf", "clipfusionvad"].parent / "model.pth", tmp_path / "a.png"
    data = ["--test-list", tiny.test_list, "--gt-path", tiny.folder / "truth.csv", "--device", "cpu", "--output", out]
    far = quietly(main, strings(["insight", "graph", model], data, ["--window", 9]))
    assert far.code == 2 and "--window 9" in far.err and not out.exists()
    done = quietly(main, strings(["insight", "gates", model], data, ["--video", tiny.videos[0].name]))
    assert done.code == 0 and tiny.videos[0].name in done.out, done.err


def test_transfer_is_a_test_on_each_others_data(runs, tmp_path):
    folders = [runs[key] for key in (("ucf", "clipfusionvad"), ("xd", "clipfusionvad"), ("xd", "anomalyclip"))]
    out = tmp_path / "transfer.png"
    done = quietly(main, strings(["insight", "transfer", *folders, "--output", out, "--device", "cpu"]))
    assert done.code == 0, done.err
    assert "anomalyclip on XD-Violence has learned weights for each of its classes" in done.out
    rows = {(row["trained on"], row["tested on"]): row for row in csv.DictReader(out.with_suffix(".csv").open())}
    assert len(rows) == 6, "two datasets, one column each"
    for source, target in (("ucf", "xd"), ("xd", "ucf"), ("ucf", "ucf")):
        tiny = runs[target].of("clipfusionvad").at(tmp_path / f"{source}_{target}")
        model = runs[source, "clipfusionvad"].parent / "model.pth"
        scored = tmp_path / f"{source}_{target}.json"
        assert tiny.test("--model-path", model, "--metrics-json", scored).code == 0
        metrics, title = json.loads(scored.read_text()), {"ucf": "UCF-Crime", "xd": "XD-Violence"}
        row = rows[f"clipfusionvad on {title[source]}", title[target]]
        assert float(row["AUC"]) == pytest.approx(100 * metrics["auc1"], rel=1e-5)
        assert float(row["AP, fine branch"]) == pytest.approx(100 * metrics["ap2"], rel=1e-5)
    bound = rows["anomalyclip on XD-Violence", "UCF-Crime"]
    assert bound["detection mAP"] == "" and float(bound["AUC"]) > 0
    assert rows["anomalyclip on XD-Violence", "XD-Violence"]["detection mAP"] != ""
