"""Is a difference between two settings more than noise? Paired bootstrap over test videos, and paired t over seeds.

The test videos are a sample: on others, both runs would have scored differently. So videos are resampled, the same for
both runs, and the interval shows how far their difference moves. Seeds are another source of chance, judged separately.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipfusionvad.datasets import NORMAL_IN_TRUTH
from clipfusionvad.engine.evaluator import HEADLINE_MAP, VideoDataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.metrics import FALSE_ALARM, bootstrap, video_score
from clipfusionvad.metrics.detection import detection_hits
from clipfusionvad.report.curves import PooledScores, pool
from clipfusionvad.report.formatting import Table, to_text
from clipfusionvad.report.results import RUN_SCORES, TEST_SCORES
from clipfusionvad.report.scores import TestResult, read_scores
from clipfusionvad.tools.tables import RESAMPLES

#: A run's metrics by name, in percent: (R,) each, NaN where undefined.
Values = dict[str, np.ndarray]
_VARIANTS = ("released", "normal_matched", "anomalous_only")
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


class _ResampledRun(NamedTuple):
    """A run's metrics, the first of each on the original test set, and its videos."""

    folder: Path
    values: Values
    seed: Any
    videos: VideoDataset


class Resampler:
    """The same resamples of the test videos for every run; each run is computed once."""

    def __init__(self, resamples: int = RESAMPLES, seed: int = 0, metrics: Sequence[str] | None = None):
        self.resamples, self.seed, self.metrics = resamples, seed, metrics
        self._runs: dict[Path, _ResampledRun] = {}

    def interval(self, folders: Sequence[Path], metric: str) -> tuple[float, float] | None:
        """Return the 95 % interval over test videos of a metric's mean over runs; None if it is not resampled."""
        found = [self._run(folder).values.get(metric) for folder in folders]
        if any(values is None for values in found):
            return None
        drawn = np.mean([values[1:] for values in found if values is not None], axis=0)
        return bootstrap.percentile_interval(drawn[np.isfinite(drawn)], LEVEL)

    def compare(self, reference: Sequence[Path], other: Sequence[Path]) -> list[Difference]:
        """Compare as the function ``compare`` does."""
        one, two = ([self._run(folder) for folder in folders] for folders in (reference, other))
        by_seed = {run.seed: run for run in two}
        pairs = [(run, by_seed[run.seed]) for run in one if run.seed in by_seed]
        if len(one) == len(two) == 1:
            pairs = [(one[0], two[0])]
        if not pairs:
            folders = f"{', '.join(map(str, reference))} and {', '.join(map(str, other))}"
            raise UserError(f"{folders} have no seed in common, so there is nothing to pair")
        first, runs = pairs[0][0], [run for pair in pairs for run in pair]
        for run in runs:
            check_paired(first.folder, first.videos, run.folder, run.videos)
        shared = [name for name in first.values if all(name in run.values for run in runs)]
        sides = {name: np.array([[run.values[name] for run in pair] for pair in pairs]) for name in shared}
        return [difference(name, values[:, 0], values[:, 1]) for name, values in sides.items()]

    def _run(self, folder: Path) -> _ResampledRun:
        if folder not in self._runs:
            tested = read_test_result(folder)
            weights = bootstrap.draw_videos(len(tested.scores), self.resamples, self.seed)
            values = resampled_metrics(tested, weights, self.metrics)
            self._runs[folder] = _ResampledRun(folder, values, tested.options.get("seed"), tested.videos)
        return self._runs[folder]


def difference(metric: str, one: np.ndarray, two: np.ndarray) -> Difference:
    """Return the difference of a metric from its values (pairs, 1 + R) of the reference and of the other setting."""
    gaps = (two - one).mean(axis=0)
    drawn = gaps[1:][np.isfinite(gaps[1:])]
    means = float(one[:, 0].mean()), float(two[:, 0].mean()), float(gaps[0])
    videos = *bootstrap.percentile_interval(drawn, LEVEL), bootstrap.sign_p_value(drawn)
    seeds = student_t((two - one)[:, 0].tolist()) or (None, None, None)
    return Difference(metric, *means, *videos, len(gaps) - 1, len(gaps) - 1 - len(drawn), len(one), *seeds)


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


def explain(differences: Sequence[Difference], of_seeds: bool = True) -> str:
    """Explain the intervals of differences in words; without ``of_seeds`` those of two single runs."""
    tested = any(one.seed_p is not None for one in differences)
    seeds = "95 % interval by paired t over the seeds" if tested else "not tested, which takes two pairs of seeds"
    count = max(one.resamples for one in differences)
    text = f"95 % percentile interval of the difference over {count} paired resamples of the test videos"
    if of_seeds:
        text = f"videos: {text}, metrics averaged over seeds; seeds: {seeds}"
    text += "; p is two-sided and not corrected for the number of comparisons"
    skipped = max(one.skipped for one in differences)
    return text + (f"; up to {skipped} resamples in which a metric has no value were left out" if skipped else "")


def explain_stars(found: Mapping[str, Sequence[Difference]]) -> str:
    """Say what a star at a ``clear`` difference was tested for; ``found`` are the differences of each setting."""
    single = [name for name, own in found.items() if any(one.seed_p is None for one in own)]
    if len(single) == len(found):
        return "* p < 0.05 for the test videos; with one seed, differences between seeds are not tested"
    only = f"; {', '.join(single)}: one seed, so for the test videos only" if single else ""
    return f"* p < 0.05 for the test videos and for the seeds{only}"


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
    return by_name(tested)


def by_name(tested: TestResult) -> TestResult:
    """Return the result with its videos sorted by their names."""
    names = [entry.video for entry in tested.videos.entries]
    return tested.only(sorted(range(len(names)), key=names.__getitem__))


