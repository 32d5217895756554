"""Whether a score of 0.7 means 70 percent: reliability, calibration errors, and what one temperature would mend.

S snippets of all test videos, which count by their frames; B bins. Source of ECE and of temperature scaling: Guo et
al., "On Calibration of Modern Neural Networks", 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from clipfusionvad.io.errors import UserError
from clipfusionvad.report.curves import PooledScores, pool
from clipfusionvad.report.plots import COARSE_COLOUR, FINE_COLOUR
from clipfusionvad.report.scores import TestResult
from clipfusionvad.tools.analysis.result import Insight, Row, Table, bare, branch_names

BINS = 15
# Scores are kept so far from 0 and 1: float32 has no more digits.
_FLOOR = 1e-7
# Temperatures that are searched, as powers of e, and the steps of the golden section.
_RANGE, _STEPS = (-4.0, 4.0), 60


@dataclass(frozen=True)
class Bins:
    """Bins that hold a frame: their mean score, share of abnormal frames, and frames, (B,) each."""

    score: np.ndarray
    abnormal: np.ndarray
    frames: np.ndarray

    @property
    def error(self) -> float:
        """Mean distance of score and share, weighted by frames."""
        return float(np.average(np.abs(self.score - self.abnormal), weights=self.frames))


def equal_width(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray, bins: int = BINS) -> Bins:
    """Bins of equal width; scores (S,) in 0..1, positives (S,) of the frames (S,) of a snippet are abnormal."""
    return _gather(np.minimum((scores * bins).astype(np.int64), bins - 1), scores, positives, frames)


def equal_mass(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray, bins: int = BINS) -> Bins:
    """Bins of about as many frames each, in the order of the scores; equal scores stay together."""
    levels, place = np.unique(scores, return_inverse=True)
    held = np.bincount(place, frames, len(levels))
    middle = np.cumsum(held) - held / 2
    return _gather(
        np.minimum((middle / held.sum() * bins).astype(np.int64), bins - 1)[place], scores, positives, frames
    )


def _gather(chosen: np.ndarray, scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> Bins:
    held = np.bincount(chosen, frames)
    kept = held > 0
    score, abnormal = (np.bincount(chosen, values)[kept] / held[kept] for values in (scores * frames, positives))
    return Bins(score, abnormal, held[kept])


def brier(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> float:
    """Mean over frames of (score − truth)²."""
    wrong = positives * (1 - scores) ** 2 + (frames - positives) * scores**2
    return float(wrong.sum() / frames.sum())


def log_loss(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> float:
    """Mean over frames of −log of the probability given to the truth, in nats."""
    kept = np.clip(scores, _FLOOR, 1 - _FLOOR)
    return float(-(positives * np.log(kept) + (frames - positives) * np.log1p(-kept)).sum() / frames.sum())


def tempered(scores: np.ndarray, temperature: float) -> np.ndarray:
    """σ(logit(score) / temperature)."""
    kept = np.clip(scores, _FLOOR, 1 - _FLOOR)
    return 1 / (1 + np.exp(-(np.log(kept) - np.log1p(-kept)) / temperature))


def fit_temperature(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> float:
    """The temperature of least log loss, by golden section: the loss is convex in 1 / T, so it has one valley."""
    low, high = _RANGE
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(_STEPS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        losses = [log_loss(tempered(scores, np.exp(at)), positives, frames) for at in (left, right)]
        low, high = (low, right) if losses[0] < losses[1] else (left, high)
    return float(np.exp((low + high) / 2))


@dataclass(frozen=True)
class Calibration:
    """One branch: its ``scores`` (S,), what they are ``after`` temperature scaling, and the two temperatures.

    Each half of the videos is scaled by what suits the truth of the other half. Without a validation set with
    frame truth this says what scaling could do, not what it will.
    """

    scores: np.ndarray
    after: np.ndarray
    temperatures: tuple[float, float]


def calibrate(scores: np.ndarray, pooled: PooledScores, anomalous: np.ndarray) -> Calibration:
    """Scale scores (S,) of N videos; anomalous (N,) bool tells the kinds, of which every half gets half.

    ``UserError`` where a half would lack abnormal or normal frames.
    """
    half = np.zeros(len(anomalous), dtype=np.int64)
    for kind in (True, False):
        half[anomalous == kind] = np.arange((anomalous == kind).sum()) % 2
    of_snippet = np.repeat(half, pooled.snippets)
    after, temperatures = scores.astype(np.float64), []
    for own in (0, 1):
        known = (values[of_snippet != own] for values in (scores.astype(np.float64), pooled.positives, pooled.frames))
        other, positives, frames = known
        if not 0 < positives.sum() < frames.sum():
            raise UserError("half of the videos hold frames of one kind only: too few to say how scores are calibrated")
        temperatures.append(fit_temperature(other, positives, frames))
        after[of_snippet == own] = tempered(scores[of_snippet == own].astype(np.float64), temperatures[-1])
    return Calibration(scores.astype(np.float64), after, (temperatures[0], temperatures[1]))


def draw_calibration(found: Sequence[Calibration], names: Sequence[str], pooled: PooledScores, bins: int) -> Figure:
    """Share of abnormal frames over the score of equal-mass bins, and how many frames have which score."""
    figure = Figure(figsize=(5 * len(found) + 0.6, 6.2), layout="constrained")
    axes = figure.subplots(2, len(found), sharex=True, sharey="row", height_ratios=(3, 1), squeeze=False)
    share = pooled.positives.sum() / pooled.frames.sum()
    for (upper, lower), result, name in zip(axes.T, found, names, strict=True):
        upper.plot([0, 1], [0, 1], color="#bbbbbb", lw=1, label="as it should be")
        upper.axhline(share, color="#bbbbbb", lw=1, ls=":", label="share of all frames")
        heat = " and ".join(f"{value:.2g}" for value in result.temperatures)
        for scores, colour, label in (
            (result.scores, COARSE_COLOUR, "as scored"),
            (result.after, FINE_COLOUR, f"temperatures {heat}"),
        ):
            held = equal_mass(scores, pooled.positives, pooled.frames, bins)
            upper.plot(held.score, held.abnormal, "o-", color=colour, ms=4.5, lw=1.3, label=label)
            edges = np.linspace(0, 1, 21)
            lower.stairs(np.histogram(scores, edges, weights=pooled.frames)[0], edges, color=colour, lw=1.3)
        upper.set_title(name, fontsize=10, loc="left")
        upper.legend(frameon=False, fontsize=8, loc="upper left")
        upper.set(xlim=(0, 1), ylim=(-0.01, 1.01))
        lower.set_xlabel("score")
        lower.set_yscale("log")
        for axis in (upper, lower):
            bare(axis)
    axes[0, 0].set_ylabel("share of abnormal frames")
    axes[1, 0].set_ylabel("frames")
    return figure


def calibration_insight(tested: TestResult, bins: int = BINS) -> Insight:
    """Errors of all branches before and after scaling, and the reliability curves."""
    pooled = pool(tested.scores, tested.videos)
    names = branch_names(len(pooled.anomaly))
    found = [calibrate(curve, pooled, tested.videos.anomalous) for curve in pooled.anomaly]
    frames = pooled.positives, pooled.frames
    rows: list[Row] = []
    points: list[Row] = []
    for name, result in zip(names, found, strict=True):
        for when, scores in (("as scored", result.scores), ("tempered", result.after)):
            wide, even = equal_width(scores, *frames, bins), equal_mass(scores, *frames, bins)
            rows.append((name, when, wide.error, even.error, brier(scores, *frames), log_loss(scores, *frames)))
            points += [(name, when, *point) for point in zip(*(v.tolist() for v in vars(even).values()), strict=True)]
    short = Table(("branch", "scores", "ECE", "adaptive ECE", "Brier", "log loss"), rows)
    remark = (
        "Tempered: each half of the test videos by the truth of the other half. No other frames have a truth to fit "
        "to,\nso this shows how much of the error one number could mend; it is no result of the method."
    )
    numbers = Table(("branch", "scores", "mean_score", "share_abnormal", "frames"), points)
    return Insight(numbers, draw_calibration(found, names, pooled, bins), [short.text(), remark])
