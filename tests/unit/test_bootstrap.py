"""Metrics of resampled videos, against the metrics of repeated videos computed the plain way."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from clipfusionvad.metrics import corrected_detection_map, detection_map
from clipfusionvad.metrics.bootstrap import (
    draw_videos,
    percentile_interval,
    resampled_detection,
    resampled_ranking,
    sign_p_value,
)
from clipfusionvad.metrics.detection import detection_hits


@st.composite
def judged_videos(draw):
    """(scores, positives, frames, video, weights); few distinct scores, videos without snippets, and without draws."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    videos, size = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    scores = rng.integers(0, draw(st.integers(1, 40)), size) / 64
    frames = rng.integers(0, draw(st.integers(1, 20)), size)
    positives = rng.integers(0, frames + 1) * (rng.random(size) < draw(st.sampled_from([0.1, 0.9])))
    return scores, positives, frames, rng.integers(0, videos, size), draw_videos(videos, 5, int(rng.integers(99)))


def repeated_frames(scores, positives, frames, video, weights):
    """Truth and score of every frame of a resample, copy by copy."""
    truth, ranked = [], []
    for index, copies in enumerate(weights.astype(int)):
        for _ in range(copies):
            for snippet in np.flatnonzero(video == index):
                truth += [1] * positives[snippet] + [0] * (frames[snippet] - positives[snippet])
                ranked += [scores[snippet]] * frames[snippet]
    return truth, ranked


@given(judged_videos())
def test_auc_and_ap_are_those_of_scikit_learn_on_repeated_frames(case):
    *arrays, weights = case
    auc, ap = resampled_ranking(*arrays, weights)
    for row, drawn in enumerate(weights):
        truth, ranked = repeated_frames(*arrays, drawn)
        if len(set(truth)) < 2:
            assert math.isnan(auc[row]) and math.isnan(ap[row])
            continue
        assert auc[row] == pytest.approx(roc_auc_score(truth, ranked), abs=1e-12)
        assert ap[row] == pytest.approx(average_precision_score(truth, ranked), abs=1e-12)


def test_parts_do_not_change_the_numbers(monkeypatch):
    rng = np.random.default_rng(0)
    scores, frames, video = rng.random(50), np.full(50, 16), np.repeat(np.arange(10), 5)
    arrays = scores, rng.integers(0, 17, 50), frames, video, draw_videos(10, 40, 3)
    whole = resampled_ranking(*arrays)
    monkeypatch.setattr("clipfusionvad.metrics.bootstrap._CHUNK", 130)
    np.testing.assert_allclose(whole, resampled_ranking(*arrays), rtol=1e-13)


CLASSES = ["normal", "fire", "flood"]


def detected(rng, videos):
    """(class_probs, segments, labels) of videos with one or two segments each, normal ones among them."""
    probs, segments, labels = [], [], []
    for video in range(videos):
        frames = int(rng.integers(10, 80))
        probs.append(rng.dirichlet(np.ones(3), frames).astype(np.float32))
        cut = sorted(rng.choice(frames, 3, replace=False).tolist())
        own = [[0, frames]] if video % 3 == 0 else [[cut[0], cut[1]], [cut[1], cut[2]]]
        segments.append(own)
        labels.append(["A"] if video % 3 == 0 else rng.choice(CLASSES[1:], 2).tolist())
    return probs, segments, labels


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_detection_map_is_that_of_repeated_videos(seed, videos):
    case = detected(np.random.default_rng(seed), videos)
    weights = draw_videos(videos, 6, seed)
    released = detection_hits(*case, CLASSES)
    corrected = detection_hits(*case, CLASSES, normal_label="A")
    hits = {"released": released, "normal_matched": corrected, "anomalous_only": corrected}
    found = {name: resampled_detection(own, weights, 3, name) for name, own in hits.items()}
    for row, drawn in enumerate(weights):
        copies = np.repeat(np.arange(videos), drawn.astype(int))
        repeated = [[part[index] for index in copies] for part in case]
        expected = {"released": detection_map(*repeated, CLASSES, unknown_labels="ignore")}
        expected |= corrected_detection_map(*repeated, CLASSES)
        for name, values in found.items():
            assert values[row] == pytest.approx(expected[name]["average"], abs=1e-8, nan_ok=True), name


def test_a_draw_takes_as_many_videos_as_there_are():
    drawn = draw_videos(7, 100, 5)
    assert drawn.shape == (101, 7) and (drawn[0] == 1).all() and (drawn.sum(axis=1) == 7).all()
    np.testing.assert_array_equal(drawn, draw_videos(7, 100, 5))
    assert (drawn != draw_videos(7, 100, 6)).any()
    with pytest.raises(ValueError, match="no videos"):
        draw_videos(0, 1, 0)


def test_p_of_no_difference():
    assert sign_p_value(np.zeros(9)) == 1
    assert sign_p_value(np.ones(99)) == sign_p_value(-np.ones(99)) == pytest.approx(0.02)
    assert sign_p_value([1] * 94 + [-1] * 5) == pytest.approx(0.12)
    assert sign_p_value([]) == 1


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=50))
def test_an_interval_lies_within_the_values_and_holds_their_median(values):
    low, high = percentile_interval(np.array(values))
    assert min(values) <= low <= np.median(values) <= high <= max(values)
    assert all(map(math.isnan, percentile_interval(np.array([]))))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """The AUC of videos drawn from a known distribution, over and over: 95 % intervals should hold it so often."""
    rng = np.random.default_rng(11)
    true_auc, held = 0.5 * (1 + math.erf(1 / 2)), 0
    for trial in range(120):
        positives = np.repeat([0, 1], 30)
        scores = rng.normal(size=60) + positives
        weights = draw_videos(60, 300, trial)
        aucs = resampled_ranking(scores, positives, np.ones(60, int), np.arange(60), weights)[0]
        low, high = percentile_interval(np.array(aucs[1:]))
        held += low <= true_auc <= high
    assert 0.85 < held / 120 <= 1
