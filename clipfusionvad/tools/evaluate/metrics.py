"""Metrics of score files of any program, with intervals over the test videos and paired differences."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipfusionvad.data.config import FRAMES_PER_SNIPPET
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.evaluator import VideoDataset, VideoScores, evaluate, evaluate_classes, smooth_videos
from clipfusionvad.io.errors import UserError
from clipfusionvad.metrics import FALSE_ALARM, bootstrap
from clipfusionvad.report.formatting import Table
from clipfusionvad.report.scores import TestResult, is_scores, read_scores
from clipfusionvad.tools.evaluate.fit import Judged, fit_scores
from clipfusionvad.tools.evaluate.score_files import ScoreFile, read_score_file
from clipfusionvad.tools.evaluate.truth import KnownTruth
from clipfusionvad.tools.tables.compare import LEVEL, difference, resampled_metrics

#: Metrics in 0..1 by key, and their titles.
TITLES = {
    "auc": "AUC", "ap": "AP (step)", "ap_trapezoid": "AP (trapezoid)", "ano_auc": "Ano-AUC",
    "far": "false alarms", "video_auc": "AUC of videos",
}  # fmt: skip
#: Of files with class probabilities: averages over classes in 0..1, and detection mAP in percent.
CLASS_TITLES = {"mauc": "mAUC", "mean_ap": "mAP of frames", "map_average": "detection mAP"}
_PERCENT = ("map_average",)


@dataclass(frozen=True)
class Result:
    """The metrics of one score file at one smoothing.

    ``values``: by key the metric, followed by those of R resamples, (1 + R,). ``more``: metrics without interval.
    """

    path: str
    smooth: float
    judged: Judged
    values: dict[str, np.ndarray]
    more: dict[str, Any]

    def interval(self, key: str) -> tuple[float, float] | None:
        """Return the 95 % interval of a metric over the test videos; None where it cannot be resampled."""
        drawn = self.values[key][1:]
        drawn = drawn[np.isfinite(drawn)]
        return bootstrap.percentile_interval(drawn, LEVEL) if len(drawn) else None


def judge_file(
    path: str, known: KnownTruth | None, dataset: Dataset, convention: str | None, stride: str | None
) -> Judged:
    """Read a file's scores and fit them to the truth; a file of a test of ours may hold its own."""
    if is_scores(path):
        tested = read_scores(path)
        branches = len(tested.scores[0].anomaly)
        notes = [f"{path}: branch 1 of {branches}"] if branches > 1 else []
        scores = [VideoScores(one.anomaly[:1], one.classes) for one in tested.scores]
        if known is None and tested.videos.truth is not None:
            if tested.videos.dataset.labels != dataset.labels:
                raise UserError(f"{path} was tested on {tested.videos.dataset.title}, --dataset is {dataset.title}")
            return Judged(scores, tested.videos, "as in its test", notes)
        classes = [one.classes for one in scores if one.classes is not None]
        found = ScoreFile(
            np.concatenate([one.anomaly[0] for one in scores]),
            np.concatenate(classes) if classes else None,
            np.array([one.anomaly.shape[1] for one in scores]),
            [entry.video for entry in tested.videos.entries],
            notes=tuple(notes),
        )
    else:
        found = read_score_file(path, dataset)
    if known is None:
        raise UserError("no truth: give --truth FILE, or --annotations FILE (with --lengths FILE)")
    return fit_scores(path, found, known, dataset, convention, stride)


