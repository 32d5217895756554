"""Detection mAP on intervals, beside a plain version that walks and compares single frames."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad.datasets import DATASETS
from clipfusionvad.metrics import IOUS, corrected_detection_map, detection_map


def plain_segments(curve):
    """[(score, start, end)] of one class's frames in one video."""
    top = sorted(curve, key=lambda value: np.nan_to_num(value, nan=-np.inf), reverse=True)[: len(curve) // 16]
    total = np.float32(0)
    for value in top:
        total += value
    if not top or np.isnan(curve).any() or not total > 0:
        return []
    mean = total / np.float32(len(top))
    # float64 of numpy, not of Python: a comparison with the latter would round it to float32.
    threshold = np.float64(max(curve)) - 0.6 * np.float64(max(curve) - min(curve))
    found, run = [], []
    for frame, value in enumerate([*curve, -np.inf]):
        if value > threshold:
            run.append(frame)
        else:
            if len(run) >= 2:
                found.append((max(curve[frame] for frame in run) + np.float32(0.7) * mean, run[0], run[-1] + 1))
            run = []
    return found


def plain_ap(found, truth, iou):
    """AP of one class from found (score, video, frame set), best first, and truth (video, frame set)."""
    wanted, hits, ap, truth = len(truth), 0, 0.0, list(truth)
    for place, (_, video, frames) in enumerate(found, start=1):
        best, chosen = 0.0, None
        for candidate in truth:
            overlap = len(frames & candidate[1]) / len(frames | candidate[1])
            if candidate[0] == video and overlap >= iou and overlap > best:
                best, chosen = overlap, candidate
        if chosen:
            truth.remove(chosen)
            hits += 1
            ap += hits / place
    return ap / wanted if wanted else 0.0


def plain_aps(class_probs, segments, labels, class_labels):
    """{IoU: [AP of every class]}, None where nothing of a class is predicted."""
    aps = {iou: [] for iou in IOUS}
    for column, label in enumerate(class_labels):
        found = [
            (score, video, set(range(start, end)))
            for video, probs in enumerate(class_probs)
            for score, start, end in plain_segments(list(probs[:, column]))
        ]
        found.sort(key=lambda segment: -segment[0])
        truth = [
            (video, set(range(int(start), int(end))))
            for video, (spans, names) in enumerate(zip(segments, labels, strict=True))
            for (start, end), name in zip(spans, names, strict=True)
            if name == label
        ]
        for iou in IOUS:
            aps[iou].append(plain_ap(found, truth, iou) if found else None)
    return aps


def assert_released(result, aps):
    for iou, values in aps.items():
        assert result["per_class"][iou] == pytest.approx([value or 0 for value in values], abs=1e-12)
        mean = 0 if None in values else 100 * sum(values) / len(values)
        assert result["map"][iou] == pytest.approx(mean, abs=1e-10)
    assert result["average"] == pytest.approx(np.mean(list(result["map"].values())), abs=1e-10)


@st.composite
def benchmarks(draw, max_videos=4):
    """(class_probs and frames per snippet, segments, labels, class_labels), awkward in drawn ways."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    class_labels = ["Normal", *(f"class{c}" for c in range(1, draw(st.integers(2, 14))))]
    levels = draw(st.sampled_from([4, 50, None]))  # few levels give ties of values and of scores
    tails = draw(st.sampled_from(["whole", "cut", "held", "ragged"]))
    awkward = draw(st.sampled_from(["none", "nan", "constant", "zero", "short"]))
    class_probs, frames, segments, labels = [], [], [], []
    for _ in range(draw(st.integers(1, max_videos))):
        rows = int(rng.integers(1, 14))
        probs = rng.random((rows, len(class_labels))).astype(np.float32)
        probs = probs if levels is None else np.round(probs * levels) / np.float32(levels)
        column = rng.integers(len(class_labels))
        if awkward == "nan":
            probs[rng.integers(rows), column] = np.nan
        elif awkward in ("constant", "zero"):
            probs[:, column] = 0.5 if awkward == "constant" else 0
        count = np.full(rows, 16)
        if tails == "ragged":
            count = rng.integers(0, 20, rows)
        elif tails != "whole":
            count[-1] = rng.integers(0, 16) if tails == "cut" else rng.integers(17, 60)
        if awkward == "short":
            count //= rng.integers(2, 9)
        bounds = rng.integers(0, 16 * rows + 20, (rng.integers(0, 5), 2))
        bounds = bounds if rng.random() < 0.1 else np.sort(bounds, axis=1)  # now and then backwards: no frames
        class_probs.append(probs)
        frames.append(count)
        segments.append(bounds.astype(str).tolist() if rng.random() < 0.5 else bounds.tolist())
        labels.append(rng.choice([*class_labels, "A"], len(bounds)).tolist())
    return class_probs, frames, segments, labels, class_labels


def repeat(class_probs, frames):
    return [np.repeat(probs, count, axis=0) for probs, count in zip(class_probs, frames, strict=True)]


@given(benchmarks())
def test_equals_the_plain_version(case):
    class_probs, frames, *truth = case
    full, options = repeat(class_probs, frames), {"unknown_labels": "ignore"}
    aps = plain_aps(full, *truth)
    assert_released(detection_map(full, *truth, **options), aps)
    assert_released(detection_map(class_probs, *truth, frames=frames, **options), aps)
    # Rows that stand for a frame each.
    assert_released(detection_map(class_probs, *truth, **options), plain_aps(class_probs, *truth))
    # --exclude-normal cuts predictions, not truth.
    leading = next((i for i, names in enumerate(truth[1]) if set(names) <= {"A", "Normal"}), len(full))
    result = detection_map(class_probs, *truth, exclude_normal=True, frames=frames, **options)
    assert_released(result, plain_aps(full[:leading], *truth))


@given(benchmarks())
def test_corrected_variants(case):
    class_probs, frames, segments, labels, class_labels = case
    full = repeat(class_probs, frames)
    named = [["Normal" if name == "A" else name for name in names] for names in labels]
    anomalous = [video for video, names in enumerate(named) if set(names) - {"Normal"}]
    kept = [[column[video] for video in anomalous] for column in (full, segments, named)]
    expected = {
        "normal_matched": (plain_aps(full, segments, named, class_labels), 0),
        "anomalous_only": (plain_aps(*kept, class_labels), 1),
    }
    results = corrected_detection_map(class_probs, segments, labels, class_labels, frames=frames)
    assert set(results) == set(expected)
    for name, (aps, first) in expected.items():
        counted = [c for c in range(first, len(class_labels)) if any(class_labels[c] in names for names in named)]
        for iou in IOUS:
            values = np.full(len(class_labels), np.nan)
            values[counted] = [aps[iou][c] or 0 for c in counted]
            assert results[name]["per_class"][iou] == pytest.approx(values, abs=1e-12, nan_ok=True)
            mean = 100 * values[counted].mean() if counted else np.nan
            assert results[name]["map"][iou] == pytest.approx(mean, abs=1e-10, nan_ok=True)


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        ([("16", "48")], [50, 50, 50, 50, 50]),  # predicted exactly
        ([(16, 80)], [50, 50, 50, 50, 50]),  # 32 of 64 frames: reaches 0.5
        ([(16, 81)], [50, 50, 50, 50, 0]),  # 32 of 65 does not
        ([(48, 64)], [0, 0, 0, 0, 0]),  # touches
        ([(16, 48), (16, 48)], [25, 25, 25, 25, 25]),  # one prediction finds one segment only
    ],
)
def test_hand_computed_overlaps(truth, expected):
    # Threshold 0.9 - 0.6 * 0.8 = 0.42: the run is frames 16 to 48. The normal class has no truth, so it halves the AP.
    event, frames = np.array([0.1, 0.9, 0.9, 0.1]), [np.full(4, 16)]
    probs = [np.stack([1 - event, event], axis=1)]
    found = detection_map(probs, [truth], [["Fire"] * len(truth)], ["Normal", "Fire"], frames=frames)
    assert list(found["map"].values()) == pytest.approx(expected)


@pytest.mark.parametrize("dataset", [d for d in DATASETS.values() if d.anomalous_test_videos], ids=lambda d: d.name)
@pytest.mark.parametrize("more", [0, 1])
def test_exclude_normal_keeps_the_released_number_of_videos(dataset, more):
    videos, classes = dataset.anomalous_test_videos + more, len(dataset.labels)
    probs = np.tile([[0.1], [0.9], [0.1]], (1, classes))
    # The only truth is in the last video, and in every class.
    segments = [[]] * (videos - 1) + [[(16, 32)] * classes]
    labels = [[]] * (videos - 1) + [dataset.labels]
    frames = [np.full(3, 16)] * videos
    result = detection_map([probs] * videos, segments, labels, dataset.labels, exclude_normal=True, frames=frames)
    assert (result["average"] > 0) == (more == 0)


@pytest.mark.parametrize("class_probs", [[], [np.empty((0, 2))], [np.ones((15, 2))], [np.full((32, 2), np.inf)]])
def test_nothing_to_find(class_probs):
    segments, labels = [[(0, 16)]], [["Fire"]]
    assert detection_map(class_probs, segments, labels, ["Normal", "Fire"])["average"] == 0
    assert detection_map(class_probs, [], [], ["Normal", "Fire"])["average"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [["Flood"]]}, "video 0 has the truth label 'Flood'"),
        ({"labels": [["Fire", "Fire"]]}, "video 0 has 1 truth segments but 2 truth labels"),
        ({"labels": []}, "1 videos have truth segments but 0"),
        ({"segments": [[("a", "b")]]}, r"video 0: \('a', 'b'\) is not a pair of frame numbers"),
        ({"segments": [[(1, 2, 3)]]}, "video 0"),
        ({"class_probs": [np.ones((4, 3))]}, r"class_probs\[0\] has shape \(4, 3\), not \(frames, 2\)"),
        ({"frames": [np.ones(3)]}, "one number per row"),
        ({"frames": []}, "one number per row"),
        ({"frames": [np.array([1, 2, 3, -1])]}, "fewer than 0 frames"),
    ],
)
def test_errors(changes, message):
    good = {"class_probs": [np.ones((4, 2))], "segments": [[(0, 2)]], "labels": [["Fire"]]}
    with pytest.raises(ValueError, match=message):
        detection_map(**{**good, **changes}, class_labels=["Normal", "Fire"])


@pytest.mark.parametrize("given", [None, "ignore", "error"])
@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS)
def test_unknown_labels_follow_the_dataset(dataset, given):
    ignored = (given or dataset.unknown_truth_label) == "ignore"
    with contextlib.nullcontext() if ignored else pytest.raises(ValueError, match="Flood"):
        detection_map([], [[(0, 2)]], [["Flood"]], dataset.labels, **({"unknown_labels": given} if given else {}))
