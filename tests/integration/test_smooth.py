"""Smoothing over time: the same in test, training and detection, recorded, and chosen on held-out videos only."""

import json

import numpy as np
import pytest
import torch
import yaml
from made_videos import write_video
from scipy.ndimage import gaussian_filter1d
from small_detect import detect, write_model
from tiny import make_tiny, package_main, quietly, skip_without_packages, strings

from clipfusionvad.data.lists import Entry
from clipfusionvad.datasets import UCF
from clipfusionvad.engine.evaluator import SIGMAS, VideoDataset, VideoScores, choose_smoothing
from clipfusionvad.models import method_names
from clipfusionvad.report.scores import read_scores


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny("ucf", tmp_path_factory.mktemp("smooth") / "data")


def metrics_of(folder, name="test_metrics.json"):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("method", method_names())
def test_a_test_smooths_every_video_for_itself_and_says_so(method, data, tmp_path):
    skip_without_packages(method)
    tiny = data.of(method).at(tmp_path)
    assert tiny.train("--max-epoch", 1).code == 0
    raw, smooth = (tiny.test("--output-dir", tmp_path / name, *more) for name, more in
                   (("raw", ()), ("smooth", ("--smooth", 2))))  # fmt: skip
    assert raw.code == smooth.code == 0, smooth.err
    assert "smoothed" not in raw.out and "scores smoothed over time: Gaussian, σ = 2 snippets" in smooth.out
    assert "smooth" not in metrics_of(tmp_path / "raw") and metrics_of(tmp_path / "smooth")["smooth"] == 2
    one, other = (read_scores(tmp_path / name / "test_scores.npz") for name in ("raw", "smooth"))
    assert (one.options["smooth"], other.options["smooth"]) == (0, 2)
    for before, after in zip(one.scores, other.scores, strict=True):
        np.testing.assert_allclose(after.anomaly, gaussian_filter1d(before.anomaly, 2, axis=1), rtol=1e-5)
        if before.classes is not None:
            np.testing.assert_allclose(
                after.classes, gaussian_filter1d(before.classes, 2, axis=0), rtol=1e-5, atol=1e-7
            )
    assert "σ = 2 snippets" in (tmp_path / "smooth" / "report.html").read_text()
    # The trained model file does not smooth.
    assert "smooth" not in torch.load(tmp_path / "model.pth")["hparams"]


def test_a_training_stores_what_it_smooths_with(data, tmp_path):
    tiny = data.at(tmp_path)
    outcome = tiny.train("--smooth", 3)
    assert outcome.code == 0 and "σ = 3 snippets" in outcome.out
    run, best = tmp_path / "run", metrics_of(tmp_path / "run", "metrics.json")["best"]
    assert best["smooth"] == 3 and yaml.safe_load((run / "options.yaml").read_text())["smooth"] == 3
    evaluations = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(found["auc1"] == best["auc1"] for found in evaluations)
    for flags, sigma in (((), 3), (("--smooth", 0), None)):
        assert tiny.test("--metrics-json", tmp_path / "m.json", *flags).code == 0
        tested = json.loads((tmp_path / "m.json").read_text())
        assert tested.get("smooth") == sigma and (tested["auc1"] == best["auc1"]) == (sigma == 3)
    table = quietly(package_main, strings(["table", run]))
    assert table.code == 0 and "Scores smoothed over time, standard deviation in snippets: run 3." in table.out


