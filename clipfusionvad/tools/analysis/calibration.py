"""Whether a score of 0.7 means 70 percent: reliability, calibration errors, and the effect of a temperature.

S snippets of all test videos, weighted by their frames; B bins. Source of ECE and of temperature scaling: Guo et al.,
"On Calibration of Modern Neural Networks", 2017.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option
from clipfusionvad.report.curves import PooledScores, pool
from clipfusionvad.report.scores import TestResult
from clipfusionvad.tools.analysis.figures import COARSE_COLOUR, FINE_COLOUR, Figure, hide_spines, new_figure
from clipfusionvad.tools.analysis.result import AnalysisResult, branch_names, make_table, table_text

BINS = 15
# Scores are kept this far from 0 and 1: float32 has no more digits.
_FLOOR = 1e-7
# Bounds of the temperatures that are tried, as powers of e.
_RANGE = (-4.0, 4.0)
_REMARK = (
    "Tempered: each half of the test videos is scaled by the temperature that fits the truth of the other half. Only\n"
    "test frames have a truth, so this shows how much of the error one number could remove. Do not report it as a\n"
    "result of the method."
)


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
    """Return bins of equal width; of the frames (S,) of a snippet with a score (S,) in 0..1, positives (S,) are
    abnormal."""
    return _gather(np.minimum((scores * bins).astype(np.int64), bins - 1), scores, positives, frames)


def equal_mass(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray, bins: int = BINS) -> Bins:
    """Return bins of about as many frames each, in the order of the scores; equal scores share a bin."""
    levels, place = np.unique(scores, return_inverse=True)
    held = np.bincount(place, frames, len(levels))
    middle = np.cumsum(held) - held / 2
    chosen = np.minimum((middle / held.sum() * bins).astype(np.int64), bins - 1)
    return _gather(chosen[place], scores, positives, frames)


def _gather(chosen: np.ndarray, scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> Bins:
    held = np.bincount(chosen, frames)
    kept = held > 0
    score, abnormal = (np.bincount(chosen, values)[kept] / held[kept] for values in (scores * frames, positives))
    return Bins(score, abnormal, held[kept])


def brier(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> float:
    """Return the mean over frames of (score − truth)²."""
    wrong = positives * (1 - scores) ** 2 + (frames - positives) * scores**2
    return float(wrong.sum() / frames.sum())


def log_loss(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> float:
    """Return the mean over frames of −log of the probability given to the truth, in nats."""
    kept = np.clip(scores, _FLOOR, 1 - _FLOOR)
    return float(-(positives * np.log(kept) + (frames - positives) * np.log1p(-kept)).sum() / frames.sum())


def tempered(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Return σ(logit(score) / temperature)."""
    from scipy.special import expit, logit

    return expit(logit(np.clip(scores, _FLOOR, 1 - _FLOOR)) / temperature)


def fit_temperature(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> float:
    """Return the temperature of least log loss, which is convex in 1 / T and so has one minimum."""
    from scipy.optimize import minimize_scalar

    def loss(power: float) -> float:
        return log_loss(tempered(scores, np.exp(power)), positives, frames)

    return float(np.exp(minimize_scalar(loss, bounds=_RANGE, method="bounded", options={"xatol": 1e-9}).x))


@dataclass(frozen=True)
class Scaled:
    """One branch: its ``scores`` (S,), the scores ``after`` temperature scaling, and the two temperatures.

    Each half of the videos is scaled by the temperature that fits the truth of the other half.
    """

    scores: np.ndarray
    after: np.ndarray
    temperatures: tuple[float, float]


def scale_by_halves(scores: np.ndarray, pooled: PooledScores, anomalous: np.ndarray) -> Scaled:
    """Scale scores (S,) of N videos; anomalous (N,) bool, so that each half gets half of either kind.

    ``UserError`` if a half lacks abnormal or normal frames.
    """
    scores = scores.astype(np.float64)
    half = np.zeros(len(anomalous), dtype=np.int64)
    for kind in (True, False):
        half[anomalous == kind] = np.arange((anomalous == kind).sum()) % 2
    of_snippet = np.repeat(half, pooled.snippets)
    after, temperatures = scores.copy(), []
    for this in (0, 1):
        other = of_snippet != this
        positives, frames = pooled.positives[other], pooled.frames[other]
        if not 0 < positives.sum() < frames.sum():
            raise UserError("half of the videos hold frames of one kind only: too few to measure calibration")
        temperatures.append(fit_temperature(scores[other], positives, frames))
        after[~other] = tempered(scores[~other], temperatures[-1])
    return Scaled(scores, after, (temperatures[0], temperatures[1]))


def draw_calibration(found: Sequence[Scaled], names: Sequence[str], pooled: PooledScores, bins: int) -> Figure:
    """Draw the share of abnormal frames over the score of equal-mass bins, and how many frames have which score."""
    figure = new_figure(5 * len(found) + 0.6, 6.2)
    axes = figure.subplots(2, len(found), sharex=True, sharey="row", height_ratios=(3, 1), squeeze=False)
    share = pooled.positives.sum() / pooled.frames.sum()
    for (upper, lower), result, name in zip(axes.T, found, names, strict=True):
        upper.plot([0, 1], [0, 1], color="#bbbbbb", lw=1, label="perfect calibration")
        upper.axhline(share, color="#bbbbbb", lw=1, ls=":", label="share of all frames")
        values = " and ".join(f"{value:.2g}" for value in result.temperatures)
        for scores, colour, label in (
            (result.scores, COARSE_COLOUR, "as scored"),
            (result.after, FINE_COLOUR, f"temperatures {values}"),
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
        hide_spines(upper, lower)
    axes[0, 0].set_ylabel("share of abnormal frames")
    axes[1, 0].set_ylabel("frames")
    return figure


def calibration(
    test: TestResult, *, bins: Annotated[int, Option("bins of scores", minimum=1)] = BINS
) -> AnalysisResult:
    """Whether scores are probabilities."""
    import pandas as pd

    pooled = pool(test.scores, test.videos)
    names = branch_names(len(pooled.anomaly))
    found = [scale_by_halves(curve, pooled, test.videos.anomalous) for curve in pooled.anomaly]
    frames = pooled.positives, pooled.frames
    errors, points = [], []
    for name, result in zip(names, found, strict=True):
        for kind, scores in (("as scored", result.scores), ("tempered", result.after)):
            wide, even = equal_width(scores, *frames, bins), equal_mass(scores, *frames, bins)
            errors.append((name, kind, wide.error, even.error, brier(scores, *frames), log_loss(scores, *frames)))
            points.append(make_table({"branch": name, "scores": kind, **vars(even)}))
    numbers = pd.concat(points).rename(columns={"score": "mean_score", "abnormal": "share_abnormal"})
    short = make_table(errors, ["branch", "scores", "ECE", "adaptive ECE", "Brier", "log loss"])
    return AnalysisResult(numbers, draw_calibration(found, names, pooled, bins), [table_text(short), _REMARK])
