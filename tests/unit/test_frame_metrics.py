"""Frame metrics: against hand-computed values and scikit-learn, on frames and on snippets weighted by frames."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from clipfusionvad.metrics import count_frames, frame_metrics, snippet_metrics


@st.composite
def snippets_of_frames(draw, min_size=1):
    """(scores, positives, frames, anomalous) per snippet; few distinct scores, so that ties are common."""
    size = draw(st.integers(min_size, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.integers(0, draw(st.integers(1, 60)), size) / 64
    frames = rng.integers(0, draw(st.integers(1, 40)), size)
    return scores, rng.integers(0, frames + 1), frames, rng.random(size) < 0.5


def repeated(scores, positives, frames, anomalous):
    """The same case frame by frame, abnormal frames of a snippet first."""
    gt = np.concatenate([[], *(np.arange(n) < k for k, n in zip(positives, frames, strict=True))])
    return np.repeat(scores, frames), gt, np.repeat(anomalous, frames)


def test_hand_computed_values():
    # Of the four (normal, abnormal) pairs three are in order; the precisions at hits are 1 and 2/3.
    metrics = frame_metrics([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    assert metrics == {"auc": pytest.approx(0.75), "ap": pytest.approx((1 + 2 / 3) / 2)}


def test_ano_auc_takes_only_frames_of_anomalous_videos():
    scores, gt = [0.9, 0.8, 0.2, 0.3, 0.6], [0, 0, 0, 1, 0]
    metrics = frame_metrics(scores, gt, anomalous=[False, False, True, True, True])
    assert metrics["auc"] == pytest.approx(0.25)
    assert metrics["ano_auc"] == pytest.approx(0.5)


def test_released_truth_may_be_float_and_scores_float32():
    scores = np.array([0.1, 0.4, 0.35, 0.8], np.float32)
    assert frame_metrics(scores, np.array([0, 0, 1, 1], np.float32))["auc"] == pytest.approx(0.75)


@pytest.mark.parametrize("gt", [[0, 0, 0], [1, 1, 1], []])
def test_one_class_only_is_nan(gt):
    metrics = frame_metrics(np.linspace(0, 1, len(gt)), gt, np.ones(len(gt), bool))
    assert set(metrics) == {"auc", "ap", "ano_auc"}
    assert all(math.isnan(value) for value in metrics.values())


@given(snippets_of_frames())
def test_snippets_give_what_scikit_learn_gives_on_frames(case):
    scores, gt, anomalous = repeated(*case)
    metrics = snippet_metrics(*case)
    for names, chosen in ((("auc", "ap"), np.ones(len(gt), bool)), (("ano_auc",), anomalous)):
        for name, judge in zip(names, (roc_auc_score, average_precision_score), strict=False):
            two_classes = 0 < gt[chosen].sum() < chosen.sum()
            expected = judge(gt[chosen], scores[chosen]) if two_classes else math.nan
            assert metrics[name] == pytest.approx(expected, rel=1e-12, abs=1e-14, nan_ok=True)


@given(snippets_of_frames())
def test_snippets_weighted_by_frames_equal_repeated_scores(case):
    expected = frame_metrics(*repeated(*case))
    assert snippet_metrics(*case) == pytest.approx(expected, rel=1e-12, nan_ok=True)


@given(snippets_of_frames())
def test_auc_and_ap_depend_on_the_order_of_scores_only(case):
    scores, *rest = case
    expected = snippet_metrics(scores, *rest)
    assert snippet_metrics(np.exp(3 * scores) - 7, *rest) == pytest.approx(expected, rel=1e-12, nan_ok=True)


@given(snippets_of_frames(), st.randoms())
def test_order_of_snippets_does_not_matter(case, random):
    order = list(range(len(case[0])))
    random.shuffle(order)
    shuffled = snippet_metrics(*(column[order] for column in case))
    assert shuffled == pytest.approx(snippet_metrics(*case), rel=1e-12, nan_ok=True)


@given(snippets_of_frames())
def test_auc_of_negated_scores_is_the_complement(case):
    scores, *rest = case
    mirrored = snippet_metrics(-scores, *rest)["auc"]
    assert mirrored == pytest.approx(1 - snippet_metrics(scores, *rest)["auc"], abs=1e-12, nan_ok=True)


@pytest.mark.parametrize(
    ("length", "snippets", "frames"),
    [
        (48, 3, [16, 16, 16]),
        (40, 3, [16, 16, 8]),
        (70, 3, [16, 16, 38]),  # the last score is held
        (20, 3, [16, 4, 0]),  # snippets past the end
        (10, 1, [10]),
        (0, 2, [0, 0]),
        (0, 0, []),
    ],
)
def test_count_frames(length, snippets, frames):
    positives, counted = count_frames(np.ones(length), snippets)
    assert counted.tolist() == frames
    assert positives.tolist() == frames


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 20), st.integers(1, 20))
def test_count_frames_follows_repeat_then_cut_or_hold(gt, snippets, stride):
    gt = np.array(gt, dtype=np.float32)
    owner = np.minimum(np.arange(len(gt)) // stride, snippets - 1)
    positives, frames = count_frames(gt, snippets, stride)
    assert frames.tolist() == np.bincount(owner, minlength=snippets).tolist()
    assert positives.tolist() == np.bincount(owner, gt, minlength=snippets).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1, 0.2], [0, 1, 1]), r"one length, not scores \(2,\), truth \(3,\)"),
        (([0.1, np.nan], [0, 1]), "score 1 is not finite"),
        (([np.inf, 0.1], [0, 1]), "score 0 is not finite"),
        (([0.1, 0.2], [0, 2]), "0 and 1"),
        (([[0.1], [0.2]], [0, 1]), "one length"),
        (([0.1, 0.2], [0, 1], [True]), r"anomalous \(1,\)"),
    ],
)
def test_bad_frames(arguments, message):
    with pytest.raises(ValueError, match=message):
        frame_metrics(*arguments)


def test_bad_snippets():
    with pytest.raises(ValueError, match="abnormal frames"):
        snippet_metrics([0.1], [17], [16])
    with pytest.raises(ValueError, match="abnormal frames"):
        snippet_metrics([0.1], [-1], [16])
    with pytest.raises(ValueError, match="no snippet for 3 frames"):
        count_frames([0, 1, 1], 0)
