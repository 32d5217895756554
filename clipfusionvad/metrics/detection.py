"""Compute fine-grained detection mAP on intervals: the released procedure, and the one the papers describe.

Every step handles all videos and classes at once. A row is a run of equal frames, so single frames are never built.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from clipfusionvad.datasets import DATASETS, NORMAL_IN_TRUTH

IOUS = (0.1, 0.2, 0.3, 0.4, 0.5)

Bounds = Sequence[Sequence[Sequence[int | str]]]
Names = Sequence[Sequence[str]]

# Of the released procedure.
TOP_FRACTION = 16  # a video's class score is the mean of its top 1/16 of frames
DEPTH = 0.6  # segments are where the curve is above max - DEPTH * (max - min)
VIDEO_SHARE = 0.7  # of the video's class score, added to a segment's own
MIN_FRAMES = 2


class DetectionResult(TypedDict):
    """``map`` per IoU and their ``average`` in percent; AP (C,) ``per_class`` and IoU in 0..1."""

    map: dict[float, float]
    average: float
    per_class: dict[float, np.ndarray]


class Hits(NamedTuple):
    """Predicted segments ordered by class and descending score, whether each is a hit, and the truth."""

    video: np.ndarray  # (n,)
    label: np.ndarray  # (n,) class
    hit: np.ndarray  # (IoUs, n) bool
    truth_video: np.ndarray  # (m,)
    truth_label: np.ndarray  # (m,)


class _Rows(NamedTuple):
    """The rows of all videos, joined; a slot is a video that has rows."""

    curves: np.ndarray  # (C, R) float32
    slot: np.ndarray  # (R,) the slot of each row, 0 … S - 1
    first: np.ndarray  # (S,) first row of each slot
    size: np.ndarray  # (S,) rows of each slot
    video: np.ndarray  # (S,) index of the slot's video
    start: np.ndarray  # (R,) first frame of a row within its video
    end: np.ndarray  # (R,) one past its last frame


class _Spans(NamedTuple):
    """Segments [start, end) in frames, as columns of one length."""

    video: np.ndarray
    label: np.ndarray
    start: np.ndarray
    end: np.ndarray


def detection_map(
    class_probs: Sequence[ArrayLike],
    segments: Bounds,
    labels: Names,
    class_labels: Sequence[str],
    exclude_normal: bool = False,
    frames: Sequence[ArrayLike] | None = None,
    unknown_labels: Literal["ignore", "error"] | None = None,
) -> DetectionResult:
    """Return detection mAP exactly as the released test scripts of the VadCLIP family compute it, quirks included.

    Per video: ``class_probs`` (frames, C), used as float32; ``segments``, pairs [start, end) in frames, numbers or
    strings; ``labels``, one per segment. ``class_labels``: the C labels, normal first. With ``frames``, per video
    (rows,) integers, each row of ``class_probs`` counts as that many. Truth past their end counts as missed.

    Quirks kept:
    - the mean is over all C classes, also those without ground truth (AP 0); one without a prediction makes the mAP 0;
    - on UCF-Crime the truth calls normal "A" and the class list "Normal", so normal is never matched;
    - ``exclude_normal`` cuts only the predictions, to the anomalous videos at the head of the list;
    - a video of fewer than 16 frames, or a NaN in a class's curve, gives no segment there.
    One difference: equal scores keep the order of video and time, where the release sorts unstably.

    ``unknown_labels`` is the treatment of a truth label outside ``class_labels``; None is that of the release of the
    dataset with these ``class_labels``, and "error" for other class lists. Raises ``ValueError`` for such a label, for
    shapes that do not fit and for segment bounds that are not integers.
    """
    dataset = next((known for known in DATASETS.values() if known.labels == list(class_labels)), None)
    if unknown_labels is None:
        unknown_labels = dataset.unknown_truth_label if dataset else "error"
    if exclude_normal:
        normal = {NORMAL_IN_TRUTH, class_labels[0]}
        leading = itertools.takewhile(lambda names: not normal.issuperset(names), labels)
        kept = (dataset and dataset.anomalous_test_videos) or sum(1 for _ in leading)
        class_probs, frames = class_probs[:kept], None if frames is None else frames[:kept]
    hits = detection_hits(class_probs, segments, labels, class_labels, frames, None, unknown_labels)
    ap = _average_precision(hits, len(class_labels))
    every_class_found = len(np.unique(hits.label)) == len(class_labels)
    return _result(ap, ap.mean(axis=1) if every_class_found else np.zeros(len(IOUS)))


def corrected_detection_map(
    class_probs: Sequence[ArrayLike],
    segments: Bounds,
    labels: Names,
    class_labels: Sequence[str],
    frames: Sequence[ArrayLike] | None = None,
    normal_label: str = NORMAL_IN_TRUTH,
    unknown_labels: Literal["ignore", "error"] = "error",
) -> dict[str, DetectionResult]:
    """Return detection mAP as the papers describe it; inputs and errors as in ``detection_map``.

    ``"normal_matched"``: ``normal_label`` in the truth means ``class_labels[0]``; a class without any predicted segment
    has AP 0 and does not affect the others; the mean is over the classes that have ground truth. ``"anomalous_only"``
    also leaves out videos without an anomalous truth segment, and the normal class. NaN marks what is left out.
    """
    hits = detection_hits(class_probs, segments, labels, class_labels, frames, normal_label, unknown_labels)
    event = hits.truth_label > 0
    kept = np.isin(hits.video, hits.truth_video[event])
    found = (hits.video[kept], hits.label[kept], hits.hit[:, kept])
    anomalous = Hits(*found, hits.truth_video[event], hits.truth_label[event])
    results = {}
    for name, counted_hits in (("normal_matched", hits), ("anomalous_only", anomalous)):
        ap = _average_precision(counted_hits, len(class_labels))
        counted = np.bincount(counted_hits.truth_label, minlength=len(class_labels)) > 0
        mean = ap[:, counted].mean(axis=1) if counted.any() else np.full(len(IOUS), np.nan)
        results[name] = _result(np.where(counted, ap, np.nan), mean)
    return results


def detection_hits(
    class_probs: Sequence[ArrayLike],
    segments: Bounds,
    labels: Names,
    class_labels: Sequence[str],
    frames: Sequence[ArrayLike] | None = None,
    normal_label: str | None = None,
    unknown_labels: Literal["ignore", "error"] = "ignore",
) -> Hits:
    """Return which predicted segments hit the truth, independently in each video; inputs as in the functions above."""
    index = {label: c for c, label in enumerate(class_labels)} | ({normal_label: 0} if normal_label else {})
    truth = _read_truth(segments, labels, index, unknown_labels)
    return _match(*_find_segments(_join(class_probs, frames, len(class_labels))), truth, len(class_labels))


def _result(ap: np.ndarray, mean: np.ndarray) -> DetectionResult:
    return {
        "map": dict(zip(IOUS, (100 * mean).tolist(), strict=True)),
        "average": float(100 * mean.mean()),
        "per_class": dict(zip(IOUS, ap, strict=True)),
    }


def _read_truth(segments: Bounds, labels: Names, index: dict[str, int], unknown: str) -> _Spans:
    """Return the ground truth in list order; labels outside ``index`` are left out or, with "error", refused."""
    if len(segments) != len(labels):
        raise ValueError(f"{len(segments)} videos have truth segments but {len(labels)} have truth labels")
    rows = []
    for video, (spans, names) in enumerate(zip(segments, labels, strict=True)):
        if len(spans) != len(names):
            raise ValueError(f"video {video} has {len(spans)} truth segments but {len(names)} truth labels")
        for span, name in zip(spans, names, strict=True):
            if name in index:
                try:
                    start, end = map(int, span)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"video {video}: {span!r} is not a pair of frame numbers") from error
                rows.append((video, index[name], start, end))
            elif unknown == "error":
                raise ValueError(f"video {video} has the truth label {str(name)!r}, which is not a class")
    return _Spans(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)


def _join(class_probs: Sequence[ArrayLike], frames: Sequence[ArrayLike] | None, classes: int) -> _Rows:
    probs = [np.asarray(values, dtype=np.float32) for values in class_probs]
    for number, values in enumerate(probs):
        if values.ndim != 2 or values.shape[1] != classes:
            raise ValueError(f"class_probs[{number}] has shape {values.shape}, not (frames, {classes})")
    lengths = np.array([len(values) for values in probs], dtype=np.int64)
    rows = np.concatenate([*probs, np.empty((0, classes), np.float32)])
    video = np.repeat(np.arange(len(probs)), lengths)
    if frames is None:
        # Equal consecutive frames (16 of every snippet) become one row.
        new = np.ones(len(rows), dtype=bool)
        new[1:] = (rows[1:] != rows[:-1]).any(axis=1) | (video[1:] != video[:-1])
        kept = np.flatnonzero(new)
        count = np.diff(kept, append=len(rows))
    else:
        counts = [np.asarray(values) for values in frames]
        if [values.shape for values in counts] != [(length,) for length in lengths]:
            raise ValueError("frames must hold one number per row of class_probs, for every video")
        count = np.concatenate([*counts, np.empty(0, np.int64)]).astype(np.int64)
        if (count < 0).any():
            raise ValueError("a row cannot count as fewer than 0 frames")
        kept = np.flatnonzero(count)
        count = count[kept]
    present, first, slot, size = np.unique(video[kept], return_index=True, return_inverse=True, return_counts=True)
    end = np.cumsum(count)
    start = end - count
    origin = start[first][slot]
    return _Rows(np.ascontiguousarray(rows[kept].T), slot, first, size, present, start - origin, end - origin)


def _find_segments(rows: _Rows) -> tuple[_Spans, np.ndarray]:
    """Return the predicted segments, ordered by class, video and time, and their scores float32."""
    curves, slot = rows.curves, rows.slot
    video_score = _video_scores(rows)
    with np.errstate(invalid="ignore"):  # nothing exceeds the threshold of a NaN or infinite maximum
        high = np.maximum.reduceat(curves, rows.first, axis=1)
        low = np.minimum.reduceat(curves, rows.first, axis=1)
        # The released code takes the difference in float32 and the rest in float64.
        threshold = high - DEPTH * (high - low).astype(np.float64)
    # The released code zeroes the curves of such classes; a flat curve never exceeds its threshold.
    threshold[~(video_score > 0)] = np.inf
    # The largest float32 up to the threshold orders float32 numbers as it does.
    rounded = threshold.astype(np.float32)
    rounded = np.where(rounded > threshold, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    above = curves > np.repeat(rounded, rows.size, axis=1)

    border = slot[1:] != slot[:-1]
    opens, closes = above.copy(), above.copy()
    opens[:, 1:] &= ~above[:, :-1] | border
    closes[:, :-1] &= ~above[:, 1:] | border
    label, begin = np.divmod(np.flatnonzero(opens), curves.shape[1])
    last = np.flatnonzero(closes) % curves.shape[1]
    start, end = rows.start[begin], rows.end[last]

    # Maxima of the runs: every second interval between the flattened bounds.
    bounds = (label * curves.shape[1] + np.stack([begin, last + 1])).T.ravel()
    peak = np.maximum.reduceat(curves.ravel(), bounds[: np.searchsorted(bounds, curves.size)])[::2]
    score = peak + np.float32(VIDEO_SHARE) * video_score[label, slot[begin]]
    # No NMS: the released code applies it to the disjoint runs of a single threshold, so it removes none.
    long_enough = end - start >= MIN_FRAMES
    columns = (rows.video[slot[begin]], label, start, end)
    return _Spans(*(column[long_enough] for column in columns)), score[long_enough]


def _video_scores(rows: _Rows) -> np.ndarray:
    """Return the mean of the top floor(N / 16) frames of each class and slot: (C, S) float32, 0 where N < 16."""
    frames = rows.end - rows.start
    total = np.add.reduceat(frames, rows.first)
    top = total // TOP_FRACTION
    # An upper bound of the rows that hold the top frames, since no row is longer than the longest.
    longest = np.maximum.reduceat(frames, rows.first)
    needed = np.minimum(rows.size, -(-(top + longest * rows.size - total) // longest)) * (top > 0)
    # One integer holds a value and its frames: it sorts several times faster than indices.
    keys = _ordered(rows.curves.view(np.int32)).astype(np.int64) << 32 | frames
    leading = [_largest(keys[:, s : s + n], k) for s, n, k in zip(rows.first, rows.size, needed, strict=True)]
    keys = np.concatenate([keys[:, :0], *leading], axis=1)
    frames, values = keys & 0xFFFFFFFF, _ordered((keys >> 32).astype(np.int32)).view(np.float32)

    before = np.cumsum(frames, axis=1) - frames
    origin = (np.cumsum(needed) - needed)[needed > 0]
    before -= np.repeat(before[:, origin], needed[needed > 0], axis=1)
    taken = np.clip(np.repeat(top, needed) - before, 0, frames)
    # The released code adds float32 frames one by one, the highest first, and its rounding decides the order of close
    # segments. numpy adds in this order along the first axis of a C-ordered matrix.
    best = np.ascontiguousarray(np.repeat(values.ravel(), taken.ravel()).reshape(len(values), -1).T)
    means = np.zeros((len(top), len(values)), dtype=np.float32)
    for slot, end in enumerate(np.cumsum(top)):
        if top[slot]:
            best[end - top[slot] : end].mean(axis=0, out=means[slot])
    return means.T


def _largest(keys: np.ndarray, count: int) -> np.ndarray:
    """Return the ``count`` largest of each row in descending order."""
    rest = keys.shape[1] - count
    split = np.partition(keys, min(rest, keys.shape[1] - 1), axis=1)
    return np.sort(split[:, rest:], axis=1)[:, ::-1]


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Map the bits of float32 numbers to int32 in the order of the numbers, and back."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _average_precision(hits: Hits, classes: int) -> np.ndarray:
    """Return AP (IoUs, C): sum of the precisions at the hits / truth segments."""
    # Hits are ordered by (threshold, class, rank), so their count within the group gives their precision.
    threshold, at = np.nonzero(hits.hit)
    label = hits.label[at]
    group = threshold * classes + label
    nth = np.arange(1, len(group) + 1) - np.searchsorted(group, group)
    precision = nth / (at + 1 - np.searchsorted(hits.label, label))
    total = np.bincount(group, precision, minlength=len(IOUS) * classes).reshape(len(IOUS), classes)
    return total / np.maximum(np.bincount(hits.truth_label, minlength=classes), 1)


def _match(found: _Spans, score: np.ndarray, truth: _Spans, classes: int) -> Hits:
    """Match predictions, ordered by (class, video), with the truth.

    By descending score, each takes the unused truth segment of its class and video with the best sufficient IoU.
    """
    # By class and descending score; equal scores keep the order of video and time.
    keys = _ordered((0 - score).view(np.int32)).astype(np.int64) << 32 | np.arange(len(score))
    ends = np.cumsum(np.bincount(found.label, minlength=classes))
    order = np.concatenate([np.sort(part) for part in np.split(keys, ends)]) & 0xFFFFFFFF
    place = np.empty_like(order)
    place[order] = np.arange(len(order))

    # Pairs of a truth segment g and every prediction p of its class and video.
    videos = 1 + max(found.video.max(initial=0), truth.video.max(initial=0))
    key = found.label * videos + found.video
    low, high = (np.searchsorted(key, truth.label * videos + truth.video, side) for side in ("left", "right"))
    g = np.repeat(np.arange(len(low)), high - low)
    p = np.arange(len(g)) + np.repeat(high - np.cumsum(high - low), high - low)
    shared = np.minimum(found.end[p], truth.end[g]) - np.maximum(found.start[p], truth.start[g])
    shared = np.maximum(shared, 0)
    iou = shared / (found.end[p] - found.start[p] + np.maximum(truth.end[g] - truth.start[g], 0) - shared)

    # Matching is sequential and handles all thresholds together, one bit each.
    reached = np.searchsorted(IOUS, iou, side="right")
    pairs = np.flatnonzero(reached)
    pairs = pairs[np.lexsort((g[pairs], -iou[pairs], place[p[pairs]]))]
    hits, used = bytearray(len(order)), bytearray(len(low))
    columns = (place[p[pairs]], g[pairs], (1 << reached[pairs]) - 1)
    for at, segment, bits in zip(*(column.tolist() for column in columns), strict=True):
        new = bits & ~hits[at] & ~used[segment]
        hits[at] |= new
        used[segment] |= new

    hit = (np.frombuffer(hits, np.uint8) >> np.arange(len(IOUS))[:, None] & 1).astype(bool)
    return Hits(found.video[order], found.label[order], hit, truth.video, truth.label)
