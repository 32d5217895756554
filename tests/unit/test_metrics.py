"""Metrics of frames, classes, whole and resampled test sets, against scikit-learn and repeated scores and videos."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import auc as area_below
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from clipfusionvad import create_model
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.truth import Truth, frames_from_segments
from clipfusionvad.datasets import XD
from clipfusionvad.engine import evaluator
from clipfusionvad.engine.evaluator import VideoDataset, VideoScores, evaluate, score_videos
from clipfusionvad.metrics import bootstrap, count_frames, frame_metrics, smooth_scores, snippet_metrics, video_score
from clipfusionvad.metrics.detection import corrected_detection_map, detection_hits, detection_map
from clipfusionvad.models import base as method


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


def trapezoid(truth, scores):
    """Area under the linearly joined precision-recall curve, as RTFM, UR-DMU and PEL4VAD compute it."""
    precision, recall, _ = precision_recall_curve(truth, scores)
    return area_below(recall, precision)


JUDGES = {"auc": roc_auc_score, "ap": average_precision_score, "ap_trapezoid": trapezoid}


@given(snippets_of_frames())
def test_snippets_give_what_scikit_learn_gives_on_frames(case):
    scores, gt, anomalous = repeated(*case)
    metrics = snippet_metrics(*case)
    assert frame_metrics(*repeated(*case)) == pytest.approx(metrics, rel=1e-12, nan_ok=True)
    cases = [(name, judge, np.ones(len(gt), bool)) for name, judge in JUDGES.items()]
    for name, judge, chosen in [*cases, ("ano_auc", roc_auc_score, anomalous)]:
        two_classes = 0 < gt[chosen].sum() < chosen.sum()
        expected = judge(gt[chosen], scores[chosen]) if two_classes else math.nan
        assert metrics[name] == pytest.approx(expected, rel=1e-12, abs=1e-14, nan_ok=True)
    normal = scores[~anomalous]
    assert metrics["far"] == pytest.approx(np.mean(normal > 0.5) if len(normal) else math.nan, nan_ok=True)


def test_the_two_average_precisions_differ_where_scores_saturate():
    scores, truth = [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0]
    metrics = frame_metrics(scores, truth)
    # Precision 3/4 up to recall 3/4, then 1/2: as steps, and joined from (0, 1) by lines.
    assert metrics["ap"] == pytest.approx(3 / 4 * 3 / 4 + 1 / 4 * 1 / 2)
    assert metrics["ap_trapezoid"] == pytest.approx(3 / 4 * (1 + 3 / 4) / 2 + 1 / 4 * (3 / 4 + 1 / 2) / 2)
    # A score of exactly 0.5 does not raise an alarm; the frames of anomalous videos do not count.
    assert frame_metrics([0.5, 0.6, 0.9], [0, 0, 1], [False, False, True])["far"] == 0.5


@pytest.mark.parametrize("sigma", [0.7, 2, 10])
def test_smoothing_is_a_gaussian_mean_over_the_mirrored_video(sigma):
    scores = np.random.default_rng(0).random((9, 3), dtype=np.float32)
    reach = int(4 * sigma + 0.5)
    weights = norm.pdf(np.arange(-reach, reach + 1), scale=sigma)
    padded = np.pad(scores, ((reach, reach), (0, 0)), mode="symmetric")
    expected = [weights @ padded[row : row + 2 * reach + 1] / weights.sum() for row in range(len(scores))]
    smooth = smooth_scores(scores, sigma)
    np.testing.assert_allclose(smooth, expected, rtol=1e-6)
    np.testing.assert_allclose(smooth_scores(scores[:, 0], sigma), smooth[:, 0])
    np.testing.assert_allclose(smooth_scores([0, 1, 0], sigma), smooth_scores([0.0, 1.0, 0.0], sigma))
    assert smooth.dtype == np.float32 and smooth_scores(scores, 0) is scores


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
        ((frame_metrics, [0.1, 0.2], [0, 1, 1]), r"one length, not scores \(2,\), truth \(3,\)"),
        ((frame_metrics, [0.1, np.nan], [0, 1]), "score 1 is not finite"),
        ((frame_metrics, [0.1, 0.2], [0, 2]), "0 and 1"),
        ((frame_metrics, [0.1, 0.2], [0, 1], [True]), r"anomalous \(1,\)"),
        ((snippet_metrics, [0.1], [17], [16]), "abnormal frames"),
        ((snippet_metrics, [0.1], [-1], [16]), "abnormal frames"),
        ((count_frames, [0, 1, 1], 0), "no snippet for 3 frames"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        arguments[0](*arguments[1:])


@pytest.mark.parametrize("frames_per_snippet", [1, 16])
def test_of_videos_with_overlapping_events_of_several_classes(tmp_path, frames_per_snippet):
    rng = np.random.default_rng(0)
    names = ["v0__#1_label_A", "v1__#1_label_B1-0-0", "v2__#1_label_B1-G-0"]
    labels = [["A"], ["B1"], ["B1", "G", "B1"]]
    unit = frames_per_snippet
    snippets = [9, 12, 20]
    segments = [[(0, 9 * unit)], [(2 * unit, 5 * unit)], [(0, 4 * unit), (3 * unit, 9 * unit), (3 * unit, 6 * unit)]]
    lengths = [n * unit for n in snippets]
    frames = [frames_from_segments(segments[i] if i else [], lengths[i]) for i in range(3)]
    entries = [Entry(tmp_path / f"{name}.npy", name.rpartition("_")[2], 2) for name in names]
    videos = VideoDataset(entries, XD, 4, Truth(frames, segments, labels), frames_per_snippet)
    scores = [VideoScores(rng.random((2, n)), rng.dirichlet(np.ones(7), n)) for n in snippets]
    found = evaluator.evaluate_classes(scores, videos)

    for label in ("B1", "G"):
        column = XD.labels.index(label)
        truth, curve = [], []
        for index, length in enumerate(lengths):
            own = zip(segments[index], labels[index], strict=True)
            truth += frames_from_segments([segment for segment, name in own if name == label], length).tolist()
            curve += np.repeat(scores[index].classes[:, column], unit).tolist()
        assert found["per_class"][label]["auc"] == pytest.approx(roc_auc_score(truth, curve))
        own = [index for index, name in enumerate(names) if label in name]
        truth = np.concatenate([frames[i] for i in own])
        curve = np.concatenate([np.repeat(scores[i].anomaly[0], unit) for i in own])
        assert found["per_class"][label]["video_auc"] == pytest.approx(roc_auc_score(truth, curve))
    assert found["per_class"].keys() == {"B1", "G"}
    assert found["mauc"] == pytest.approx(np.mean([found["per_class"][c]["auc"] for c in ("B1", "G")]))


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
    truth = [frames_from_segments(own if n != 80 else [], n) for own, n in zip(segments, frames, strict=True)]
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
        pooled = [video_score(video.anomaly[branch]) for video in scores]
        assert metrics[f"video_auc{branch + 1}"] == roc_auc_score(videos.anomalous, pooled)
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
    metrics = evaluator.evaluate_videos(scores, videos)
    assert (metrics["auc1"], metrics["ap1"], metrics["auc2"]) == (1, 1, 0)


@st.composite
def judged_videos(draw):
    """(scores, positives, frames, video, weights); few distinct scores, videos without snippets, and without draws."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    videos, size = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    scores = rng.integers(0, draw(st.integers(1, 40)), size) / 64
    frames = rng.integers(0, draw(st.integers(1, 20)), size)
    positives = rng.integers(0, frames + 1) * (rng.random(size) < draw(st.sampled_from([0.1, 0.9])))
    video = rng.integers(0, videos, size)
    return scores, positives, frames, video, bootstrap.draw_videos(videos, 5, int(rng.integers(99)))


