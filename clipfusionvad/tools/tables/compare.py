"""Are two runs really apart? Intervals over test videos, by paired bootstrap, and over seeds, by Student's t.

The test videos are a sample: on others, both runs would have come out otherwise. So videos are drawn anew, the same
for both runs, and it is seen how far their difference moves. Seeds are another source of chance, judged by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import stdtr, stdtrit

from clipfusionvad.io.errors import UserError
from clipfusionvad.metrics.bootstrap import draw_videos, percentile_interval, sign_p_value
from clipfusionvad.tools.tables.collect import Cell
from clipfusionvad.tools.tables.resampled import fingerprints, read_test_result, resampled_metrics

RESAMPLES, LEVEL = 2000, 0.95


@dataclass(frozen=True)
class Difference:
    """How far one setting is from another in a metric, all in percent.

    ``reference`` and ``other`` are means over ``seeds`` pairs of runs, ``difference`` is other − reference. ``low``,
    ``high`` and ``p`` are of the test videos: a 95 % percentile interval and the two-sided p of ``resamples``
    resamples, not counting those ``skipped`` in which the metric has no value. ``seed_low``, ``seed_high`` and
    ``seed_p`` are of the seeds: paired t, None with one pair.
    """

    metric: str
    reference: float
    other: float
    difference: float
    low: float
    high: float
    p: float
    resamples: int
    skipped: int
    seeds: int
    seed_low: float | None
    seed_high: float | None
    seed_p: float | None


@dataclass(frozen=True)
class _Resampled:
    """A run's metrics in percent, (1 + R,) each, the first of the test set as it is; what it was tested on."""

    values: dict[str, np.ndarray]
    seed: int | None
    videos: str
    truth: str


class Resampler:
    """The same resamples of the test videos for every run; what was computed of a run is kept."""

    def __init__(self, resamples: int = RESAMPLES, seed: int = 0, metrics: Sequence[str] | None = None):
        self.resamples, self.seed, self.metrics = resamples, seed, metrics
        self._known: dict[Path, _Resampled] = {}

    def interval(self, folder: Path, metric: str) -> tuple[float, float] | None:
        """The 95 % interval of one run's metric over test videos; None where it cannot be resampled."""
        values = self._of(folder).values.get(metric)
        return None if values is None else percentile_interval(values[1:][np.isfinite(values[1:])], LEVEL)

    def compare(self, reference: Sequence[Path], other: Sequence[Path]) -> list[Difference]:
        """As the function ``compare``, with what is known already."""
        pairs = self._pair(reference, other)
        shared = [
            metric for metric in pairs[0][0].values if all(metric in run.values for pair in pairs for run in pair)
        ]
        return [_difference(metric, pairs) for metric in shared]

    def _pair(self, reference: Sequence[Path], other: Sequence[Path]) -> list[tuple[_Resampled, _Resampled]]:
        known = [{self._of(path).seed: path for path in paths} for paths in (reference, other)]
        seeds = [seed for seed in known[0] if seed in known[1]]
        paired = [(known[0][seed], known[1][seed]) for seed in seeds]
        if len(reference) == len(other) == 1:
            paired = [(reference[0], other[0])]
        if not paired:
            raise UserError(f"{reference[0].parent} and {other[0].parent} have no seed in common, so nothing to pair")
        for path in [path for pair in paired for path in pair]:
            self._check_same(paired[0][0], path)
        return [(self._of(one), self._of(two)) for one, two in paired]

    def _check_same(self, first: Path, path: Path) -> None:
        one, two = self._of(first), self._of(path)
        for what, differs in (("videos", one.videos != two.videos), ("truth", one.truth != two.truth)):
            if differs:
                raise UserError(
                    f"{first} and {path} were tested on different {what}: they cannot be compared video by video; "
                    f"test both on the same list and truth"
                )

    def _of(self, folder: Path) -> _Resampled:
        if folder not in self._known:
            self._known[folder] = self._resample(folder)
        return self._known[folder]

    def _resample(self, folder: Path) -> _Resampled:
        tested = read_test_result(folder)
        weights = draw_videos(len(tested.scores), self.resamples, self.seed)
        seed = tested.options.get("seed")
        return _Resampled(
            resampled_metrics(tested, weights, self.metrics),
            seed if isinstance(seed, int) else None,
            *fingerprints(tested),
        )


