"""Compute the metrics of many bootstrap resamples of the test videos at once.

A resample draws V of V videos with replacement. Videos are drawn whole, because their frames are not independent.
A resample is the number of times each video was drawn, so nothing is repeated: scores are ranked once, and their
frames are weighted by their video's count. R resamples, V videos, n snippets.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from clipfusionvad.metrics.detection import IOUS, Hits

_CHUNK = 2**20  # elements of a (resamples, snippets) table that are held at a time (8 MB)


def draw_videos(videos: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each video is drawn, (1 + R, V) float64; the first row is the test set itself, all ones."""
    if videos < 1:
        raise ValueError(f"cannot draw from {videos} videos")
    drawn = np.random.default_rng(seed).multinomial(videos, np.full(videos, 1 / videos), resamples)
    return np.concatenate([np.ones((1, videos)), drawn])


def resampled_ranking(
    scores: np.ndarray, positives: np.ndarray, frames: np.ndarray, video: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return AUC, AP (step) and AP (trapezoid) of each resample, (R,) each, in 0..1.

    They are NaN where the resample's frames are all normal or all abnormal.
    Arguments (n,) as in ``snippet_metrics``, and the index of each snippet's video; ``weights`` (R, V) from
    ``draw_videos``. Each number equals scikit-learn's on the repeated frames.
    """
    from scipy.sparse import csr_matrix

    order = np.argsort(-scores, kind="stable")
    order = order[frames[order] > 0]
    ranked, video, frames, positives = scores[order], video[order], frames[order], positives[order]
    hit = np.flatnonzero(positives)
    if not len(hit):
        return np.full(len(weights), np.nan), np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    # Only thresholds with abnormal frames matter; all scores between two of them are merged.
    level = np.cumsum(np.append(False, ranked[1:] != ranked[:-1]))
    holds = np.zeros(level[-1] + 1, dtype=bool)
    holds[level[hit]] = True
    begins = np.flatnonzero(np.append(True, holds[1:] | holds[:-1]))
    kept = np.flatnonzero(holds[begins])
    step = np.searchsorted(begins, level, side="right") - 1
    # The frames of each video at each threshold step: sparse (steps, V).
    counts = csr_matrix((frames.astype(np.float64), (step, video)), shape=(len(begins), weights.shape[1]))
    held = np.searchsorted(kept, step[hit]), video[hit]
    hits = csr_matrix((positives[hit].astype(np.float64), held), shape=(len(kept), weights.shape[1]))

    auc, ap, ap_trapezoid = np.empty((3, len(weights)))
    for part in _parts(len(weights), len(begins)):
        drawn = np.ascontiguousarray(weights[part].T)
        counted, gained = counts @ drawn, hits @ drawn
        seen, found = np.cumsum(counted, axis=0), np.cumsum(gained, axis=0)
        normal = seen[-1] - found[-1]
        counted, seen = counted[kept], seen[kept]
        tied, before = counted - gained, seen - counted
        with np.errstate(invalid="ignore", divide="ignore"):
            # Normal frames ranked below, and half of those that tie.
            auc[part] = (gained * (normal - seen + found + tied / 2)).sum(axis=0) / (found[-1] * normal)
            ap[part] = (gained * found / np.maximum(seen, 1)).sum(axis=0) / found[-1]
            # The precision at the threshold above: the curve begins at recall 0 with precision 1.
            above = np.where(before > 0, (found - gained) / np.maximum(before, 1), 1)
            ap_trapezoid[part] = (ap[part] + (gained * above).sum(axis=0) / found[-1]) / 2
        ap[part][normal == 0] = ap_trapezoid[part][normal == 0] = np.nan
    return auc, ap, ap_trapezoid


def resampled_detection(hits: Hits, weights: np.ndarray, classes: int, variant: str) -> np.ndarray:
    """Return the average detection mAP (R,) of each resample, in percent; NaN where no class is left to average.

    ``variant`` is "released" (``hits`` without a ``normal_label``), "normal_matched" or "anomalous_only" (with one).
    Each number is that of the repeated videos, whose equal scores are put in order of time before they are repeated.
    """
    shape = (weights.shape[1], classes)
    truth, predicted = np.zeros(shape), np.zeros(shape)
    np.add.at(truth, (hits.truth_video, hits.truth_label), 1)
    np.add.at(predicted, (hits.video, hits.label), 1)
    first = 0
    if variant == "anomalous_only":
        first, weights = 1, weights * (truth[:, 1:].sum(axis=1) > 0)
    total = weights @ truth
    parts = _parts(len(weights), len(hits.video))
    ap = np.concatenate([_resampled_ap(hits, weights[part], total[part]) for part in parts])
    if variant == "released":
        return 100 * ap.mean(axis=1) * (weights @ predicted > 0).all(axis=1)
    judged = total[:, first:] > 0
    with np.errstate(invalid="ignore"):
        return 100 * np.where(judged, ap[:, first:], 0).sum(axis=1) / judged.sum(axis=1)


def _resampled_ap(hits: Hits, weights: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return AP (r, C), averaged over the IoUs: sum of precisions at hits / truth segments ``total`` (r, C)."""
    rows = np.flatnonzero(hits.hit.any(axis=0))
    drawn = np.ascontiguousarray(weights.T)
    label, own = hits.label[rows], drawn[hits.video[rows]]
    seen = _before(np.cumsum(drawn[hits.video], axis=0), drawn[hits.video], hits.label)[rows].astype(np.int64)
    # A prediction drawn w times adds w hits, with precisions (F + j) / (S + j), j = 1 … w.
    harmonic = np.append(0, np.cumsum(1 / np.arange(1, seen.max(initial=0) + own.max(initial=0) + 2)))
    steps = harmonic[seen + own.astype(np.int64)] - harmonic[seen]
    ap = np.zeros((total.shape[1], len(weights)))
    for hit in hits.hit[:, rows]:
        counted = own * hit[:, None]
        found = _before(np.cumsum(counted, axis=0), counted, label)
        np.add.at(ap, label, hit[:, None] * (own + (found - seen) * steps) / len(IOUS))
    return ap.T / np.maximum(total, 1)


def _before(sums: np.ndarray, own: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return the running sum before each row within its class, for rows ordered by class."""
    before = sums - own
    return before - before[np.searchsorted(label, label)]


def _parts(count: int, width: int) -> Iterator[slice]:
    """Yield slices of ``count`` rows, ``_CHUNK`` elements at a time."""
    step = max(1, _CHUNK // max(width, 1))
    return (slice(start, start + step) for start in range(0, count, step))


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the interval that leaves out equal shares of the values on both sides; NaN without values."""
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_p_value(differences: Sequence[float] | np.ndarray) -> float:
    """Return the two-sided p of "no difference": twice the smaller share of values on one side of 0, plus one."""
    values = np.asarray(differences)
    rarer = min(np.count_nonzero(values <= 0), np.count_nonzero(values >= 0))
    return min(1.0, 2 * (1 + rarer) / (1 + len(values)))
