"""Is a difference between two settings more than noise? Paired bootstrap over test videos, and paired t over seeds.

The test videos are a sample: on others, both runs would have scored differently. So videos are resampled, the same for
both runs, and the interval shows how far their difference moves. Seeds are another source of chance, judged separately.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipfusionvad.io.errors import UserError
from clipfusionvad.metrics.bootstrap import draw_videos, percentile_interval, sign_p_value
from clipfusionvad.report.formatting import Table, to_text
from clipfusionvad.tools.tables import RESAMPLES
from clipfusionvad.tools.tables.resampled import fingerprints, read_test_result, resampled_metrics

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """How much one setting differs from another in a metric, all in percent.

    ``reference`` and ``other`` are means over ``seeds`` pairs of runs, ``difference`` is other − reference. ``low``,
    ``high`` and ``p`` refer to the test videos: a 95 % percentile interval and the two-sided p of ``resamples``
    resamples, without the ``skipped`` ones in which the metric has no value. ``seed_low``, ``seed_high`` and
    ``seed_p`` refer to the seeds: paired t, None with one pair.
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

    @property
    def clear(self) -> bool:
        """Whether p < 0.05 for the test videos and, with several seeds, for the seeds."""
        return self.p < 1 - LEVEL and (self.seed_p is None or self.seed_p < 1 - LEVEL)

    @property
    def over_videos(self) -> str:
        return f"[{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def over_seeds(self) -> tuple[str, str]:
        """The interval and p over the seeds as text, dashes with one pair."""
        if self.seed_p is None:
            return "-", "-"
        return f"[{self.seed_low:+.2f}, {self.seed_high:+.2f}]", f"{self.seed_p:.3f}"


@dataclass(frozen=True)
class _ResampledRun:
    """A run's metrics in percent, (1 + R,) each, the first on the original test set; hashes of its videos and truth."""

    folder: Path
    values: dict[str, np.ndarray]
    seed: Any
    videos: str
    truth: str


_Pairs = Sequence[tuple[_ResampledRun, _ResampledRun]]


class Resampler:
    """The same resamples of the test videos for every run; each run is computed once."""

    def __init__(self, resamples: int = RESAMPLES, seed: int = 0, metrics: Sequence[str] | None = None):
        self.resamples, self.seed, self.metrics = resamples, seed, metrics
        self._runs: dict[Path, _ResampledRun] = {}

    def interval(self, folder: Path, metric: str) -> tuple[float, float] | None:
        """Return the 95 % interval of one run's metric over test videos; None if the metric is not resampled."""
        values = self._run(folder).values.get(metric)
        return None if values is None else percentile_interval(values[1:][np.isfinite(values[1:])], LEVEL)

    def compare(self, reference: Sequence[Path], other: Sequence[Path]) -> list[Difference]:
        """Compare as the function ``compare`` does."""
        pairs = self._pair([self._run(path) for path in reference], [self._run(path) for path in other])
        shared = [name for name in pairs[0][0].values if all(name in run.values for pair in pairs for run in pair)]
        return [_difference(metric, pairs) for metric in shared]

    def _pair(self, reference: Sequence[_ResampledRun], other: Sequence[_ResampledRun]) -> _Pairs:
        by_seed = {run.seed: run for run in other}
        pairs = [(run, by_seed[run.seed]) for run in reference if run.seed in by_seed]
        if len(reference) == len(other) == 1:
            pairs = [(reference[0], other[0])]
        if not pairs:
            folders = [runs[0].folder.parent for runs in (reference, other)]
            raise UserError(f"{folders[0]} and {folders[1]} have no seed in common, so there is nothing to pair")
        first = pairs[0][0]
        for run in [run for pair in pairs for run in pair]:
            for what in ("videos", "truth"):
                if getattr(run, what) != getattr(first, what):
                    raise UserError(
                        f"{first.folder} and {run.folder} were tested on different {what}: they cannot be compared "
                        f"video by video; test both on the same list and truth"
                    )
        return pairs

    def _run(self, folder: Path) -> _ResampledRun:
        if folder not in self._runs:
            tested = read_test_result(folder)
            weights = draw_videos(len(tested.scores), self.resamples, self.seed)
            values = resampled_metrics(tested, weights, self.metrics)
            self._runs[folder] = _ResampledRun(folder, values, tested.options.get("seed"), *fingerprints(tested))
        return self._runs[folder]


def compare(
    reference: Sequence[Path],
    other: Sequence[Path],
    metrics: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Difference]:
    """Compare the runs of one setting with those of another, metric by metric.

    ``reference`` and ``other`` are folders of runs (their best weights, from ``scores.npz``) or of tests. Runs are
    paired by their seed, the rest is ignored; with one run each, the seeds may differ. In every resample of the test
    videos each metric is averaged over the seeds, so the interval reflects the choice of videos. ``metrics`` are keys
    such as "auc1" or "map_average" (None: all that both have).

    Raises ``UserError`` where scores are missing or damaged, videos or truth differ, or no seed is shared.
    """
    return Resampler(resamples, seed, metrics).compare(reference, other)


def difference_text(differences: Sequence[Difference]) -> str:
    """Render a row for each metric, in percent points, and explain the intervals."""
    header = ("metric", "reference", "other", "difference", "videos: 95 %", "p", "seeds: 95 %", "p")
    rows = [
        (one.metric, f"{one.reference:.2f}", f"{one.other:.2f}", f"{one.difference:+.2f}", one.over_videos,
         f"{one.p:.3f}", *one.over_seeds)
        for one in differences
    ]  # fmt: skip
    return f"{to_text(Table(header, rows))}\n{explain(differences)}"


def explain(differences: Sequence[Difference]) -> str:
    """Explain the intervals of differences in words."""
    text = (
        f"videos: 95 % percentile interval of the difference over {max(one.resamples for one in differences)} paired "
        f"resamples of the test videos, metrics averaged over seeds; seeds: 95 % interval by paired t over the seeds; "
        f"p is two-sided and not corrected for the number of comparisons"
    )
    skipped = max(one.skipped for one in differences)
    return text + (f"; up to {skipped} resamples in which a metric has no value were left out" if skipped else "")


def student_t(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Return the 95 % interval of the mean of independent values and the two-sided p of a mean of 0.

    None for fewer than two values. Equal values have an interval of length 0 and p 1 at 0, 0 elsewhere.
    """
    from scipy import stats

    if len(values) < 2:
        return None
    if not np.ptp(values):
        return values[0], values[0], float(values[0] == 0)
    found = stats.ttest_1samp(values, 0)
    low, high = found.confidence_interval(LEVEL)
    return float(low), float(high), float(found.pvalue)


def _difference(metric: str, pairs: _Pairs) -> Difference:
    one, two = (np.stack([pair[side].values[metric] for pair in pairs]) for side in (0, 1))
    gaps = (two - one).mean(axis=0)
    drawn = gaps[1:][np.isfinite(gaps[1:])]
    low, high = percentile_interval(drawn, LEVEL)
    seed_low, seed_high, seed_p = student_t((two - one)[:, 0].tolist()) or (None, None, None)
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
        seed_low=seed_low,
        seed_high=seed_high,
        seed_p=seed_p,
    )
