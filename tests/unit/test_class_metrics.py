"""Class against rest, frame by frame, against scikit-learn on repeated scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from clipfusionvad.data.lists import Entry
from clipfusionvad.data.truth import Truth, frames_from_segments
from clipfusionvad.datasets import XD
from clipfusionvad.engine.evaluator import VideoDataset, VideoScores, evaluate_classes
from clipfusionvad.metrics import class_metrics


@given(st.integers(0, 10**6), st.integers(2, 5))
def test_equals_scikit_learn_on_frames(seed, classes):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, size=12)
    owner = rng.integers(0, classes, size=12)  # the class of each snippet's first frames
    positives = np.zeros((12, classes), int)
    positives[np.arange(12), owner] = rng.integers(0, counts + 1)
    probs = rng.random((12, classes)).round(1)  # with ties
    found = class_metrics(probs, positives, counts, [f"c{i}" for i in range(classes)])
    aucs, aps = [], []
    for column in range(1, classes):
        truth = np.concatenate([[1] * p + [0] * (n - p) for p, n in zip(positives[:, column], counts, strict=True)])
        if not truth.any():
            assert f"c{column}" not in found["per_class"]
            continue
        frames = np.repeat(probs[:, column], counts)
        if not truth.all():
            aucs.append(roc_auc_score(truth, frames))
            aps.append(average_precision_score(truth, frames))
            assert found["per_class"][f"c{column}"] == pytest.approx({"auc": aucs[-1], "ap": aps[-1]})
    expected = {"auc": np.mean(aucs) if aucs else np.nan, "ap": np.mean(aps) if aps else np.nan}
    assert found["mauc"] == pytest.approx(expected["auc"], nan_ok=True)
    assert found["mean_ap"] == pytest.approx(expected["ap"], nan_ok=True)


@pytest.mark.parametrize("frames_per_snippet", [1, 16])
def test_of_videos_with_overlapping_events_of_several_classes(tmp_path, frames_per_snippet):
    rng = np.random.default_rng(0)
    names = ["v0__#1_label_A", "v1__#1_label_B1-0-0", "v2__#1_label_B1-G-0"]
    labels = [["A"], ["B1"], ["B1", "G", "B1"]]
    unit = frames_per_snippet
    snippets = [9, 12, 20]
    segments = [[(0, 9 * unit)], [(2 * unit, 5 * unit)], [(0, 4 * unit), (3 * unit, 9 * unit), (3 * unit, 6 * unit)]]
    lengths = [n * unit for n in snippets]
    frames = [
        frames_from_segments([] if names[i].endswith("A") else segments[i], lengths[i]) for i in range(len(names))
    ]
    entries = [Entry(tmp_path / f"{name}.npy", name.rpartition("_")[2], 2) for name in names]
    videos = VideoDataset(entries, XD, 4, Truth(frames, segments, labels), frames_per_snippet)
    scores = [VideoScores(rng.random((2, n)), rng.dirichlet(np.ones(7), n)) for n in snippets]
    found = evaluate_classes(scores, videos)

    for label in ("B1", "G"):
        column = XD.labels.index(label)
        truth, curve = [], []
        for index, length in enumerate(lengths):
            own = np.zeros(length)
            for (start, end), name in zip(segments[index], labels[index], strict=True):
                own[start:end] = np.maximum(own[start:end], name == label)
            truth.append(own)
            curve.append(np.repeat(scores[index].classes[:, column], unit))
        expected = roc_auc_score(np.concatenate(truth), np.concatenate(curve))
        assert found["per_class"][label]["auc"] == pytest.approx(expected)
        own = [index for index, name in enumerate(names) if label in name]
        expected = roc_auc_score(
            np.concatenate([frames[i] for i in own]),
            np.concatenate([np.repeat(scores[i].anomaly[0], unit) for i in own]),
        )
        assert found["per_class"][label]["video_auc"] == pytest.approx(expected)
    assert found["per_class"].keys() == {"B1", "G"}
    assert found["mauc"] == pytest.approx(np.mean([found["per_class"][c]["auc"] for c in ("B1", "G")]))