def measure(path: str, judged: Judged, sigma: float, resamples: int, seed: int) -> Result:
    """Return the metrics of scores smoothed by ``sigma`` snippets, with those of resamples of the test videos."""
    videos, stride = judged.videos, judged.videos.frames_per_snippet
    scores = smooth_videos(judged.scores, sigma * FRAMES_PER_SNIPPET / stride if stride else sigma)
    weights = bootstrap.draw_videos(len(scores), resamples if judged.bordered else 0, seed)
    keys = list(TITLES) if judged.bordered else ["auc", "ap", "ap_trapezoid"]
    wanted = [f"{key}1" for key in keys] + list(CLASS_TITLES) * judged.classed
    tested = TestResult({}, {}, list(scores), videos)
    found = resampled_metrics(tested, weights, wanted)
    if judged.bordered and stride and stride < FRAMES_PER_SNIPPET:
        # Repeated scores pool as the snippets do.
        whole = [VideoScores(_by_snippet(one.anomaly, FRAMES_PER_SNIPPET // stride), None) for one in scores]
        coarse = VideoDataset(videos.entries, videos.dataset, 0, videos.truth, FRAMES_PER_SNIPPET)
        found |= resampled_metrics(TestResult({}, {}, whole, coarse), weights, ["video_auc1"])
    named = {key.removesuffix("1"): values for key, values in found.items()}
    values = {key: own if key in _PERCENT else own / 100 for key, own in named.items()}
    more: dict[str, Any] = {}
    if judged.classed and scores[0].classes is not None:
        more = {key: value for key, value in evaluate(scores, videos).items() if key.startswith("map")}
        more |= evaluate_classes(scores, videos)
    return Result(path, sigma, judged, values, more)


def _by_snippet(curves: np.ndarray, rows: int) -> np.ndarray:
    """Return the means of scores (branches, n) over snippets of so many rows."""
    first = np.arange(0, curves.shape[1], rows)
    return np.add.reduceat(curves, first, axis=1) / np.diff(np.append(first, curves.shape[1]))


def doubts(result: Result) -> list[str]:
    """Return what looks wrong in a file's scores."""
    curve = np.concatenate([video.anomaly[0] for video in result.judged.scores])
    found = []
    if np.ptp(curve) == 0:
        found.append(
            f"every score of {result.path} is {curve[0]:.6g}: the file ranks nothing, AUC is 0.5 for any truth"
        )
    if curve.min() < 0 or curve.max() > 1:
        found.append(
            f"scores of {result.path} lie in {curve.min():.4g} … {curve.max():.4g}, not in 0 … 1: the false alarm rate "
            f"at {FALSE_ALARM} says nothing"
        )
    if np.isnan(result.values["auc"][0]):
        kind = "abnormal" if not any(part.any() for part in result.judged.videos.known_truth.frames) else "normal"
        found.append(f"the truth of {result.path} has no {kind} frame: AUC and AP cannot be computed")
    if result.values["auc"][0] < 0.5:
        found.append(f"the AUC of {result.path} is below 0.5: are these scores of normality, or of another order?")
    return found


def compare(reference: Result, other: Result) -> dict[str, dict[str, Any]]:
    """Return by metric other − reference, its 95 % interval over paired resamples of videos, and the two-sided p."""
    names = [[entry.video for entry in one.judged.videos.entries] for one in (reference, other)]
    # Numbered videos can only be paired by their number.
    if len(names[0]) != len(names[1]) or (names[0] != names[1] and not any(own[0] == "video 0" for own in names)):
        raise UserError(
            f"{reference.path} and {other.path} are of different videos ({len(names[0])} and {len(names[1])}) or of "
            f"another order: they cannot be compared video by video"
        )
    found = {}
    for key in reference.values.keys() & other.values.keys():
        one = difference(key, reference.values[key][None], other.values[key][None])
        drawn = one.skipped < one.resamples
        interval, p = ((one.low, one.high), one.p) if drawn else (None, None)
        found[key] = {"difference": one.difference, "interval": interval, "p": p}
    return found


def record(result: Result, reference: Result | None) -> dict[str, Any]:
    """Return the JSON record of a file: metrics in 0..1 (detection mAP in percent), null where undefined."""
    about: dict[str, Any] = {key: float(result.values[key][0]) if key in result.values else None for key in TITLES}
    about |= {key: float(own[0]) for key, own in result.values.items() if key not in TITLES} | result.more
    stride = result.judged.videos.frames_per_snippet
    about |= {
        "intervals": {key: result.interval(key) for key in result.values},
        "smooth": result.smooth,
        "convention": result.judged.convention,
        "frames": sum(map(len, result.judged.videos.known_truth.frames)),
        "videos": len(result.judged.scores) if result.judged.bordered else None,
        "frames_per_score": stride or "equal",
    }
    if reference is not None and result is not reference:
        about["difference"] = {"reference": reference.path, "smooth": reference.smooth} | compare(reference, result)
    return about


def metrics_table(results: Sequence[Result]) -> Table:
    """Return a row for each file and smoothing, in percent with 95 % intervals."""
    keys = [key for key in TITLES | CLASS_TITLES if any(key in one.values for one in results)]
    rows = [
        (_short(one, results), f"{one.smooth:g}", one.judged.convention, *(_cell(one, key) for key in keys))
        for one in results
    ]
    return Table(("scores", "smooth", "convention", *((TITLES | CLASS_TITLES)[key] for key in keys)), rows, labels=3)


def _short(result: Result, results: Sequence[Result]) -> str:
    """Return a file's path, or its name if no other file is called so."""
    name = Path(result.path).name
    return name if len({one.path for one in results if Path(one.path).name == name}) == 1 else result.path


def _cell(result: Result, key: str) -> str:
    if key not in result.values or not np.isfinite(result.values[key][0]):
        return "-"
    scale = 1 if key in _PERCENT else 100
    interval = result.interval(key)
    text = f"{scale * result.values[key][0]:.4f}"
    return text + (f" [{scale * interval[0]:.1f}, {scale * interval[1]:.1f}]" if interval else "")


def difference_table(results: Sequence[Result], reference: Result) -> Table:
    """Return a row for each result but the reference: the paired differences in percent points."""
    keys = [key for key in TITLES | CLASS_TITLES if key in reference.values]
    rows = []
    for one in results:
        if one is reference:
            continue
        found, cells = compare(reference, one), []
        for key in keys:
            scale = 1 if key in _PERCENT else 100
            if key not in found or not np.isfinite(found[key]["difference"]):
                cells.append("-")
                continue
            text = f"{scale * found[key]['difference']:+.2f}"
            low_high = found[key]["interval"]
            cells.append(text + (f" [{scale * low_high[0]:+.1f}, {scale * low_high[1]:+.1f}]" if low_high else ""))
        rows.append((_short(one, results), f"{one.smooth:g}", *cells))
    header = (f"minus {_short(reference, results)}", "smooth", *((TITLES | CLASS_TITLES)[key] for key in keys))
    return Table(header, rows, labels=2)


def evaluate_files(
    paths: Sequence[str],
    known: KnownTruth | None,
    dataset: Dataset,
    sigmas: Sequence[float],
    convention: str | None,
    stride: str | None,
    resamples: int,
    seed: int,
) -> list[Result]:
    """Return the results of score files, one for each smoothing; ``UserError`` where a file does not fit the truth."""
    if known is not None and known.array is not None and known.lengths is None:
        known = _with_borders(paths, known, dataset)
    results = []
    for path in paths:
        judged = judge_file(path, known, dataset, convention, stride)
        if any(sigmas) and not judged.bordered:
            raise UserError(f"{path}: --smooth needs the videos to be told apart; give --lengths FILE")
        for sigma in sigmas:
            results.append(measure(path, judged, sigma, resamples, seed))
            # Printed once.
            judged = replace(judged, notes=[])
    return results


def _with_borders(paths: Sequence[str], known: KnownTruth, dataset: Dataset) -> KnownTruth:
    """Return the truth array with the videos of the first score file that tells them apart and covers it evenly."""
    assert known.array is not None
    for path in paths:
        rows = None if is_scores(path) else read_score_file(path, dataset).rows
        if rows is not None and len(paths) > 1 and len(known.array) % rows.sum() == 0:
            judged = judge_file(path, known, dataset, None, None)
            return replace(known, lengths=np.array([len(frames) for frames in judged.videos.known_truth.frames]))
    return known
