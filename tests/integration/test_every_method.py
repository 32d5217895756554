"""Every method and every dataset through the same doors."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from refusal import assert_refused
from test_resume import Broken
from tiny import METHOD_FLAGS, make_tiny, quietly, skip_without_packages, strings

from clipfusionvad import create_model, load_model, load_weights
from clipfusionvad.__main__ import main as package_main
from clipfusionvad.cli.options import option_file_of
from clipfusionvad.data.features import load_video
from clipfusionvad.data.lists import add_streams, read_list
from clipfusionvad.datasets import find_dataset
from clipfusionvad.engine.checkpoint import read_model_file
from clipfusionvad.engine.trainer import Trainer
from clipfusionvad.metrics import frame_metrics
from clipfusionvad.models import find_method, method_names
from clipfusionvad.report.scores import read_scores

PAIRS = [(method, "ucf") for method in METHOD_FLAGS]
PAIRS += [("iefvad", "xd"), ("anomalyclip", "xd"), ("vadclip", "shanghaitech"), ("anomalyclip", "msad")]


@pytest.fixture(scope="module", params=PAIRS, ids=["-".join(pair) for pair in PAIRS])
def trained(request, tmp_path_factory):
    method, dataset = request.param
    skip_without_packages(method)
    data = make_tiny(dataset, tmp_path_factory.mktemp("data") / "tiny")
    tiny = data.of(method).at(tmp_path_factory.mktemp("work"))
    outcome = tiny.train("--max-epoch", 3)
    assert outcome.code == 0, outcome.err
    return tiny


def model_of(tiny):
    """The trained model, made as its file says."""
    made = read_model_file(tiny.work / "model.pth").hparams
    model = create_model(tiny.method, find_dataset(tiny.dataset).prompts, clip="toy", **made["options"])
    load_weights(model, tiny.work / "model.pth")
    return model


def test_it_learns_and_testing_gives_what_training_reported(trained):
    if find_method(trained.method).trained:
        losses = np.genfromtxt(trained.work / "run/losses.csv", delimiter=",", names=True)
        first, last = (losses["loss"][losses["epoch"] == epoch].mean() for epoch in (0, 2))
        assert last < first
    assert trained.test("--metrics-json", trained.work / "tested.json").code == 0
    tested = json.loads((trained.work / "tested.json").read_text())
    assert tested == json.loads((trained.work / "run/metrics.json").read_text())["best"]
    assert {"auc1", "ap1", "ano_auc1", "per_class"} <= tested.keys()
    other = next(name for name in method_names() if name != trained.method)
    refused = trained.of(other).test()
    assert refused.code == 2 and f"use --method {trained.method}" in refused.err
    model = model_of(trained)
    classes = model.score_video(np.zeros((1, len(model.streams) * model.visual_width), np.float32))[1]
    assert ("map" in tested) == ("mauc" in tested) == (classes is not None)


def test_scoring_a_video_gives_what_the_test_scored(trained, monkeypatch):
    """Also for a model whose streams come one by one."""
    model = model_of(trained)
    entries = read_list(trained.test_list)
    if len(model.streams) > 1:
        entries = add_streams(entries, ["features", "events"], "test.csv")
    scored, watched = [], "clipfusionvad.cli.testing.evaluate_classes"
    monkeypatch.setattr(watched, lambda scores, videos: scored.extend(scores) or {})
    assert trained.test().code == 0
    for entry, expected in zip(entries, scored, strict=True):
        features = load_video(entry.paths)
        streams = np.split(features, len(model.streams), axis=1)
        for given in (features, streams if len(streams) > 1 else features):
            anomaly, classes = model.score_video(given)
            np.testing.assert_allclose(anomaly, expected.anomaly[0], atol=1e-5)
            assert len(expected.anomaly) == model.branches
            assert anomaly.shape == (len(features),) and ((anomaly >= 0) & (anomaly <= 1)).all()
            if classes is None:
                assert expected.classes is None
            else:
                np.testing.assert_allclose(classes, expected.classes, atol=1e-5)
                np.testing.assert_allclose(classes.sum(axis=1), 1, atol=1e-5)


def test_load_model_needs_no_clip_and_gives_the_numbers_of_the_test(trained, tmp_path, without_clip):
    """Those of each video and, by frame, the metrics; smoothed as the file says."""
    content = torch.load(trained.work / "model.pth", weights_only=True)
    content["hparams"]["smooth"] = 2
    torch.save(content, tmp_path / "smooth.pth")
    flags = ["--model-path", tmp_path / "smooth.pth", "--output-dir", tmp_path / "test"]
    assert trained.test(*flags).code == 0
    tested = read_scores(tmp_path / "test/test_scores.npz")
    with without_clip():
        model = load_model(tmp_path / "smooth.pth", device="cpu")
    assert (model.name, model.smooth, model.labels) == (trained.method, 2, tuple(tested.videos.dataset.labels))
    entries, curves = read_list(trained.test_list), []
    if len(model.streams) > 1:
        entries = add_streams(entries, ["features", "events"], "test.csv")
    for entry, expected, truth in zip(entries, tested.scores, tested.videos.truth.frames, strict=True):
        features = load_video(entry.paths)
        anomaly, classes = model.score_video(features)
        np.testing.assert_allclose(anomaly, expected.anomaly[0], atol=1e-5)
        assert (classes is None) == (expected.classes is None)
        if classes is not None:
            np.testing.assert_allclose(classes, expected.classes, atol=1e-5)
        curves.append(model.score_frames(features, len(truth)).anomaly)
    found = frame_metrics(np.concatenate(curves), np.concatenate(tested.videos.truth.frames))
    metrics = json.loads((tmp_path / "test/test_metrics.json").read_text())
    assert (found["auc"], found["ap"]) == pytest.approx((metrics["auc1"], metrics["ap1"]), abs=1e-6)


def test_a_broken_off_training_goes_on_to_the_same_bits(trained, tmp_path, no_plots, monkeypatch):
    if not find_method(trained.method).trained:
        pytest.skip(f"{trained.method} has nothing to train")
    work, step = trained.at(tmp_path), Trainer._step
    steps = []

    def broken(self, *args):
        steps.append(step(self, *args))
        if len(steps) == 2:
            # Saved within the epoch.
            os.kill(os.getpid(), signal.SIGTERM)
        if len(steps) == 5:
            raise Broken
        return steps[-1]

    monkeypatch.setattr(Trainer, "_step", broken)
    assert work.train("--max-epoch", 3, "--use-checkpoint").code == 130
    with pytest.raises(Broken):
        work.train("--max-epoch", 3, "--use-checkpoint")
    assert len(steps) == 5
    assert work.train("--max-epoch", 3, "--use-checkpoint").code == 0
    for name in ("losses.csv", "metrics.jsonl"):
        assert (work.work / "run" / name).read_text() == (trained.work / "run" / name).read_text()
    one, other = (torch.load(t.work / "model.pth", weights_only=True)["model_state_dict"] for t in (work, trained))
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_the_released_form_is_recognised_and_gives_the_same_model(trained, tmp_path):
    """Exported, then tested as a file that has only weights: its method is found by their names."""
    method = find_method(trained.method)
    if "matches_state_dict" not in vars(method):
        pytest.skip("the method knows no released files")
    released = tmp_path / "released.pth"
    done = quietly(package_main, strings(["export", trained.work / "model.pth", "--output", released]))
    assert done.code == 0, done.err
    assert read_model_file(released).method == trained.method
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    assert trained.test("--metrics-json", before).code == 0
    more = ["--train-list", trained.train_list] if method.centroid_buffers else []
    outcome = trained.test("--model-path", released, "--metrics-json", after, *more)
    assert outcome.code == 0, outcome.err
    before, after = (json.loads(path.read_text()) for path in (before, after))
    for name in ("auc1", "ap1"):
        assert after[name] == pytest.approx(before[name], abs=1e-4)


def test_a_released_file_that_lacks_what_training_took_from_normal_videos(tmp_path):
    tiny = make_tiny("ucf", tmp_path / "data").of("anomalyclip")
    assert tiny.train("--max-epoch", 1).code == 0
    file = torch.load(tiny.work / "model.pth", weights_only=True)
    bare = {f"net.{key}": value for key, value in file["model_state_dict"].items() if key != "ncentroid"}
    torch.save({"state_dict": bare, "pytorch-lightning_version": "1.8.3"}, tmp_path / "last.ckpt")
    flags = ["--model-path", tmp_path / "last.ckpt", "--metrics-json", tmp_path / "m.json"]
    refused = tiny.test(*flags, "--train-list", tmp_path / "none.csv")
    assert refused.code == 2 and "ncentroid" in refused.err and "--normal-centroid" in refused.err
    torch.save(file["model_state_dict"]["ncentroid"], tmp_path / "ncentroid.pt")
    best = json.loads((tiny.work / "run/metrics.json").read_text())["best"]["auc1"]
    sources = {"--train-list": tiny.train_list, "--normal-centroid": tiny.work / "run/calibration.pt"}
    for source in (sources | {"--calibration": tmp_path / "ncentroid.pt"}).items():
        assert tiny.test(*flags, *source).code == 0
        assert json.loads((tmp_path / "m.json").read_text())["auc1"] == pytest.approx(best)


def test_two_streams_that_do_not_fit_are_refused(tmp_path):
    tiny = make_tiny("ucf", tmp_path / "data").of("iefvad")
    assert_refused(tiny.train, tiny, "--stream-folders", "features", "nowhere", says=("nowhere", "--stream-folders"))
    assert_refused(tiny.train, tiny, "--stream-folders", "features", says="--stream-folders needs 2 words")
    path = next((tiny.folder / "events").iterdir())
    np.save(path, np.load(path)[:-1])
    assert_refused(tiny.train, tiny, says=(str(path), "extract both"))


@pytest.mark.parametrize("dataset", ["ucf", "xd", "msad"])
def test_selection_is_by_a_branch_that_the_method_has(dataset, monkeypatch):
    """XD-Violence selects by the second branch; a method of one branch, published nowhere, by its first."""
    parse = option_file_of(find_dataset(dataset)).parse_args
    select = parse(["--method", "vadclip"]).select
    monkeypatch.setattr(find_method("vadclip"), "branches", 1)
    assert parse(["--method", "vadclip"]).select == select[:-1] + "1"
    outcome = quietly(parse, ["--method", "vadclip", "--select", "auc2"])
    assert outcome.code == 2 and "auc2" in outcome.err and "auc1" in outcome.err


def test_last_weights_are_those_after_the_last_epoch(tmp_path, no_plots):
    """Also where the last evaluation came before its end."""
    tiny = make_tiny("ucf", tmp_path / "data")
    assert tiny.train("--select", "last", "--eval-every", 12, "--max-epoch", 2).code == 0
    results = json.loads((tiny.work / "run/metrics.json").read_text())
    assert results["best"] == results["last"]
    plain = tiny.at(tmp_path / "plain")
    assert plain.train("--select", "last", "--max-epoch", 2, "--protocol", "paper").code == 0
    steps = [torch.load(t.work / "model.pth", weights_only=True)["step"] for t in (tiny, plain)]
    assert steps == [8, 8]
