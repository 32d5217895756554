"""The printed table and the pictures."""

import re

import numpy as np
import pytest

from clipfusionvad.data.lists import Entry
from clipfusionvad.data.truth import Truth
from clipfusionvad.datasets import DATASETS, UCF
from clipfusionvad.engine.evaluator import VideoDataset, VideoScores, evaluate
from clipfusionvad.engine.loggers import RunLog
from clipfusionvad.models import method_names
from clipfusionvad.report.plots import draw_score_curves, draw_training
from clipfusionvad.report.table import metrics_table, published


@pytest.fixture
def judged(tmp_path):
    rng = np.random.default_rng(0)
    labels = [*UCF.labels[1:], "Abuse", "Normal", "Normal", "Normal"]
    entries = [Entry(tmp_path / f"v{i}__5.npy", label, i + 2) for i, label in enumerate(labels)]
    scores = [VideoScores(rng.random((2, 8)), rng.dirichlet(np.ones(14), 8).astype(np.float32)) for _ in labels]
    truth = [np.repeat(np.arange(8) == 3, 16).astype(np.uint8) * (label != "Normal") for label in labels]
    segments = [[(0, 128)] if label == "Normal" else [(48, 64)] for label in labels]
    names = [["A"] if label == "Normal" else [label] for label in labels]
    return scores, VideoDataset(entries, UCF, 4, Truth(truth, segments, names))


def cells(table):
    """Values by row title."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return {title: values for title, *values in rows}


def test_the_table_holds_the_metrics_in_percent_and_the_papers_beside_them(judged):
    metrics = evaluate(*judged)
    table = cells(metrics_table({"last": metrics, "best": metrics}, {"auc1": 0.8677, "map@0.3": 6.4}))
    assert table["percent"] == ["last", "best", "paper"]
    assert table["AUC, coarse branch"] == [f"{100 * metrics['auc1']:.2f}"] * 2 + ["86.77"]
    assert table["Ano-AUC, fine branch"][0] == f"{100 * metrics['ano_auc2']:.2f}"
    assert table["detection mAP@0.3"] == [f"{metrics['map']['0.3']:.2f}"] * 2 + ["6.40"]
    assert table["corrected: anomalous videos only"][0] == f"{metrics['map_anomalous_only']['average']:.2f}"


def test_a_metric_that_is_undefined_is_a_dash_and_a_method_without_classes_has_no_map():
    table = cells(metrics_table({"here": {"auc1": 0.5, "ap1": float("nan"), "ano_auc1": None}}, {}))
    assert table == {
        "percent": ["here"],
        "AUC, coarse branch": ["50.00"],
        "AP, coarse branch": ["-"],
        "Ano-AUC, coarse branch": ["-"],
    }


def test_published_figures_are_of_known_methods_and_in_range():
    assert published("vadclip", "ucf")["auc1"] == 0.8802
    assert published("no such method", "ucf") == {}
    for method in method_names():
        for dataset in DATASETS:
            for name, value in published(method, dataset).items():
                assert 0 < value <= (100 if name.startswith("map") else 1), (method, dataset, name)


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize("videos", [1, 2, 17])
def test_score_curves_of_few_and_many_videos(judged, videos, tmp_path):
    scores, all_videos = judged
    truth = all_videos.truth
    part = VideoDataset(
        all_videos.entries[-videos:],
        UCF,
        4,
        Truth(truth.frames[-videos:], truth.segments[-videos:], truth.labels[-videos:]),
    )
    draw_score_curves(tmp_path / "scores.png", scores[-videos:], part)
    width, height = png_size(tmp_path / "scores.png")
    assert width > 1000 and (height > 800) == (videos > 6)


def test_training_curves(judged, tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2):
        log.log_step(step, 0, {"coarse": 0.5, "fine": 0.2}, lr=1e-3)
        log.log_evaluation({"step": step, "epoch": 0, "improved": False, "metrics": evaluate(*judged)})
    log.close()
    draw_training(tmp_path / "training.png", tmp_path)
    assert png_size(tmp_path / "training.png")[0] > 1000
