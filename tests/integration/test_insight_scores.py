"""Analyses of scores, against slow formulas over frames and thresholds one at a time."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_report import made_test, write_test
from tiny import quietly

from clipfusionvad.__main__ import main
from clipfusionvad.cli.insight import FROM_SCORES
from clipfusionvad.datasets import MSAD, UCF
from clipfusionvad.io.errors import UserError
from clipfusionvad.metrics import frame_metrics
from clipfusionvad.metrics.segments import Thresholds, find_spans
from clipfusionvad.report import scores as stored
from clipfusionvad.report.curves import class_confusion, pool
from clipfusionvad.tools.analysis import calibration
from clipfusionvad.tools.analysis.alarms import (
    alarm_curve,
    at_rate,
    at_recall,
    by_class,
    find_alarms,
    first_alarms,
    frame_axis,
    latencies,
)
from clipfusionvad.tools.analysis.classes import class_results, confuse_frames, confuse_videos

RULE = Thresholds(min_seconds=1.0, merge_seconds=1.0)


def made(**kind):
    scores, videos = made_test(**kind)
    return stored.TestResult({}, {}, scores, videos)


def by_frame(test, index, curve):
    """Scores of one video repeated for 16 frames, cut or extended to its true number of frames."""
    return curve[np.minimum(np.arange(len(test.videos.truth.frames[index])) // 16, len(curve) - 1)]


def slow_alarms(test, threshold, rule):
    """(video, start, end, false) of every alarm in frames of its video: the segments that detection finds."""
    rule, found = Thresholds(threshold, threshold, rule.min_seconds, rule.merge_seconds), []
    for index, video in enumerate(test.scores):
        truth = test.videos.truth.frames[index]
        bounds = np.minimum(np.arange(video.anomaly.shape[1] + 1) * 16, len(truth))
        bounds[-1] = len(truth)
        for start, end in bounds[find_spans(video.anomaly[0], bounds / 30, rule)]:
            found.append((index, start, end, not truth[start:end].any()))
    return found


@given(st.integers(0, 40), st.sampled_from([0.0, 0.6, 1.0, 2.0]), st.sampled_from([0.0, 0.6, 1.0, 3.0]))
@settings(max_examples=8)
def test_alarms_are_the_segments_that_detection_finds_and_latencies_their_distances(seed, least, gap):
    test, rule = made(videos=6, seed=seed), Thresholds(min_seconds=least, merge_seconds=gap)
    line = frame_axis(test, pool(test.scores, test.videos))
    offsets = np.cumsum(line.frames) - line.frames
    thresholds = np.array([2.0, 0.9, 0.7, 0.52, 0.3, 0.05])
    curve = np.concatenate([video.anomaly[0] for video in test.scores])
    alarms = find_alarms(line, curve, thresholds, rule)
    delays = first_alarms(line, alarms, len(thresholds))
    for row, threshold in enumerate(thresholds):
        slow = slow_alarms(test, threshold, rule)
        own = alarms.row == row
        expected = [(offsets[v] + start, offsets[v] + end, false) for v, start, end, false in slow]
        assert list(zip(alarms.start[own], alarms.end[own], alarms.abnormal[own] == 0, strict=True)) == expected
        for event, (start, end) in enumerate(line.events):
            hits = [max(first - start, 0) for first, last, _ in expected if first < end and last > start]
            assert delays[row, event] == (min(hits) if hits else np.inf)


def test_rates_of_a_curve_and_its_operating_points():
    test = made(videos=12, seed=3)
    pooled = pool(test.scores, test.videos)
    line = frame_axis(test, pooled)
    curve = alarm_curve(line, pooled.anomaly[0], RULE)
    assert (np.diff(curve.threshold) < 0).all()
    for name in ("recall", "normal_frames_under_alarm", "frame_recall"):
        assert (np.diff(curve[name]) >= 0).all() and curve[name].iloc[-1] == 1, "a lower threshold finds no less"
    hours = sum((frames == 0).sum() for frames in test.videos.truth.frames) / 30 / 3600
    for at in (0, 5, len(curve) // 2, len(curve) - 1):
        slow = slow_alarms(test, curve.threshold[at], RULE)
        assert curve.false_alarms_per_hour[at] == pytest.approx(sum(false for *_, false in slow) / hours)
        under = sum((test.videos.truth.frames[v][start:end] == 0).sum() for v, start, end, _ in slow)
        assert curve.normal_frames_under_alarm[at] == pytest.approx(under / hours / 30 / 3600)
    at = at_recall(curve, 0.7)
    assert curve.recall[at] >= 0.7 > curve.recall[at - 1]
    at, rates = at_rate(curve, 40), curve.false_alarms_per_hour.to_numpy()
    assert (rates[: at + 1] <= 40).all() and rates[at + 1] > 40
    assert at_rate(curve, -1) == -1 and at_recall(curve, 1.1) == -1


def test_latencies_of_a_class_are_those_of_its_events():
    test = made(videos=16, seed=5)
    found, truth = latencies(test, RULE, (200.0, 20.0)), test.videos.truth
    rows = {(rate, label): rest for rate, label, *rest in by_class(found).itertuples(index=False)}
    for rate in (20.0, 200.0):
        own = found.seconds[(found.rate == rate) & (found["class"] == UCF.labels[-1])].tolist()
        hits = [value for value in own if value < np.inf]
        events, missed, *_ = rows[rate, UCF.labels[-1]]
        assert (events, missed) == (len(own), 1 - len(hits) / len(own))
        assert rows[rate, "all"][0] == sum(name in UCF.labels[1:] for names in truth.labels for name in names)
    assert found.rate.is_monotonic_increasing and found.threshold.is_monotonic_decreasing


def test_class_results_are_those_of_the_frames_of_its_videos():
    test = made(videos=20, seed=2)
    results = class_results(test)
    for _, result in results.iterrows():
        own = [i for i, entry in enumerate(test.videos.entries) if entry.label == result["class"]]
        truth = np.concatenate([test.videos.truth.frames[i] for i in own])
        scores = np.concatenate([by_frame(test, i, test.scores[i].anomaly[0]) for i in own])
        found = frame_metrics(scores, truth)
        assert (result.videos, result.share_abnormal) == (len(own), pytest.approx(truth.mean()))
        assert (result.video_auc, result.video_ap) == (pytest.approx(found["auc"]), pytest.approx(found["ap"]))
    assert results.video_ap.is_monotonic_decreasing


def test_confusion_counts_every_frame_and_every_video():
    test = made(videos=14, seed=4)
    found = confuse_frames(test)
    # The page counts the same frames; its own test has the slow reference.
    page = class_confusion(UCF.labels, pool(test.scores, test.videos))
    assert found.table.tolist() == page.table.tolist() and found.threshold == page.threshold
    videos = confuse_videos(test)
    assert videos.table.sum(axis=1)[0] == 7 and videos.table.sum() == 14
    plain = made(videos=14, classes=False, dataset=MSAD)
    assert confuse_frames(plain).table.shape == (len(MSAD.labels), 2)
    assert confuse_videos(plain).table.sum() == 14


def slow_error(scores, truth, bins):
    """ECE over frames, equal-width bins."""
    place = np.minimum((scores * bins).astype(int), bins - 1)
    parts = [place == b for b in range(bins) if (place == b).any()]
    return sum(part.mean() * abs(scores[part].mean() - truth[part].mean()) for part in parts)


def test_calibration_errors_are_those_over_frames():
    test = made(videos=10, seed=6)
    pooled = pool(test.scores, test.videos)
    weights = pooled.anomaly[0].astype(np.float64), pooled.positives, pooled.frames
    scores = np.concatenate([by_frame(test, i, v.anomaly[0]) for i, v in enumerate(test.scores)]).astype(np.float64)
    truth = np.concatenate(test.videos.truth.frames)
    error = calibration.calibration_error(calibration.equal_width(*weights, 7))
    assert error == pytest.approx(slow_error(scores, truth, 7))
    assert calibration.brier(*weights) == pytest.approx(np.mean((scores - truth) ** 2))
    held = calibration.equal_mass(*weights, 5)
    assert held.frames.sum() == len(truth) and (np.diff(held.mean_score) > 0).all()
    assert held.frames.max() < 2 * len(truth) / 5
    total = sum(score * frames for score, frames in zip(held.mean_score, held.frames, strict=True))
    assert total == pytest.approx(scores.sum())


def test_the_temperature_is_the_one_that_was_put_on():
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.02, 0.98, 3000)
    frames = np.full(3000, 1000)
    positives = frames * probability
    hot = calibration.tempered(probability, 1 / 2.5)
    found = calibration.fit_temperature(hot, positives, frames)
    assert found == pytest.approx(2.5, rel=1e-4)
    np.testing.assert_allclose(calibration.tempered(hot, found), probability, atol=1e-3)


def test_a_half_is_scaled_by_the_truth_of_the_other_half_only():
    test = made(videos=12, seed=8)
    pooled = pool(test.scores, test.videos)
    after, temperatures = calibration.scale_by_halves(pooled.anomaly[0], pooled, test.videos.anomalous)
    order = {True: 0, False: 0}
    half = []
    for kind in test.videos.anomalous.tolist():
        half.append(order[kind] % 2)
        order[kind] += 1
    own = np.repeat(np.array(half) == 0, pooled.snippets)
    other = calibration.fit_temperature(
        pooled.anomaly[0][~own].astype(np.float64), pooled.positives[~own], pooled.frames[~own]
    )
    assert temperatures[0] == pytest.approx(other)
    np.testing.assert_allclose(after[own], calibration.tempered(pooled.anomaly[0][own], other), rtol=1e-6)


@pytest.mark.parametrize("analysis", FROM_SCORES)
@pytest.mark.parametrize("classes", [True, False])
def test_every_analysis_of_scores_writes_its_figure_and_numbers(analysis, classes, tmp_path):
    what = analysis.__name__
    write_test(tmp_path / "run", *made_test(videos=12, classes=classes))
    out = tmp_path / "out" / f"{what}.png"
    done = quietly(main, ["insight", what, str(tmp_path / "run"), "--output", str(out), "--formats", "svg"])
    assert done.code == 0, done.err
    assert out.read_bytes().startswith(b"\x89PNG") and b"<svg" in out.with_suffix(".svg").read_bytes()
    rows = list(csv.reader(out.with_suffix(".csv").open()))
    assert len(rows) > 1 and len({len(row) for row in rows}) == 1
    assert str(out) in done.out and "nan" not in done.out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["alarm", "x"], "did you mean 'alarms'"),
        (["alarms", "nowhere", "--output", "a.png"], "no such folder: nowhere"),
        (["alarms", "nowhere", "--output", "a.gif"], "must end in one of: .png, .pdf, .svg"),
        (["classes", "nowhere", "--output", "a.png", "--rates", "1"], "unknown argument '--rates'"),
        (["gates", "nowhere", "--output", "a.png"], "model file not found: nowhere"),
    ],
)
def test_wrong_commands_end_in_one_line(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = quietly(main, ["insight", *argv])
    assert done.code == 2 and said in done.err and len(done.err.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_without_truth_or_events_there_are_no_alarms(tmp_path):
    scores, videos = made_test(truth=False)
    with pytest.raises(ValueError):
        frame_axis(stored.TestResult({}, {}, scores, videos), pool(scores, videos))
    scores, videos = made_test()
    quiet = stored.TestResult({}, {}, scores, videos).only([1, 3])
    with pytest.raises(UserError, match="annotated events"):
        frame_axis(quiet, pool(quiet.scores, quiet.videos))
