"""Compute the metrics of a run on many resamples of its test videos, from its stored scores."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipfusionvad.datasets import NORMAL_IN_TRUTH
from clipfusionvad.engine.evaluator import HEADLINE_MAP
from clipfusionvad.io.errors import UserError
from clipfusionvad.metrics.bootstrap import resampled_detection, resampled_ranking
from clipfusionvad.metrics.detection import detection_hits
from clipfusionvad.report.curves import PooledScores, pool
from clipfusionvad.report.results import RUN_SCORES, TEST_SCORES
from clipfusionvad.report.scores import TestResult, read_scores

_VARIANTS = ("released", "normal_matched", "anomalous_only")


def read_test_result(folder: Path) -> TestResult:
    """Read the scores of a run or a test, sorted by the names of its videos.

    Raises ``UserError`` where there are none, where they are damaged, and where the truth is unknown.
    """
    path = next((folder / name for name in (RUN_SCORES, TEST_SCORES) if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no {RUN_SCORES}: test its model into a folder (--output-dir) and give that")
    tested = read_scores(path)
    if tested.videos.truth is None:
        raise UserError(f"scores {path} hold no frame truth, so no metric can be resampled")
    names = [entry.video for entry in tested.videos.entries]
    return tested.only(sorted(range(len(names)), key=names.__getitem__))


def fingerprints(tested: TestResult) -> tuple[str, str]:
    """Return hashes of the videos (names, labels, classes) and of their truth: equal ones allow pairing."""
    videos, truth = tested.videos, tested.videos.known_truth
    named = [[entry.video, entry.label] for entry in videos.entries]
    frames = b"".join(np.packbits(frames > 0).tobytes() for frames in truth.frames)
    lengths = [len(frames) for frames in truth.frames]
    return (
        hashlib.sha256(repr((named, videos.dataset.labels)).encode()).hexdigest(),
        hashlib.sha256(repr((lengths, truth.segments, truth.labels)).encode() + frames).hexdigest(),
    )


def resampled_metrics(
    tested: TestResult, weights: np.ndarray, wanted: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Return the metrics of ``evaluate`` and ``evaluate_classes`` in percent, (R,) each, NaN where undefined.

    ``weights`` (R, V): how often each video was drawn. ``wanted`` are names of metrics; None: all that the scores
    allow, which are ranking of the branches, ``mauc``, ``mean_ap``, and averages of detection mAP over IoUs.
    """

    def needed(*names: str) -> bool:
        return wanted is None or not set(names).isdisjoint(wanted)

    pooled = pool(tested.scores, tested.videos)
    video = np.repeat(np.arange(len(pooled.snippets)), pooled.snippets)
    anomalous = tested.videos.anomalous[video]
    found: dict[str, np.ndarray] = {}
    for branch, scores in enumerate(pooled.anomaly, start=1):
        if needed(f"auc{branch}", f"ap{branch}"):
            auc, ap = resampled_ranking(scores, pooled.positives, pooled.frames, video, weights)
            found |= {f"auc{branch}": 100 * auc, f"ap{branch}": 100 * ap}
        if needed(f"ano_auc{branch}"):
            inside = pooled.positives[anomalous], pooled.frames[anomalous], video[anomalous]
            found[f"ano_auc{branch}"] = 100 * resampled_ranking(scores[anomalous], *inside, weights)[0]
    if pooled.classes is not None and needed("mauc", "mean_ap"):
        found |= _class_means(pooled, pooled.classes, video, weights)
    if pooled.classes is not None and needed("map_average", *(f"map_{variant}@average" for variant in _VARIANTS)):
        found |= _detection(tested, pooled, pooled.classes, weights)
    return {name: values for name, values in found.items() if needed(name)}


def _class_means(
    pooled: PooledScores, classes: np.ndarray, video: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Return in each resample the mean over the classes that occur in it."""
    ranked = np.array(
        [
            resampled_ranking(classes[:, column], pooled.truth[:, column], pooled.frames, video, weights)
            for column in range(1, classes.shape[1])
            if pooled.truth[:, column].any()
        ]
    ).reshape(-1, 2, len(weights))
    there = np.isfinite(ranked)
    with np.errstate(invalid="ignore"):
        mauc, mean_ap = np.where(there, ranked, 0).sum(axis=0) / there.sum(axis=0)
    return {"mauc": 100 * mauc, "mean_ap": 100 * mean_ap}


def _detection(
    tested: TestResult, pooled: PooledScores, classes: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    truth, labels = tested.videos.known_truth, tested.videos.dataset.labels
    ends = np.cumsum(pooled.snippets)[:-1]
    frames = np.split(pooled.frames, ends)
    inputs = (np.split(classes, ends), truth.segments, truth.labels, labels, frames)
    hits = {
        variant: detection_hits(*inputs, None if variant == "released" else NORMAL_IN_TRUTH) for variant in _VARIANTS
    }
    found = {variant: resampled_detection(hits[variant], weights, len(labels), variant) for variant in _VARIANTS}
    protocol = str(tested.options.get("protocol", "paper"))
    if protocol not in HEADLINE_MAP:
        raise UserError(f"a run's protocol is {protocol!r}; it may be {', '.join(HEADLINE_MAP)}")
    headline = HEADLINE_MAP[protocol]
    return {"map_average": found[headline]} | {f"map_{name}@average": values for name, values in found.items()}