def check_paired(one: Path, first: VideoDataset, two: Path, second: VideoDataset) -> None:
    """Raise ``UserError`` unless the tests of two folders, sorted by name, are of the same videos and truth."""
    if what := _mismatch(first, second):
        raise UserError(
            f"{one} and {two} were tested on different {what}: they cannot be compared video by video; test both on "
            f"the same list and truth"
        )


def _mismatch(first: VideoDataset, second: VideoDataset) -> str:
    """Return in what the videos of two tests differ, with an example; empty if in nothing."""
    if first.dataset.labels != second.dataset.labels:
        return f"classes ({first.dataset.title}, {second.dataset.title})"
    names, truths = [[entry.video for entry in own.entries] for own in (first, second)], (first.truth, second.truth)
    if names[0] != names[1]:
        odd = sorted({*names[0]} ^ {*names[1]})
        return f"videos ({len(names[0])} and {len(names[1])}; not in both: {', '.join(odd[:3])})"
    for index, (one, two) in enumerate(zip(first.entries, second.entries, strict=True)):
        if one.label != two.label:
            return f"labels ({one.video}: {one.label}, {two.label})"
        spans = [truth and (truth.segments[index], truth.labels[index]) for truth in truths]
        frames = [truth.frames[index] if truth else np.empty(0) for truth in truths]
        if spans[0] != spans[1] or not np.array_equal(frames[0], frames[1]):
            counts = [f"{int(own.sum())} of {len(own)}" for own in frames]
            return f"truth ({one.video}: other frames are abnormal, {' and '.join(counts)})"
    return ""


def resampled_metrics(tested: TestResult, weights: np.ndarray, wanted: Sequence[str] | None = None) -> Values:
    """Return the metrics of ``evaluate`` and ``evaluate_classes`` on resamples.

    ``weights`` (R, V): how often each video was drawn. ``wanted`` are names of metrics; None: all that the scores
    allow, which are those of the branches, ``mauc``, ``mean_ap``, and averages of detection mAP over IoUs.
    """

    def needed(*names: str) -> bool:
        return wanted is None or not set(names).isdisjoint(wanted)

    pooled = pool(tested.scores, tested.videos)
    video = np.repeat(np.arange(len(pooled.snippets)), pooled.snippets)
    anomalous = tested.videos.anomalous[video]
    found: Values = {}
    for branch, scores in enumerate(pooled.anomaly, start=1):
        names = [f"{name}{branch}" for name in ("auc", "ap", "ap_trapezoid")]
        if needed(*names):
            ranked = bootstrap.resampled_ranking(scores, pooled.positives, pooled.frames, video, weights)
            found |= {name: 100 * values for name, values in zip(names, ranked, strict=True)}
        if needed(f"ano_auc{branch}"):
            inside = pooled.positives[anomalous], pooled.frames[anomalous], video[anomalous]
            found[f"ano_auc{branch}"] = 100 * bootstrap.resampled_ranking(scores[anomalous], *inside, weights)[0]
        if needed(f"far{branch}"):
            normal = np.where(anomalous, 0, pooled.frames)
            alarms, frames = (
                weights @ np.bincount(video, counts) for counts in (normal * (scores > FALSE_ALARM), normal)
            )
            with np.errstate(invalid="ignore"):
                found[f"far{branch}"] = 100 * alarms / frames
        if needed(f"video_auc{branch}"):
            whole = np.array([video_score(one.anomaly[branch - 1]) for one in tested.scores])
            videos = tested.videos.anomalous.astype(np.int64), np.ones(len(whole)), np.arange(len(whole))
            found[f"video_auc{branch}"] = 100 * bootstrap.resampled_ranking(whole, *videos, weights)[0]
    if pooled.classes is not None and needed("mauc", "mean_ap"):
        found |= _class_means(pooled, pooled.classes, video, weights)
    if pooled.classes is not None and needed("map_average", *(f"map_{variant}@average" for variant in _VARIANTS)):
        found |= _detection(tested, pooled, pooled.classes, weights)
    return {name: values for name, values in found.items() if needed(name)}


def _class_means(pooled: PooledScores, classes: np.ndarray, video: np.ndarray, weights: np.ndarray) -> Values:
    """Return in each resample the mean over the classes that occur in it."""
    ranked = np.array(
        [
            bootstrap.resampled_ranking(classes[:, column], pooled.truth[:, column], pooled.frames, video, weights)
            for column in range(1, classes.shape[1])
            if pooled.truth[:, column].any()
        ]
    ).reshape(-1, 3, len(weights))
    there = np.isfinite(ranked)
    with np.errstate(invalid="ignore"):
        mauc, mean_ap, _ = np.where(there, ranked, 0).sum(axis=0) / there.sum(axis=0)
    return {"mauc": 100 * mauc, "mean_ap": 100 * mean_ap}


def _detection(tested: TestResult, pooled: PooledScores, classes: np.ndarray, weights: np.ndarray) -> Values:
    protocol = str(tested.options.get("protocol", "paper"))
    if protocol not in HEADLINE_MAP:
        raise UserError(f"a run's protocol is {protocol!r}; it may be {', '.join(HEADLINE_MAP)}")
    truth, labels, ends = tested.videos.known_truth, tested.videos.dataset.labels, np.cumsum(pooled.snippets)[:-1]
    inputs = (np.split(classes, ends), truth.segments, truth.labels, labels, np.split(pooled.frames, ends))
    found = {}
    for variant in _VARIANTS:
        hits = detection_hits(*inputs, None if variant == "released" else NORMAL_IN_TRUTH)
        found[f"map_{variant}@average"] = bootstrap.resampled_detection(hits, weights, len(labels), variant)
    return {"map_average": found[f"map_{HEADLINE_MAP[protocol]}@average"]} | found
