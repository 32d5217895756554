"""The metrics of a result as a table, and the published figures beside them."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import resources
from operator import getitem
from typing import Any

from clipfusionvad.datasets import DATASETS
from clipfusionvad.engine.run_folder import UNDEFINED
from clipfusionvad.io.errors import UserError
from clipfusionvad.report.formatting import Table, to_text

#: Metrics by the name of a result.
Results = Mapping[str, Mapping[str, Any]]
# Far beyond any metric; larger integers of JSON do not fit a float.
_LARGEST = 1e300
BRANCHES = {"1": "coarse branch", "2": "fine branch"}
#: Metrics of each branch, as ``AP_NOTE`` explains.
RANKING = {"auc": "AUC", "ap": "AP", "ap_trapezoid": "AP (trapezoid)", "ano_auc": "Ano-AUC"}
RANKING |= {"far": "false alarm rate", "video_auc": "video-level AUC"}
AP_NOTE = (
    "AP: step-wise average precision; AP (trapezoid): area under the linearly joined curve, larger where scores tie"
)
WHOLE_VIDEOS = (
    "Whole videos are judged, not frames, because no truth of frames was given (--gt-path none): AUC and AP say how "
    "well scores tell anomalous videos from normal ones."
)
MEANS = {"mauc": "mAUC, class against rest", "mean_ap": "mAP of frames, class against rest"}
IOUS = ("0.1", "0.2", "0.3", "0.4", "0.5")
VARIANTS = {
    "map_released": "as released",
    "map_normal_matched": "corrected: normal class matched",
    "map_anomalous_only": "corrected: anomalous videos only",
}


@dataclass(frozen=True)
class PublishedFigure:
    """A published figure: percent for detection mAP (``map…``), 0..1 for all other metrics."""

    method: str
    dataset: str
    metric: str
    value: float
    source: str

    @property
    def percent(self) -> float:
        return self.value if self.metric.startswith("map") else 100 * self.value


def published_figures() -> list[PublishedFigure]:
    """Read ``published.csv``. Of several figures for one metric, the first is the paper's claimed result."""
    text = resources.files(__package__).joinpath("published.csv").read_text(encoding="utf-8")
    rows = csv.reader(text.splitlines()[1:])
    return [PublishedFigure(row[0], row[1], row[2], float(row[3]), row[4]) for row in rows]


def published(method: str, dataset: str, protocol: str = "paper") -> dict[str, float]:
    """Return the published figures of a method on a dataset, with the keys of the metrics ("map@0.1" for one IoU).

    Papers report detection mAP as the released procedure computes it, so it is shown beside that variant only.
    """
    own = [figure for figure in published_figures() if (figure.method, figure.dataset) == (method, dataset)]
    figures = {figure.metric: figure.value for figure in reversed(own)}
    if "map_average" in figures:
        figures["map_released@average"] = figures["map_average"]
    if protocol == "paper":
        return figures
    return {key: value for key, value in figures.items() if "map" not in key or "released" in key}


def made_up(options: Mapping[str, Any]) -> str:
    """Return what of a run or test with these options is made up, "" where nothing is."""
    from clipfusionvad.models.clip import TOY  # here: printing a table does not need torch

    if options.get("demo"):
        return "the data are made up"
    return "the weights of CLIP are made up (--clip toy)" if options.get("clip") == TOY else ""


def no_comparison(options: Mapping[str, Any], judged: int | None) -> str:
    """Return why the papers' figures may not stand beside a result; "" where they may.

    ``options`` are those of the run or test; ``judged`` is ``VideoDataset.judged``, None where it is not known.
    """
    benchmark = DATASETS.get(str(options.get("dataset")))
    if reason := made_up(options):
        return reason
    if judged == 0:
        return "whole videos are judged, not frames"
    if judged is None:
        return "the test's scores are missing, so it is not known how many videos were tested"
    sizes = sorted({one.videos for one in benchmark.conventions} - {0}) if benchmark else []
    if benchmark and judged not in sizes:
        return f"{judged} videos were tested; the test set of {benchmark.title} has {' or '.join(map(str, sizes))}"
    return ""


def published_beside(options: Mapping[str, Any], judged: int | None) -> tuple[dict[str, float], list[str]]:
    """Return the published figures to show beside a result, and lines to put above it; see ``no_comparison``."""
    method, name, protocol = (str(options.get(key)) for key in ("method", "dataset", "protocol"))
    paper, reason = published(method, name, protocol), no_comparison(options, judged)
    lines = [WHOLE_VIDEOS] if judged == 0 else []
    if paper and reason:
        lines.append(f"The paper's figures are not shown: {reason}.")
    return ({} if reason else paper), lines


