"""The metrics of a run on many resamples of its test videos, from the scores that it keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
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
    """The scores of a run or a test, its videos in the order of their names, whatever that of their list was.

    ``UserError`` where there are none, where they are damaged, and where the truth is not known.
    """
    path = next((folder / name for name in (RUN_SCORES, TEST_SCORES) if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no {RUN_SCORES}: test its model into a folder (--output-dir) and give that")
    tested = read_scores(path)
    if tested.videos.truth is None:
        raise UserError(f"scores {path} come without frame truth, so no metric can be resampled")
    names = [entry.video for entry in tested.videos.entries]
    return tested.only(sorted(range(len(names)), key=names.__getitem__))


def fingerprints(tested: TestResult) -> tuple[str, str]:
    """Hashes of the videos (names, labels, classes) and of their truth: runs can be paired where both agree."""
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
    """The metrics of ``evaluate`` and ``evaluate_classes`` in percent, (R,) each, NaN where they have no value.

    ``weights`` (R, V): how often each video was drawn. Without ``wanted`` all that the scores allow: ranking of the
    branches, ``mauc``, ``mean_ap``, and the averages over IoUs of detection mAP.
    """
    found: dict[str, np.ndarray] = {}
    for names, compute in _groups(tested, weights):
        if wanted is None or set(names) & set(wanted):
            scaled = {name: values if name.startswith("map") else 100 * values for name, values in compute().items()}
            found |= {name: values for name, values in scaled.items() if wanted is None or name in wanted}
    return found


_Group = tuple[tuple[str, ...], Callable[[], dict[str, np.ndarray]]]


def _groups(tested: TestResult, weights: np.ndarray) -> list[_Group]:
    """Names of metrics that are computed together, and how."""
    pooled = pool(tested.scores, tested.videos)
    video = np.repeat(np.arange(len(pooled.snippets)), pooled.snippets)
    anomalous = tested.videos.anomalous[video]
    groups: list[_Group] = []
    for branch, scores in enumerate(pooled.anomaly, start=1):
        arrays = (scores, pooled.positives, pooled.frames, video)
        within = [array[anomalous] for array in arrays]
        for names, chosen in (((f"auc{branch}", f"ap{branch}"), arrays), ((f"ano_auc{branch}",), within)):
            groups.append((names, partial(_ranking, names, chosen, weights)))
    if pooled.classes is not None:
        groups.append((("mauc", "mean_ap"), partial(_class_means, pooled, pooled.classes, video, weights)))
        variants = ("map_average", *(f"map_{variant}@average" for variant in _VARIANTS))
        groups.append((variants, partial(_detection, tested, pooled, pooled.classes, weights)))
    return groups


def _ranking(names: Sequence[str], arrays: Sequence[np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray]:
    scores, positives, frames, video = arrays
    return dict(zip(names, resampled_ranking(scores, positives, frames, video, weights), strict=False))


def _class_means(
    pooled: PooledScores, classes: np.ndarray, video: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """In each resample the mean over the classes that occur in it."""
    columns = [column for column in range(1, classes.shape[1]) if pooled.truth[:, column].any()]
    shape = (len(columns), 2, len(weights))
    ranked = np.array(
        [
            resampled_ranking(classes[:, column], pooled.truth[:, column], pooled.frames, video, weights)
            for column in columns
        ]
    ).reshape(shape)
    there = np.isfinite(ranked)
    with np.errstate(invalid="ignore"):
        mauc, mean_ap = np.where(there, ranked, 0).sum(axis=0) / there.sum(axis=0)
    return {"mauc": mauc, "mean_ap": mean_ap}


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
