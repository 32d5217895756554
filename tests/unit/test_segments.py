"""Segments: against a slow loop, whatever the scores, and online as at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad.io.errors import UserError
from clipfusionvad.metrics.segments import OnlineSegments, Span, Thresholds, find_segments, find_spans

LABELS = ["normal", "fire", "fight"]
# Few values, so that scores lie exactly on a threshold often.
SCORES = st.lists(st.sampled_from([0.0, 0.2, 0.39, 0.4, 0.45, 0.5, 0.9]), max_size=60)
THRESHOLDS = st.builds(
    Thresholds,
    high=st.sampled_from([0.5, 0.9]),
    low=st.sampled_from([0.2, 0.4, 0.5]),
    min_seconds=st.sampled_from([0.0, 0.5, 0.7, 1.0, 3.0]),
    merge_seconds=st.sampled_from([0.0, 0.5, 0.8, 1.0, 2.0]),
)
RATES = st.sampled_from([10.0, 20.0, 25.0, 27.00003, 30.067])


def video(scores, last):
    """Scores as an array, bounds in frames, and class probabilities that differ from snippet to snippet."""
    bounds = np.arange(len(scores) + 1) * 16
    bounds[-1] -= (16 - last) if len(scores) else 0
    rng = np.random.default_rng(len(scores))
    return np.array(scores), rng.dirichlet(np.ones(3), size=len(scores)), bounds


def span(bounds, fps):
    return Span(*map(int, bounds), *map(float, bounds / fps))


def slow_spans(anomaly, bounds, fps, thresholds):
    runs, inside = [], False
    for index, score in enumerate(anomaly):
        if not inside and score >= thresholds.high:
            inside = True
            runs.append([index, index + 1])
        elif inside and score >= thresholds.low:
            runs[-1][1] = index + 1
        else:
            inside = False
    merged = []
    for first, last in runs:
        if merged and (bounds[first] - bounds[merged[-1][1]]) / fps <= thresholds.merge_seconds + 1e-7:
            merged[-1][1] = last
        else:
            merged.append([first, last])
    whole = bounds[-1] / fps
    least = min(thresholds.min_seconds, whole)
    return [span for span in merged if (bounds[span[1]] - bounds[span[0]]) / fps >= least - 1e-7]


@given(SCORES, THRESHOLDS, RATES, st.integers(1, 16))
def test_spans_are_those_of_a_slow_loop(scores, thresholds, fps, last):
    anomaly, _, bounds = video(scores, last)
    assert find_spans(anomaly, bounds / fps, thresholds).tolist() == slow_spans(anomaly, bounds, fps, thresholds)


@given(SCORES, THRESHOLDS, RATES, st.integers(1, 16))
def test_snippet_by_snippet_gives_the_same_segments(scores, thresholds, fps, last):
    anomaly, classes, bounds = video(scores, last)
    online = OnlineSegments(LABELS, thresholds)
    alerts = []
    for index in range(len(anomaly)):
        alerts += online.add(span(bounds[index : index + 2], fps), anomaly[index], classes[index])
    alerts += online.finish()
    assert [alert.kind for alert in alerts] == ["start", "end"] * (len(alerts) // 2)
    expected = find_segments(anomaly, classes, bounds, bounds / fps, LABELS, thresholds)
    for start, end, other in zip(alerts[::2], alerts[1::2], expected, strict=True):
        one = end.segment
        assert start.segment.start_frame == one.start_frame
        assert (one.start_frame, one.end_frame, one.label) == (other.start_frame, other.end_frame, other.label)
        assert one.confidence == pytest.approx(other.confidence) and one.peak == other.peak
        assert one.class_probability == pytest.approx(other.class_probability)


def test_an_alert_comes_as_soon_as_a_segment_counts_and_its_end_once_no_gap_could_be_merged():
    online = OnlineSegments(LABELS, Thresholds(0.5, 0.4, min_seconds=2, merge_seconds=1))
    kinds = []
    for index, score in enumerate([0.1, 0.6, 0.45, 0.3, 0.3, 0.6, 0.3]):
        kinds.append([alert.kind for alert in online.add(Span(16 * index, 16 * index + 16, index, index + 1), score)])
    assert kinds == [[], [], ["start"], [], ["end"], [], []]


def test_a_segment_says_when_what_and_how_surely():
    anomaly = np.array([0.1, 0.6, 0.9, 0.45, 0.1])
    classes = np.array([[1, 0, 0], [0, 0.4, 0.6], [0.6, 0.4, 0], [0.1, 0.6, 0.3], [1, 0, 0]])
    bounds = np.array([0, 16, 32, 48, 64, 71])
    (segment,) = find_segments(anomaly, classes, bounds, bounds / 27.00003, LABELS, Thresholds())
    assert (segment.start_frame, segment.end_frame) == (16, 64)
    assert segment.start == pytest.approx(16 / 27.00003) and segment.end == pytest.approx(64 / 27.00003)
    assert segment.confidence == pytest.approx((0.6 + 0.9 + 0.45) / 3) and segment.peak == 0.9
    # Fire by its mean 1.4 / 3, though another class leads in a snippet.
    assert segment.label == "fire" and segment.class_probability == pytest.approx(1.4 / 3)
    (plain,) = find_segments(anomaly, None, bounds, bounds / 27.00003, [], Thresholds())
    assert plain.label is None and plain.class_probability is None


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ((None, None), (0.5, 0.4)),
        ((0.3, None), (0.3, 0.3)),
        ((0.45, None), (0.45, 0.4)),
        ((None, 0.6), (0.6, 0.6)),
        ((None, 0.0), (0.5, 0.0)),
        ((0.0, None), (0.0, 0.0)),
        ((0.7, 0.6), (0.7, 0.6)),
    ],
)
def test_a_threshold_that_is_not_given_does_not_contradict_the_other(given, used):
    found = Thresholds.of(*given, 1.0, 2.0)
    assert (found.high, found.low, found.min_seconds, found.merge_seconds) == (*used, 1.0, 2.0)


def test_a_low_threshold_above_the_high_one_is_refused():
    with pytest.raises(UserError, match="0.6.*0.5"):
        Thresholds.of(0.5, 0.6, 1.0, 1.0)


@pytest.mark.parametrize(
    ("shares", "unsure"),
    [((0.7, 0.12, 0.1), True), ((0.7, 0.12, 0.06), False), ((0.9, 0.04), False), ((0.1, 0.3, 0.2), True)],
)
def test_a_class_is_unsure_if_another_anomalous_one_has_more_than_half_of_its_probability(shares, unsure):
    classes, labels = np.array([shares, shares]), ["normal", "fire", "fight"][: len(shares)]
    bounds = np.array([0, 16, 32])
    (segment,) = find_segments(np.array([0.8, 0.7]), classes, bounds, bounds / 16, labels, Thresholds())
    assert (segment.label, segment.class_unsure) == ("fire", unsure)
    assert segment.class_probability == pytest.approx(shares[1]) and segment.confidence == pytest.approx(0.75)