def compare(
    reference: Sequence[Path],
    other: Sequence[Path],
    metrics: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Difference]:
    """How far the runs of one setting are from those of another, metric by metric.

    ``reference`` and ``other`` are folders of runs (their best weights, from ``scores.npz``) or of tests. Runs are
    paired by their seed, others are left out; of one run each, the seeds may differ. In every resample of the test
    videos each metric is averaged over the seeds, so the interval is of the videos' noise; that of the seeds stands
    beside it. ``metrics`` are keys such as "auc1" or "map_average" (None: all that both have).

    Raises ``UserError`` where scores are missing or damaged, videos or truth differ, or no seed is shared.
    """
    return Resampler(resamples, seed, metrics).compare(reference, other)


def compare_cells(resampler: Resampler, reference: Cell, other: Cell) -> list[Difference]:
    """``compare`` for settings as ``collect`` finds them."""
    return resampler.compare(*([result.folder for result in cell.results] for cell in (reference, other)))


def difference_text(differences: Sequence[Difference]) -> str:
    """A line for each metric, in percent points, and what the intervals mean."""
    lines = [
        f"{one.metric:28}{one.reference:7.2f} → {one.other:6.2f}  {one.difference:+6.2f}"
        f"  videos [{one.low:+.2f}, {one.high:+.2f}] p {one.p:.3f}" + _seeds_text(one)
        for one in differences
    ]
    return "\n".join([*lines, explain(differences)])


def explain(differences: Sequence[Difference]) -> str:
    """What the intervals of differences mean, in words."""
    text = (
        f"videos: 95 % percentile interval of the difference over {max(one.resamples for one in differences)} paired "
        f"resamples of the test videos, metrics averaged over seeds; seeds: 95 % interval by paired t over the seeds; "
        f"p is two-sided and not corrected for how many comparisons are made"
    )
    skipped = max(one.skipped for one in differences)
    return text + (f"; up to {skipped} resamples in which a metric has no value were left out" if skipped else "")


def _seeds_text(one: Difference) -> str:
    if one.seed_low is None:
        return "  one pair of runs"
    return f"  seeds [{one.seed_low:+.2f}, {one.seed_high:+.2f}] p {one.seed_p:.3f}"


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of at least two independent values, by Student's t; None of fewer."""
    if len(values) < 2:
        return None
    half = stdtrit(len(values) - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _difference(metric: str, pairs: Sequence[tuple[_Resampled, _Resampled]]) -> Difference:
    one, two = (np.stack([pair[side].values[metric] for pair in pairs]) for side in (0, 1))
    gaps = (two - one).mean(axis=0)
    drawn = gaps[1:][np.isfinite(gaps[1:])]
    by_seed = (two - one)[:, 0]
    low, high = percentile_interval(drawn, LEVEL)
    of_seeds = mean_interval(by_seed.tolist())
    return Difference(
        metric,
        reference=float(one[:, 0].mean()),
        other=float(two[:, 0].mean()),
        difference=float(gaps[0]),
        low=low,
        high=high,
        p=sign_p_value(drawn),
        resamples=len(gaps) - 1,
        skipped=len(gaps) - 1 - len(drawn),
        seeds=len(pairs),
        seed_low=of_seeds and of_seeds[0],
        seed_high=of_seeds and of_seeds[1],
        seed_p=_t_p_value(by_seed) if of_seeds else None,
    )


def _t_p_value(values: np.ndarray) -> float:
    """Two-sided p of a mean of 0; of values that are all the same, 1 at 0 and 0 elsewhere."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    if error == 0:
        return float(values[0] == 0)
    return float(2 * stdtr(len(values) - 1, -abs(np.mean(values)) / error))
