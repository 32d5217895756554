"""Compare two runs or two tests: equal bit for bit, or how far apart."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from clipfusionvad.engine.run_folder import BEST, EVALUATIONS, LAST, LOSSES, METRICS, seeds_in
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_json, read_text
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.report.results import TEST_METRICS, TEST_SCORES
from clipfusionvad.report.scores import read_scores


@dataclass(frozen=True)
class Agreement:
    """The comparison of one file: ``exact`` if equal bit for bit, else the ``distance`` (inf: not comparable).

    The distance is relative for losses and weights, absolute for scores and for metrics in 0..1; ``text`` describes it.
    """

    file: str
    exact: bool
    distance: float
    text: str


def compare_runs(old: Path, new: Path) -> list[Agreement]:
    """Compare two folders of finished trainings, of one seed or of several."""
    agreements = [compare_metrics(old / METRICS, new / METRICS)]
    seeds = seeds_in(old)
    for part in seeds or [""]:
        one, other = old / part, new / part
        found = [
            compare_losses(one / LOSSES, other / LOSSES),
            compare_evaluations(one / EVALUATIONS, other / EVALUATIONS),
        ]
        found += [compare_weights(one / name, other / name) for name in (LAST, BEST)]
        if seeds:
            found.append(compare_metrics(one / METRICS, other / METRICS))
        agreements += [Agreement(str(Path(part, item.file)), item.exact, item.distance, item.text) for item in found]
    return agreements


def compare_tests(old: Path, new: Path) -> list[Agreement]:
    """Compare two folders of tests: the metrics, and the score of every snippet."""
    return [
        compare_metrics(old / TEST_METRICS, new / TEST_METRICS),
        compare_scores(old / TEST_SCORES, new / TEST_SCORES),
    ]


def compare_losses(old: Path, new: Path) -> Agreement:
    """Compare two logs of losses line by line; the distance is relative to the larger of two values."""
    one, other = (read_text(path, "losses").splitlines() for path in (old, new))
    if one == other:
        return Agreement(old.name, True, 0.0, f"{len(one) - 1} steps are the same")
    if len(one) != len(other) or one[:1] != other[:1]:
        return Agreement(old.name, False, math.inf, f"{len(one) - 1} steps, now {len(other) - 1}, or other columns")
    before, after = _read_log(old), _read_log(new)
    largest = np.maximum(np.abs(before), np.abs(after))
    distance = float((np.abs(before - after) / np.where(largest > 0, largest, 1)).max(initial=0))
    differing = [index for index, pair in enumerate(zip(one[1:], other[1:], strict=True)) if pair[0] != pair[1]]
    first = f"the first is step {int(before[differing[0], 0])}"
    text = f"{len(differing)} of {len(one) - 1} steps differ, {first}, by up to {distance:.2g} (relative)"
    return Agreement(old.name, False, distance, text)


def _read_log(path: Path) -> np.ndarray:
    try:
        return pd.read_csv(path).to_numpy(np.float64)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable as the log of a run: {error}") from error


def compare_evaluations(old: Path, new: Path) -> Agreement:
    """Compare evaluations line by line; the comparison of ``metrics.json`` measures the distance."""
    one, other = (read_text(path, "evaluations").splitlines() for path in (old, new))
    if len(one) != len(other):
        return Agreement(old.name, False, math.inf, f"{len(one)} evaluations, now {len(other)}")
    differing = sum(pair[0] != pair[1] for pair in zip(one, other, strict=True))
    text = f"{differing} of {len(one)} evaluations differ" if differing else f"{len(one)} evaluations are the same"
    return Agreement(old.name, not differing, 0.0, text)


def compare_metrics(old: Path, new: Path) -> Agreement:
    """Compare two files of metrics, value by value."""
    one, other = (dict(_flat(read_json(path, "metrics"))) for path in (old, new))
    if one == other:
        return Agreement(old.name, True, 0.0, f"{len(one)} numbers are the same")
    if one.keys() != other.keys():
        absent = sorted(one.keys() ^ other.keys())[0]
        return Agreement(old.name, False, math.inf, f"only one of them has {absent}")
    distances = {name: _distance(name, one[name], other[name]) for name in one if one[name] != other[name]}
    worst = max(distances, key=lambda name: distances[name])
    text = f"{len(distances)} of {len(one)} numbers differ, most {worst}: {one[worst]}, now {other[worst]}"
    return Agreement(old.name, False, distances[worst], text)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value


def _distance(name: str, one: Any, other: Any) -> float:
    if not all(isinstance(value, int | float) for value in (one, other)):
        return math.inf
    # Detection mAP is in percent, the other metrics are in 0..1.
    return abs(one - other) / (100 if any(word.startswith("map") for word in name.split()) else 1)


def compare_weights(old: Path, new: Path) -> Agreement:
    """Compare the weights of two model files bit by bit, or else by the norm of the difference."""
    one, other = (_state(path) for path in (old, new))
    if one.keys() != other.keys() or any(one[key].shape != other[key].shape for key in one):
        return Agreement(old.name, False, math.inf, "other weights: their names or shapes differ")
    differing = [key for key in one if not torch.equal(one[key], other[key])]
    if not differing:
        return Agreement(old.name, True, 0.0, f"{len(one)} tensors are the same, bit for bit")
    norm = math.sqrt(sum(value.double().square().sum().item() for value in one.values()))
    gap = math.sqrt(sum((one[key].double() - other[key].double()).square().sum().item() for key in differing))
    gap /= norm or 1.0
    return Agreement(old.name, False, gap, f"{len(differing)} of {len(one)} tensors differ, by {gap:.2g} (relative)")


def _state(path: Path) -> dict[str, Tensor]:
    content = read_checkpoint(path, "model file")
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model file {path} holds no state dict of tensors")
    return state


def compare_scores(old: Path, new: Path) -> Agreement:
    """Compare the scores of every snippet of two tests."""
    videos = [
        {e.video: s for e, s in zip(t.videos.entries, t.scores, strict=True)} for t in map(read_scores, (old, new))
    ]
    one, other = videos
    if one.keys() != other.keys() or any(one[name].anomaly.shape != other[name].anomaly.shape for name in one):
        return Agreement(old.name, False, math.inf, "other videos, or other lengths")
    gaps = {name: float(np.abs(one[name].anomaly - other[name].anomaly).max(initial=0)) for name in one}
    worst = max(gaps, key=lambda name: gaps[name])
    differing = sum(value > 0 for value in gaps.values())
    if not differing:
        return Agreement(old.name, True, 0.0, f"the scores of {len(one)} videos are the same, bit for bit")
    text = f"scores of {differing} of {len(one)} videos differ, most in {worst}, by {gaps[worst]:.2g}"
    return Agreement(old.name, False, gaps[worst], text)
