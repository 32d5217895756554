"""Compare two runs or two tests: equal bit for bit, or how far apart."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from clipfusionvad.engine.checkpoint import read_model_file
from clipfusionvad.engine.run_folder import BEST, EVALUATIONS, LAST, LOSSES, METRICS, flat_metrics, seeds_in
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_json, read_text
from clipfusionvad.report.results import TEST_METRICS, TEST_SCORES
from clipfusionvad.report.scores import read_scores


class Agreement(NamedTuple):
    """The comparison of one file: ``exact`` if equal bit for bit, else the ``distance`` (inf: not comparable).

    The distance is relative for losses and weights, absolute for scores and for metrics in 0..1; ``text`` describes it.
    """

    exact: bool
    distance: float
    text: str


def compare_folders(old: Path, new: Path, is_test: bool) -> dict[str, Agreement]:
    """Compare two tests, or two trainings of one seed or of several, by the names of their files."""
    seeds = seeds_in(old)
    names = [METRICS, *(f"{seed}/{name}" for seed in seeds for name in _OF_RUN)] if seeds else [*_OF_RUN]
    return {n: (_OF_TEST | _OF_RUN)[Path(n).name](old / n, new / n) for n in (_OF_TEST if is_test else names)}


def compare_losses(old: Path, new: Path) -> Agreement:
    """Compare two logs of losses line by line; the distance is relative to the larger of two values."""
    one, other = (read_text(path, "losses").splitlines() for path in (old, new))
    steps = len(one) - 1
    if len(one) != len(other) or one[:1] != other[:1]:
        return Agreement(False, math.inf, f"{steps} steps, now {len(other) - 1}, or other columns")
    differing = [row for row in range(steps) if one[1 + row] != other[1 + row]]
    if not differing:
        return Agreement(True, 0.0, f"{steps} steps are the same")
    before, after = _read_log(old), _read_log(new)
    largest = np.maximum(np.abs(before), np.abs(after))
    distance = float((np.abs(before - after) / np.where(largest > 0, largest, 1)).max(initial=0))
    first = f"the first is step {int(before[differing[0], 0])}"
    return Agreement(False, distance, f"{len(differing)} of {steps} steps differ, {first}, by up to {distance:.2g}")


def _read_log(path: Path) -> np.ndarray:
    try:
        return pd.read_csv(path).to_numpy(np.float64)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable as the log of a run: {error}") from error


def compare_evaluations(old: Path, new: Path) -> Agreement:
    """Compare evaluations line by line; the comparison of ``metrics.json`` measures the distance."""
    one, other = (read_text(path, "evaluations").splitlines() for path in (old, new))
    if len(one) != len(other):
        return Agreement(False, math.inf, f"{len(one)} evaluations, now {len(other)}")
    differing = sum(not _same_evaluation(before, after) for before, after in zip(one, other, strict=True))
    text = f"{differing} of {len(one)} evaluations differ" if differing else f"{len(one)} evaluations are the same"
    return Agreement(not differing, 0.0, text)


def _same_evaluation(old: str, new: str) -> bool:
    """Return whether two lines are equal but for metrics that newer versions have added."""
    if old == new:
        return True
    try:
        before, after = json.loads(old), json.loads(new)
        after["metrics"] = {name: after["metrics"].get(name) for name in before["metrics"]}
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
    return bool(before == after)


def compare_metrics(old: Path, new: Path) -> Agreement:
    """Compare two files of metrics, value by value."""
    one, other = (flat_metrics(read_json(path, "metrics")) for path in (old, new))
    # Newer versions compute more metrics.
    if lost := one.keys() - other.keys():
        return Agreement(False, math.inf, f"the new one lacks {min(lost)}")
    distances = {name: _distance(name, one[name], other[name]) for name in one if one[name] != other[name]}
    if not distances:
        return Agreement(True, 0.0, f"{len(one)} numbers are the same")
    worst = max(distances, key=lambda name: distances[name])
    text = f"{len(distances)} of {len(one)} numbers differ, most {worst}: {one[worst]}, now {other[worst]}"
    return Agreement(False, distances[worst], text)


def _distance(name: str, one: Any, other: Any) -> float:
    if not all(isinstance(value, int | float) for value in (one, other)):
        return math.inf
    # Detection mAP is in percent, the other metrics are in 0..1.
    return abs(one - other) / (100 if any(word.startswith("map") for word in name.split("@")) else 1)


def compare_weights(old: Path, new: Path) -> Agreement:
    """Compare the weights of two model files bit by bit, or else by the norm of the difference."""
    one, other = (read_model_file(path).state for path in (old, new))
    if one.keys() != other.keys() or any(one[key].shape != other[key].shape for key in one):
        return Agreement(False, math.inf, "other weights: their names or shapes differ")
    differing = [key for key in one if not torch.equal(one[key], other[key])]
    if not differing:
        return Agreement(True, 0.0, f"{len(one)} tensors are the same, bit for bit")
    norm = math.sqrt(sum(value.double().square().sum().item() for value in one.values()))
    gap = math.sqrt(sum((one[key].double() - other[key].double()).square().sum().item() for key in differing))
    gap /= norm or 1.0
    return Agreement(False, gap, f"{len(differing)} of {len(one)} tensors differ, by {gap:.2g} (relative)")


def compare_scores(old: Path, new: Path) -> Agreement:
    """Compare the scores of every snippet of two tests."""
    one, other = (
        {entry.video: scores.anomaly for entry, scores in zip(test.videos.entries, test.scores, strict=True)}
        for test in map(read_scores, (old, new))
    )
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return Agreement(False, math.inf, "other videos, or other lengths")
    gaps = {name: float(np.abs(one[name] - other[name]).max(initial=0)) for name in one}
    worst = max(gaps, key=lambda name: gaps[name])
    if not gaps[worst]:
        return Agreement(True, 0.0, f"the scores of {len(one)} videos are the same, bit for bit")
    differing = sum(value > 0 for value in gaps.values())
    text = f"scores of {differing} of {len(one)} videos differ, most in {worst}, by {gaps[worst]:.2g}"
    return Agreement(False, gaps[worst], text)


_Comparisons = dict[str, Callable[[Path, Path], Agreement]]
_OF_TEST: _Comparisons = {TEST_METRICS: compare_metrics, TEST_SCORES: compare_scores}
_OF_RUN: _Comparisons = {METRICS: compare_metrics, LOSSES: compare_losses, EVALUATIONS: compare_evaluations}
_OF_RUN |= {LAST: compare_weights, BEST: compare_weights}
