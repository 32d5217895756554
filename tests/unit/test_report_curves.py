"""The maths behind the page of a run, and the file of scores that it is made of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_curve, roc_auc_score
from small_report import OPTIONS, made_test

from clipfusionvad.datasets import UCF, XD
from clipfusionvad.report import curves
from clipfusionvad.report.scores import read_scores, save_scores


def by_frame(scores, videos):
    """Score of the first branch, truth and snippet of every single frame of all videos."""
    rows, start = [], 0
    for video, truth in zip(scores, videos.truth.frames, strict=True):
        count = video.anomaly.shape[1]
        for frame, abnormal in enumerate(truth):
            snippet = min(frame // 16, count - 1)
            rows.append((video.anomaly[0, snippet], abnormal, start + snippet))
        start += count
    return tuple(np.array(column) for column in zip(*rows, strict=True))


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_curves_are_those_of_single_frames(seed):
    scores, videos = made_test(4, seed=seed)
    pooled = curves.pool(scores, videos)
    score, truth, _ = by_frame(scores, videos)
    roc = curves.roc(pooled.anomaly[0], pooled.positives, pooled.frames)
    for x, y, threshold in zip(*roc, strict=True):
        taken = score >= threshold
        assert (x, y) == pytest.approx((taken[truth == 0].mean(), taken[truth == 1].mean()))
    assert np.trapezoid(roc.y, roc.x) == pytest.approx(roc_auc_score(truth, score))
    found = curves.precision_recall(pooled.anomaly[0], pooled.positives, pooled.frames)
    precision, recall, thresholds = precision_recall_curve(truth, score)
    assert np.allclose(found.x, recall) and np.allclose(found.y, precision)
    assert np.allclose(found.thresholds[:-1], thresholds)
    assert -np.sum(np.diff(found.x) * found.y[:-1]) == pytest.approx(average_precision_score(truth, score))
    # The best threshold is the best of all.
    gains = {t: (score[truth == 1] >= t).mean() - (score[truth == 0] >= t).mean() for t in np.unique(score)}
    assert gains[curves.best_threshold(roc)] == pytest.approx(max(gains.values()))


def test_curves_need_frames_of_both_kinds_and_a_video_needs_frames():
    for positives in (np.zeros(3, int), np.full(3, 16)):
        assert curves.roc(np.array([0.1, 0.2, 0.3]), positives, np.full(3, 16)) is None
        assert curves.precision_recall(np.array([0.1, 0.2, 0.3]), positives, np.full(3, 16)) is None
    assert np.isnan(curves.video_error(np.ones(2), np.zeros(2), np.zeros(2)))


@given(st.integers(2, 3000), st.integers(2, 100), st.integers(0, 100))
def test_thinned_curve_stays_close(count, points, seed):
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.random((2, count)), axis=1)
    whole = curves.Curve(x, y, np.arange(count))
    thin = curves.thin(whole, points)
    assert len(thin.x) <= max(points, 2) and {0, count - 1} <= set(thin.thresholds)
    assert np.isin(thin.thresholds, whole.thresholds).all() and (np.diff(thin.thresholds) > 0).all()
    # A monotone curve is at most a step of its way from its neighbours that were kept.
    way = x + y
    assert np.diff(thin.x + thin.y).max() <= (way[-1] - way[0]) / (points - 1) + 2 * np.diff(way).max() + 1e-9


@pytest.mark.parametrize("dataset", [UCF, XD], ids=["ucf", "xd"])
def test_confusion_counts_frames_one_by_one(dataset):
    scores, videos = made_test(10, dataset=dataset, seed=4)
    pooled = curves.pool(scores, videos)
    found = curves.class_confusion(dataset.labels, pooled)
    probabilities = np.concatenate([video.classes for video in scores])
    score, truth, snippets = by_frame(scores, videos)
    expected = np.zeros((len(dataset.labels),) * 2, int)
    places = [(index, frame) for index, frames in enumerate(videos.truth.frames) for frame in range(len(frames))]
    for value, abnormal, snippet, (video, frame) in zip(score, truth, snippets, places, strict=True):
        best = max(range(1, len(dataset.labels)), key=lambda c: probabilities[snippet, c])
        taken = best if value >= found.threshold else 0
        named = zip(videos.truth.segments[video], videos.truth.labels[video], strict=True)
        # A frame of two classes is one of each.
        classes = {label for (start, end), label in named if start <= frame < end} if abnormal else {dataset.labels[0]}
        for label in classes:
            expected[dataset.labels.index(label), taken] += 1
    assert found.labels == dataset.labels and (found.table == expected).all()
    assert expected[1:, 1:].sum() > 0


def test_confusion_without_classes_has_two_of_them():
    scores, videos = made_test(classes=False)
    found = curves.class_confusion(UCF.labels, curves.pool(scores, videos))
    score, truth, _ = by_frame(scores, videos)
    assert found.labels == ["Normal", "anomalous"]
    np.testing.assert_array_equal(found.table, confusion_matrix(truth, score >= found.threshold))


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("truth", [True, False])
def test_scores_come_back(tmp_path, classes, truth):
    scores, videos = made_test(classes=classes, truth=truth)
    save_scores(tmp_path / "s.npz", scores, videos, OPTIONS)
    found = read_scores(tmp_path / "s.npz")
    assert [(e.video, e.label) for e in found.videos.entries] == [(e.video, e.label) for e in videos.entries]
    for one, other in zip(found.scores, scores, strict=True):
        assert (one.anomaly == other.anomaly).all()
        assert one.classes is None if not classes else (one.classes == other.classes).all()
    assert found.options == OPTIONS and found.environment["packages"]["torch"]
    assert (found.videos.anomalous == videos.anomalous).all() and found.videos.dataset.labels == UCF.labels
    old, new = videos.truth, found.videos.truth
    assert (new is not None) == truth
    if truth:
        assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(old.frames, new.frames, strict=True))
        assert (old.segments, old.labels) == (new.segments, new.labels)