@given(judged_videos())
def test_resampled_auc_and_ap_are_those_of_scikit_learn_on_repeated_frames(case):
    *snippets, video, weights = case
    found = dict(zip(JUDGES, bootstrap.resampled_ranking(*snippets, video, weights), strict=True))
    for row, drawn in enumerate(weights):
        rows = np.repeat(np.arange(len(video)), drawn.astype(int)[video])
        ranked, truth, _ = repeated(*(values[rows] for values in snippets), rows)
        for name, judge in JUDGES.items():
            expected = judge(truth, ranked) if len(set(truth)) > 1 else math.nan
            assert found[name][row] == pytest.approx(expected, abs=1e-12, nan_ok=True)


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
    weights = bootstrap.draw_videos(videos, 6, seed)
    released = detection_hits(*case, CLASSES)
    corrected = detection_hits(*case, CLASSES, normal_label="A")
    hits = {"released": released, "normal_matched": corrected, "anomalous_only": corrected}
    found = {name: bootstrap.resampled_detection(own, weights, 3, name) for name, own in hits.items()}
    for row, drawn in enumerate(weights):
        copies = np.repeat(np.arange(videos), drawn.astype(int))
        repeated = [[part[index] for index in copies] for part in case]
        expected = {"released": detection_map(*repeated, CLASSES, unknown_labels="ignore")}
        expected |= corrected_detection_map(*repeated, CLASSES)
        for name, values in found.items():
            assert values[row] == pytest.approx(expected[name]["average"], abs=1e-8, nan_ok=True), name


def test_a_draw_takes_as_many_videos_as_there_are():
    drawn = bootstrap.draw_videos(7, 100, 5)
    assert drawn.shape == (101, 7) and (drawn[0] == 1).all() and (drawn.sum(axis=1) == 7).all()
    np.testing.assert_array_equal(drawn, bootstrap.draw_videos(7, 100, 5))
    assert (drawn != bootstrap.draw_videos(7, 100, 6)).any()
    with pytest.raises(ValueError, match="0 videos"):
        bootstrap.draw_videos(0, 1, 0)


def test_p_of_no_difference():
    assert bootstrap.sign_p_value(np.zeros(9)) == 1
    assert bootstrap.sign_p_value(np.ones(99)) == bootstrap.sign_p_value(-np.ones(99)) == pytest.approx(0.02)
    assert bootstrap.sign_p_value([1] * 94 + [-1] * 5) == pytest.approx(0.12)
    assert bootstrap.sign_p_value([]) == 1


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=50))
def test_an_interval_lies_within_the_values_and_holds_their_median(values):
    low, high = bootstrap.percentile_interval(np.array(values))
    assert min(values) <= low <= np.median(values) <= high <= max(values)
    assert all(map(math.isnan, bootstrap.percentile_interval(np.array([]))))