def test_sigma_is_chosen_on_held_out_videos_and_never_on_the_test_set(data, tmp_path):
    tiny = data.at(tmp_path)
    refused = tiny.train("--smooth", "auto")
    assert refused.code == 2 and refused.err.count("\n") == 1 and not (tmp_path / "run").exists()
    assert "held-out training videos, which only --protocol clean has" in refused.err
    outcome = tiny.train("--smooth", "auto", "--protocol", "clean", "--holdout", 0.4)
    assert outcome.code == 0, outcome.err
    assert "AUC of the held-out videos by sigma: 0: " in outcome.out
    chosen = metrics_of(tmp_path / "run", "metrics.json")["best"]["smooth"]
    assert chosen in SIGMAS and torch.load(tmp_path / "model.pth")["hparams"]["smooth"] == chosen
    # The options of the run say "auto": the model file holds the number.
    run = ["--config", tmp_path / "run" / "options.yaml", "--model-path", tmp_path / "run"]
    tested = quietly(package_main, strings(["test", "--dataset", "ucf", *run, "--output-dir", tmp_path / "t"]))
    assert tested.code == 0, tested.err
    assert read_scores(tmp_path / "t" / "test_scores.npz").options["smooth"] == chosen

    assert tiny.at(tmp_path / "other").train("--protocol", "clean", "--holdout", 0.4).code == 0
    refused = tiny.at(tmp_path / "other").test("--smooth", "auto")
    assert refused.code == 2 and "has not chosen how far to smooth" in refused.err


def test_the_best_sigma_is_chosen_and_of_equal_ones_the_smallest():
    labels = ["Normal", "Normal", "Abuse", "Abuse"]
    videos = VideoDataset([Entry(f"{label}_{i}.npy", label, i) for i, label in enumerate(labels)], UCF, 1)
    scores = np.zeros((4, 1, 160))
    # Single peaks of normal videos are higher than a long event until they are smoothed.
    scores[:2, :, ::10], scores[2:, :, 60:100] = 0.9, 0.6
    found = choose_smoothing([VideoScores(one, None) for one in scores], videos, 1)
    assert found[0] == 0 and found[2] == found[5] == 1 and next(iter(found)) == min(s for s in SIGMAS if found[s] == 1)
    scores[2:] += 1
    assert list(choose_smoothing([VideoScores(one, None) for one in scores], videos, 1)) == list(SIGMAS)


@pytest.mark.parametrize("value", ["-1", "nan", "much", "20000"])
def test_a_bad_sigma_is_one_line(value, data, tmp_path):
    outcome = data.at(tmp_path).test(f"--smooth={value}")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and "--smooth" in outcome.err


def test_detection_smooths_whole_videos_and_no_streams(tmp_path):
    write_video(tmp_path / "video.mp4", 90)
    write_model(tmp_path / "model.pt", "vadclip")
    stored = torch.load(tmp_path / "model.pt")
    stored["hparams"]["smooth"] = 1.5
    torch.save(stored, tmp_path / "smooth.pt")

    def scored(model, *flags):
        common = ["--checkpoint", tmp_path / model, "--device", "cpu", "--output", tmp_path / "out", "--video", "none"]
        outcome = detect([tmp_path / "video.mp4", *common, *flags])
        assert outcome.code == 0, outcome.err
        found = json.loads((tmp_path / "out" / "video.json").read_text())
        return np.array(found["snippets"]["anomaly"]), found["settings"].get("smooth")

    raw, none = scored("model.pt")
    assert none is None
    for model, flags, sigma in (("model.pt", ["--smooth", 1.5], 1.5), ("smooth.pt", [], 1.5)):
        smooth, recorded = scored(model, *flags)
        np.testing.assert_allclose(smooth, gaussian_filter1d(raw, sigma), rtol=1e-5)
        assert recorded == sigma and "σ = 1.5 snippets" in (tmp_path / "out" / "video.html").read_text()
    again, none = scored("smooth.pt", "--smooth", 0)
    assert none is None and again.tolist() == raw.tolist()

    stream = ["--stream", tmp_path / "video.mp4", "--timeout", 0.5, "--device", "cpu", "--output", tmp_path / "live"]
    refused = detect([*stream, "--checkpoint", tmp_path / "model.pt", "--smooth", 1])
    assert refused.code == 2 and refused.err.count("\n") == 1 and "a stream does not have them yet" in refused.err
    live = detect([*stream, "--checkpoint", tmp_path / "smooth.pt"])
    assert live.code == 0 and "a stream is not smoothed" in live.err
