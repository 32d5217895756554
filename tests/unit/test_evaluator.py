"""Scores and metrics of whole test sets against the plain, frame-by-frame way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipfusionvad import create_model
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.truth import Truth
from clipfusionvad.datasets import XD
from clipfusionvad.engine.evaluator import VideoDataset, VideoScores, evaluate, evaluate_videos, score_videos
from clipfusionvad.metrics import corrected_detection_map, detection_map, frame_metrics
from clipfusionvad.models import base as method

CPU = torch.device("cpu")
COUNTS = (1, 5, 31, 32, 33, 64, 70, 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    options = {"embed_dim": 64, "visual_width": 64, "visual_length": 32, "attn_window": 8}
    return create_model("clipfusionvad", XD.prompts, clip="toy", **options)


@pytest.fixture(scope="module")
def features():
    return [np.random.default_rng(n).standard_normal((n, 64)).astype(np.float16) for n in COUNTS]


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_videos_scored_together_equal_videos_scored_alone(model, features, monkeypatch, at_once):
    monkeypatch.setattr(method, "SNIPPETS_AT_ONCE", dict.fromkeys(("cpu", "cuda"), at_once * model.visual_length))
    together = score_videos(model, features, CPU)
    assert [video.anomaly.shape for video in together] == [(2, n) for n in COUNTS]
    for video, scores in zip(features, together, strict=True):
        anomaly, classes = model.score_video(video)
        np.testing.assert_allclose(scores.anomaly[0], anomaly, atol=1e-6)
        np.testing.assert_allclose(scores.classes, classes, atol=1e-5)


def test_bf16_scores_are_those_of_fp32_up_to_its_rounding(model, features):
    full, half = (score_videos(model, features, CPU, precision) for precision in ("fp32", "bf16"))
    for exact, rounded in zip(full, half, strict=True):
        assert rounded.anomaly.dtype == np.float32 and not np.array_equal(exact.anomaly, rounded.anomaly)
        np.testing.assert_allclose(rounded.anomaly, exact.anomaly, atol=0.03)
        np.testing.assert_allclose(rounded.classes, exact.classes, atol=0.03)


@pytest.fixture
def judged(tmp_path):
    """Random scores of four videos whose true lengths are cut, exact, held, and normal."""
    rng = np.random.default_rng(1)
    labels = ["B1-0-0", "B1-G-0", "G-0-0", "A"]
    snippets, frames = [4, 6, 3, 5], [55, 96, 52, 80]
    entries = [Entry(tmp_path / f"v{i}__0.npy", label, i + 2) for i, label in enumerate(labels)]
    scores = [VideoScores(rng.random((2, n)), rng.dirichlet(np.ones(7), n).astype(np.float32)) for n in snippets]
    segments = [[(10, 40)], [(0, 20), (50, 90)], [(5, 30)], [(0, 80)]]
    truth = [np.zeros(n, np.uint8) for n in frames]
    for video in range(3):
        for start, end in segments[video]:
            truth[video][start:end] = 1
    videos = VideoDataset(entries, XD, 4, Truth(truth, segments, [["B1"], ["B1", "G"], ["G"], ["A"]]))
    return scores, videos


def hold(curve, frames):
    """Scores repeated 16 times, cut or held to the true number of frames."""
    repeated = np.repeat(curve, 16, axis=0)
    return np.concatenate([repeated, np.repeat(curve[-1:], max(frames - len(repeated), 0), axis=0)])[:frames]


def test_metrics_of_both_protocols_equal_those_of_frames(judged):
    scores, videos = judged
    metrics = evaluate(scores, videos)
    truth = np.concatenate(videos.truth.frames)
    anomalous = np.concatenate([np.full(len(f), i < 3) for i, f in enumerate(videos.truth.frames)])
    for branch in (0, 1):
        curves = [hold(s.anomaly[branch], len(f)) for s, f in zip(scores, videos.truth.frames, strict=True)]
        expected = frame_metrics(np.concatenate(curves), truth, anomalous)
        for name, value in expected.items():
            assert metrics[f"{name}{branch + 1}"] == pytest.approx(value, abs=1e-12)
    classes = [hold(s.classes, len(f)) for s, f in zip(scores, videos.truth.frames, strict=True)]
    released = detection_map(classes, videos.truth.segments, videos.truth.labels, XD.labels)
    assert metrics["map"] == {str(iou): pytest.approx(value) for iou, value in released["map"].items()}
    assert metrics["map_average"] == pytest.approx(released["average"])

    # The clean protocol reports the corrected map.
    paper, clean = metrics, evaluate(scores, videos, "clean")
    corrected = corrected_detection_map(classes, videos.truth.segments, videos.truth.labels, XD.labels)
    assert clean["map_average"] == pytest.approx(corrected["anomalous_only"]["average"])
    assert clean["map_anomalous_only"] == paper["map_anomalous_only"]
    assert paper["map_average"] == paper["map_released"]["average"]
    assert {k: v for k, v in clean.items() if "auc" in k} == {k: v for k, v in paper.items() if "auc" in k}


def test_video_level_metrics(judged):
    scores, videos = judged
    for index, video in enumerate(scores):
        video.anomaly[0] = 0.9 if index < 3 else 0.1
        video.anomaly[1] = 0.1 if index < 3 else 0.9
    metrics = evaluate_videos(scores, videos)
    assert (metrics["auc1"], metrics["ap1"], metrics["auc2"]) == (1, 1, 0)
