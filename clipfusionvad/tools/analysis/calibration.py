"""Whether a score of 0.7 means 70 percent: reliability, calibration errors, and the effect of a temperature.

S snippets of all test videos, weighted by their frames; B bins. ECE and temperature scaling: Guo et al., 2017.
"""

from typing import Annotated

import numpy as np

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option
from clipfusionvad.report.curves import PooledScores, pool
from clipfusionvad.report.scores import TestResult
from clipfusionvad.tools.analysis import figures
from clipfusionvad.tools.analysis.result import AnalysisResult, DataFrame, branch_names, make_table, table_text

BINS = 15
# Scores are kept this far from 0 and 1: float32 has no more digits.
_FLOOR = 1e-7
_REMARK = (
    "Tempered: each half of the test videos is scaled by the temperature that fits the truth of the other half. Only\n"
    "test frames have a truth, so this shows how much of the error one number could remove. Do not report it as a\n"
    "result of the method."
)


def equal_width(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray, bins: int = BINS) -> DataFrame:
    """Return ``mean_score``, ``share_abnormal`` and ``frames`` of the bins of equal width that hold a frame.

    Of the frames (S,) of a snippet with a score (S,) in 0..1, positives (S,) are abnormal.
    """
    return _gather(np.minimum((scores * bins).astype(np.int64), bins - 1), scores, positives, frames)


def equal_mass(scores: np.ndarray, positives: np.ndarray, frames: np.ndarray, bins: int = BINS) -> DataFrame:
    """Return bins of about as many frames each, in the order of the scores; equal scores share a bin."""
    levels, place = np.unique(scores, return_inverse=True)
    held = np.bincount(place, frames, len(levels))
    middle = np.cumsum(held) - held / 2
    chosen = np.minimum((middle / held.sum() * bins).astype(np.int64), bins - 1)
    return _gather(chosen[place], scores, positives, frames)


def _gather(chosen: np.ndarray, scores: np.ndarray, positives: np.ndarray, frames: np.ndarray) -> DataFrame:
    held = np.bincount(chosen, frames)
    kept = held > 0
    score, abnormal = (np.bincount(chosen, values)[kept] / held[kept] for values in (scores * frames, positives))
    return make_table({"mean_score": score, "share_abnormal": abnormal, "frames": held[kept]})


def calibration_error(bins: DataFrame) -> float:
    """Return the mean distance of score and share of abnormal frames, weighted by frames."""
    return float(np.average(np.abs(bins.mean_score - bins.share_abnormal), weights=bins.frames))


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
    """Return the temperature, from e⁻⁴ to e⁴, of least log loss, which is convex in 1 / T and so has one minimum."""
    from scipy.optimize import minimize_scalar

    def loss(power: float) -> float:
        return log_loss(tempered(scores, np.exp(power)), positives, frames)

    return float(np.exp(minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded", options={"xatol": 1e-9}).x))


def scale_by_halves(scores: np.ndarray, pooled: PooledScores, anomalous: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Return scores (S,) of N videos, each half scaled by the temperature that fits the truth of the other half; and
    both temperatures. Each half gets half of the anomalous (N,) bool videos and half of the others.

    ``UserError`` if a half lacks abnormal or normal frames.
    """
    half = np.zeros(len(anomalous), dtype=np.int64)
    for kind in (True, False):
        half[anomalous == kind] = np.arange((anomalous == kind).sum()) % 2
    first = np.repeat(half == 0, pooled.snippets)
    after, temperatures = scores.astype(np.float64), []
    for own in (first, ~first):
        positives, frames = pooled.positives[~own], pooled.frames[~own]
        if not 0 < positives.sum() < frames.sum():
            raise UserError("half of the videos hold frames of one kind only: too few to measure calibration")
        temperatures.append(fit_temperature(scores[~own].astype(np.float64), positives, frames))
        after[own] = tempered(after[own], temperatures[-1])
    return after, temperatures


def calibration(test: TestResult, *, bins: Annotated[int, Option("bins", minimum=1)] = BINS) -> AnalysisResult:
    """Whether scores are probabilities."""
    import pandas as pd

    pooled = pool(test.scores, test.videos)
    frames = pooled.positives, pooled.frames
    names = branch_names(len(pooled.anomaly))
    # The share of abnormal frames over the score of equal-mass bins, and how many frames have which score.
    figure = figures.new_figure(5 * len(names) + 0.6, 6.2)
    axes = figure.subplots(2, len(names), sharex=True, sharey="row", height_ratios=(3, 1), squeeze=False)
    edges, errors, points = np.linspace(0, 1, 21), [], []
    for (upper, lower), name, scores in zip(axes.T, names, pooled.anomaly.astype(np.float64), strict=True):
        after, temperatures = scale_by_halves(scores, pooled, test.videos.anomalous)
        upper.plot([0, 1], [0, 1], color="#bbbbbb", lw=1, label="perfect calibration")
        upper.axhline(frames[0].sum() / frames[1].sum(), color="#bbbbbb", lw=1, ls=":", label="abnormal share overall")
        values = " and ".join(f"{value:.2g}" for value in temperatures)
        for kind, scaled, colour, label in (
            ("as scored", scores, figures.COARSE_COLOUR, "as scored"),
            ("tempered", after, figures.FINE_COLOUR, f"temperature scaling (T = {values})"),
        ):
            held = equal_mass(scaled, *frames, bins)
            rates = calibration_error(equal_width(scaled, *frames, bins)), calibration_error(held)
            errors.append((name, kind, *rates, brier(scaled, *frames), log_loss(scaled, *frames)))
            points.append(held.assign(branch=name, scores=kind))
            upper.plot(held.mean_score, held.share_abnormal, "o-", color=colour, ms=4.5, lw=1.3, label=label)
            lower.stairs(np.histogram(scaled, edges, weights=frames[1])[0], edges, color=colour, lw=1.3)
        upper.set_title(name, fontsize=10, loc="left")
        upper.legend(frameon=False, fontsize=8, loc="upper left")
        upper.set(xlim=(0, 1), ylim=(-0.01, 1.01))
        lower.set(xlabel="score", yscale="log")
        figures.hide_spines(upper, lower)
    axes[0, 0].set_ylabel("share of abnormal frames")
    axes[1, 0].set_ylabel("frames")
    numbers = pd.concat(points)[["branch", "scores", "mean_score", "share_abnormal", "frames"]]
    text = table_text(errors, ["branch", "scores", "ECE", "adaptive ECE", "Brier", "log loss"])
    return AnalysisResult(numbers, figure, [text, _REMARK])