def check_metrics(metrics: Any, where: str) -> None:
    """Raise ``UserError`` unless a result that was read from a file has the metrics that its tables show."""
    if not isinstance(metrics, dict):
        raise UserError(f"{where}: expected names and numbers, got {str(metrics)[:60]}")
    needed = [keys for _, keys in _rows(metrics)]
    needed += [(variant, iou) for variant in VARIANTS for iou in IOUS if "map" in metrics]
    per_class = metrics.get("per_class", {})
    if not isinstance(per_class, dict) or not all(isinstance(found, dict) for found in per_class.values()):
        raise UserError(f"{where}: per_class does not hold the metrics of classes")
    needed += [("smooth",)] if "smooth" in metrics else []
    needed += [("per_class", label, key) for label, found in per_class.items() for key in found]
    reasons = metrics.get(UNDEFINED, {})
    if not isinstance(reasons, dict) or not all(isinstance(reason, str) for reason in reasons.values()):
        raise UserError(f"{where}: {UNDEFINED} does not hold the reasons of metrics")
    for keys in needed:
        try:
            value = _value(metrics, keys)
        except (LookupError, TypeError) as error:
            raise UserError(f"{where} lacks {', '.join(keys)}") from error
        if value is not None and (not isinstance(value, int | float) or abs(value) > _LARGEST):
            raise UserError(f"{where}: {', '.join(keys)} is {str(value)[:60]}, not a number")


def metrics_table(results: Results, paper: Mapping[str, float], above: Sequence[str] = ()) -> str:
    """Render metrics as text in percent: a column per result, and one for the published figures if there are any.

    ``above`` are lines over the table. Lines below name the metrics that are undefined, and why; which AP is which; and
    how far scores were smoothed.
    """
    rows = [[title, *values] for title, _, values in metrics_rows(results, paper)]
    table = to_text(Table(["percent", *results, *(["paper"] if paper else [])], rows))
    notes = [AP_NOTE] if any("ap_trapezoid1" in found for found in results.values()) else []
    return "\n".join([*above, table, *notes, *undefined_lines(results), *smoothing_lines(results)])


def undefined_lines(results: Results) -> list[str]:
    """Return a line for each reason why metrics in the table are undefined."""
    metrics = next(iter(results.values()))
    reasons, titles = metrics.get(UNDEFINED, {}), dict[str, list[str]]()
    for title, (name, *_) in _rows(metrics):
        if name in reasons:
            titles.setdefault(reasons[name], []).append(title.strip())
    return [f"undefined (-): {'; '.join(names)}: {reason}" for reason, names in titles.items()]


def smoothing_lines(results: Results) -> list[str]:
    """Return a line that says how far scores were smoothed over time, if they were."""
    sigmas = sorted({found["smooth"] for found in results.values() if found.get("smooth")})
    text = ", ".join(f"{sigma:g}" for sigma in sigmas)
    return [f"scores smoothed over time: Gaussian, σ = {text} snippets"] if sigmas else []


def metrics_rows(results: Results, paper: Mapping[str, float]) -> list[tuple[str, str, list[str]]]:
    """Return the rows of that table: title, key as in ``published``, a percentage or "-" per result and the paper."""
    rows = []
    for title, keys in _rows(next(iter(results.values()))):
        figures = [paper.get("@".join(keys))] if paper else []
        values = [*(_value(result, keys) for result in results.values()), *figures]
        rows.append((title, "@".join(keys), [percent(keys[0], value) for value in values]))
    return rows


def _rows(metrics: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """Return title and key path of every row that the metrics can fill."""
    names = {f"{key}{n}": f"{name}, {branch}" for n, branch in BRANCHES.items() for key, name in RANKING.items()}
    single = [(title, key) for key, title in (names | MEANS).items() if key in metrics]
    rows: list[tuple[str, tuple[str, ...]]] = [(title, (key,)) for title, key in single]
    if "map" in metrics:
        rows += [(f"detection mAP@{iou}", ("map", iou)) for iou in IOUS]
        rows += [("detection mAP, average", ("map_average",))]
        rows += [(f"  {title}", (key, "average")) for key, title in VARIANTS.items()]
    return rows


def _value(metrics: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    return reduce(getitem, keys, metrics)  # type: ignore[return-value]


def percent(key: str, value: float | None) -> str:
    """Return a metric in percent, "-" where it is undefined."""
    return "-" if value is None or value != value else f"{value if key.startswith('map') else 100 * value:.2f}"
