"""Detection mAP frame by frame, as the released test scripts compute it: everything anew for each IoU threshold.

Runs are found by a Python loop over all frames of each class, overlaps by sets of frame numbers.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from clipfusionvad.metrics import IOUS


class Found(NamedTuple):
    """A predicted segment [start, end) in frames."""

    score: float
    video: int
    start: int
    end: int


def detection_map(
    class_probs: Sequence[np.ndarray],
    segments: Sequence[Sequence[Sequence[int | str]]],
    labels: Sequence[Sequence[str]],
    class_labels: Sequence[str],
) -> list[float]:
    """mAP in percent at each of ``IOUS``: ``class_probs`` (frames, C) float32 of each video, truth as ours."""
    results = []
    for iou in tqdm(IOUS, "frame by frame", disable=None, leave=False):
        curves, video_scores = masked_curves(class_probs)
        aps = []
        for column, label in enumerate(class_labels):
            found = sorted(find_segments(curves, video_scores, column), key=lambda segment: -segment.score)
            if not found:
                aps = [0.0]
                break
            aps.append(average_precision(found, truth_of(label, segments, labels), iou))
        results.append(100 * float(np.mean(aps)))
    return results


def masked_curves(class_probs: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each video's curves, zero for classes without a score, and the scores: the mean of the top 1/16 of frames."""
    curves, scores = [], []
    for probs in class_probs:
        descending = -np.sort(-probs, axis=0)
        score = descending[: len(probs) // 16].mean(axis=0)
        curves.append(probs * (score > 0))
        scores.append(score)
    return curves, scores


def find_segments(curves: Sequence[np.ndarray], video_scores: Sequence[np.ndarray], column: int) -> Iterator[Found]:
    """Runs of frames above a threshold of the class's curve in each video, of at least two frames."""
    for video, (frames, scores) in enumerate(zip(curves, video_scores, strict=True)):
        curve = frames[:, column]
        threshold = np.max(curve) - 0.6 * np.float64(np.max(curve) - np.min(curve))
        above = np.concatenate([[0.0], (curve > threshold).astype(np.float32), [0.0]])
        steps = [above[frame] - above[frame - 1] for frame in range(1, len(above))]
        starts = [frame for frame, step in enumerate(steps) if step == 1]
        ends = [frame for frame, step in enumerate(steps) if step == -1]
        for start, end in zip(starts, ends, strict=True):
            if end - start >= 2:
                yield Found(np.max(curve[start:end]) + np.float32(0.7) * scores[column], video, start, end)


def truth_of(
    label: str, segments: Sequence[Sequence[Sequence[int | str]]], labels: Sequence[Sequence[str]]
) -> list[tuple[int, int, int]]:
    """(video, start, end) of every truth segment of a class."""
    return [
        (video, int(start), int(end))
        for video, (spans, names) in enumerate(zip(segments, labels, strict=True))
        for (start, end), name in zip(spans, names, strict=True)
        if name == label
    ]


def average_precision(found: Sequence[Found], truth: list[tuple[int, int, int]], iou: float) -> float:
    """Precisions at the hits over the truth segments; each segment takes the unused truth that it fits best."""
    unused, precisions = list(truth), []
    for place, segment in enumerate(found, start=1):
        frames, best, chosen = set(range(segment.start, segment.end)), 0.0, None
        for candidate in unused:
            if candidate[0] == segment.video:
                wanted = set(range(candidate[1], candidate[2]))
                overlap = len(frames & wanted) / len(frames | wanted)
                if overlap >= iou and overlap > best:
                    best, chosen = overlap, candidate
        if chosen is not None:
            unused.remove(chosen)
            precisions.append((len(precisions) + 1) / place)
    return sum(precisions) / len(truth) if truth else 0.0
