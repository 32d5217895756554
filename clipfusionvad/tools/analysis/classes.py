"""How well each class is found: ranking of frames, and detection of segments, by class.

C classes, of which 0 is *normal*.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from clipfusionvad.data.truth import Truth
from clipfusionvad.engine.evaluator import evaluate_classes
from clipfusionvad.metrics import corrected_detection_map
from clipfusionvad.report.curves import pool
from clipfusionvad.report.plots import COARSE_COLOUR, FINE_COLOUR
from clipfusionvad.report.scores import TestResult
from clipfusionvad.tools.analysis.result import GREY, UNKNOWN, Insight, Table, bare

HEADER = ("class", "videos", "share_abnormal", "video_auc", "video_ap", "auc", "ap", "detection_ap")


@dataclass(frozen=True)
class ClassResult:
    """One anomalous class; rates in 0..1, NaN where there is nothing to rank.

    ``share_abnormal`` of the frames of its videos, which is the AP of a score that knows nothing. ``video_auc``,
    ``video_ap``: the anomaly score over the frames of its videos (IEF-VAD). ``auc``, ``ap``: its probability against
    all other frames (AnomalyCLIP). ``detection_ap``: the mean over IoUs 0.1 … 0.5, anomalous videos only.
    """

    label: str
    videos: int
    share_abnormal: float
    video_auc: float
    video_ap: float
    auc: float
    ap: float
    detection_ap: float


def class_results(tested: TestResult) -> list[ClassResult]:
    """Every anomalous class with a video, the one that is found best first."""
    videos, labels = tested.videos, tested.videos.dataset.labels
    metrics = evaluate_classes(tested.scores, videos)["per_class"]
    pooled, detection = pool(tested.scores, videos), _detection(tested)
    video_of = np.repeat(np.arange(len(pooled.snippets)), pooled.snippets)
    named = np.stack([videos.dataset.encode(entry.label) > 0 for entry in videos.entries])
    results = []
    for column, label in enumerate(labels[1:], start=1):
        own = named[video_of, column]
        if not own.any():
            continue
        found = metrics.get(label, {})
        share = pooled.positives[own].sum() / max(pooled.frames[own].sum(), 1)
        rates = {name: float(found.get(name, np.nan)) for name in HEADER[3:-1]}
        known = float("nan") if detection is None else float(detection[column])
        results.append(ClassResult(label, int(named[:, column].sum()), float(share), detection_ap=known, **rates))
    return sorted(results, key=lambda result: -np.nan_to_num(result.video_ap, nan=-1))


def _detection(tested: TestResult) -> np.ndarray | None:
    """Detection AP (C,), the mean over IoUs; None where the method does not tell classes apart."""
    truth: Truth = tested.videos.known_truth
    classes = [video.classes for video in tested.scores if video.classes is not None]
    if not classes:
        return None
    pooled = pool(tested.scores, tested.videos)
    frames = np.split(pooled.frames, np.cumsum(pooled.snippets)[:-1])
    labels = tested.videos.dataset.labels
    found = corrected_detection_map(
        classes, truth.segments, truth.labels, labels, frames=frames, unknown_labels="ignore"
    )["anomalous_only"]
    return np.mean(list(found["per_class"].values()), axis=0)


def draw_classes(results: list[ClassResult]) -> Figure:
    """Bars by class: AUC, AP, detection AP."""
    figure = Figure(figsize=(12, 0.42 * len(results) + 1.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    places = np.arange(len(results))
    video, own = "anomaly score, frames of the class's videos", "class probability, all frames"
    for axis, name, chance in (
        (left, "auc", [0.5] * len(results)),
        (middle, "ap", [result.share_abnormal for result in results]),
    ):
        _bars(axis, places - 0.2, [getattr(result, f"video_{name}") for result in results], COARSE_COLOUR, video)
        _bars(axis, places + 0.2, [getattr(result, name) for result in results], FINE_COLOUR, own)
        axis.plot(chance, places - 0.2, "D", color="white", mec="black", ms=5, label="blue, by chance", ls="none")
        axis.set_xlabel(name.upper())
    _bars(right, places, [result.detection_ap for result in results], GREY, "detection", height=0.5)
    right.set_xlabel("detection AP, mean over IoU 0.1 … 0.5")
    left.set_yticks(places, [f"{result.label} ({result.videos})" for result in results])
    left.invert_yaxis()
    left.set_ylabel("class (test videos)")
    for axis in (left, middle, right):
        axis.set_xlim(0, 1)
        bare(axis)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _bars(
    axis: matplotlib.axes.Axes, places: np.ndarray, values: list[float], colour: str, label: str, height: float = 0.38
) -> None:
    axis.barh(places, np.nan_to_num(values), height, color=colour, label=label)
    for place, value in zip(places, values, strict=True):
        if np.isnan(value):
            axis.text(0.01, place, UNKNOWN, va="center", fontsize=8, color=GREY)


def classes_insight(tested: TestResult) -> Insight:
    """The results as table and picture."""
    results = class_results(tested)
    table = Table(HEADER, [astuple(result) for result in results])
    return Insight(table, draw_classes(results), [table.text()])
