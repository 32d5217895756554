"""How well each class is found: ranking of frames, and detection of segments, by class.

C classes, of which 0 is *normal*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clipfusionvad.engine.evaluator import evaluate_classes
from clipfusionvad.metrics import corrected_detection_map
from clipfusionvad.report.scores import Tested
from clipfusionvad.tools.analysis.figures import (
    COARSE_COLOUR,
    FINE_COLOUR,
    GREY,
    hide_spines,
    legend_above,
    new_figure,
)
from clipfusionvad.tools.analysis.result import UNKNOWN, AnalysisResult, table_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from clipfusionvad.report.curves import Pooled

_RATES = ("video_auc", "video_ap", "auc", "ap")


@dataclass(frozen=True)
class ClassResult:
    """One anomalous class; rates in 0..1, NaN where there is nothing to rank.

    ``share_abnormal`` of the frames of its videos, which is the AP of random scores. ``video_auc``, ``video_ap``: the
    anomaly score over the frames of its videos (IEF-VAD). ``auc``, ``ap``: its probability against all other frames
    (AnomalyCLIP). ``detection_ap``: the mean over IoUs 0.1 … 0.5, anomalous videos only.
    """

    label: str
    videos: int
    share_abnormal: float
    video_auc: float
    video_ap: float
    auc: float
    ap: float
    detection_ap: float


def class_results(test: Tested) -> list[ClassResult]:
    """Return every anomalous class that has a video, the highest AP first."""
    from clipfusionvad.report.curves import pool

    videos, labels = test.videos, test.videos.dataset.labels
    metrics = evaluate_classes(test.scores, videos)["per_class"]
    pooled = pool(test.scores, videos)
    detection = _detection(test, pooled)
    video_of = np.repeat(np.arange(len(pooled.snippets)), pooled.snippets)
    named = np.stack([videos.dataset.encode(entry.label) > 0 for entry in videos.entries])
    results = []
    for column, label in enumerate(labels[1:], start=1):
        chosen = named[video_of, column]
        if chosen.any():
            found = metrics.get(label, {})
            share = pooled.positives[chosen].sum() / max(pooled.frames[chosen].sum(), 1)
            rates = {name: float(found.get(name, np.nan)) for name in _RATES}
            count = int(named[:, column].sum())
            results.append(ClassResult(label, count, float(share), detection_ap=float(detection[column]), **rates))
    return sorted(results, key=lambda result: -np.nan_to_num(result.video_ap, nan=-1))


def _detection(test: Tested, pooled: Pooled) -> np.ndarray:
    """Return the detection AP (C,), the mean over IoUs; NaN for a method without class probabilities."""
    truth, labels = test.videos.known_truth, test.videos.dataset.labels
    classes = [video.classes for video in test.scores if video.classes is not None]
    if not classes:
        return np.full(len(labels), np.nan)
    frames = np.split(pooled.frames, np.cumsum(pooled.snippets)[:-1])
    found = corrected_detection_map(
        classes, truth.segments, truth.labels, labels, frames=frames, unknown_labels="ignore"
    )["anomalous_only"]
    return np.mean(list(found["per_class"].values()), axis=0)


def draw_classes(results: list[ClassResult]) -> Figure:
    """Draw AUC, AP and detection AP as bars by class."""
    figure = new_figure(12, 0.42 * len(results) + 1.9)
    left, middle, right = figure.subplots(1, 3, sharey=True)
    places = np.arange(len(results))
    video, probability = "anomaly score, frames of the class's videos", "class probability, all frames"
    for axis, name, chance in (
        (left, "auc", [0.5] * len(results)),
        (middle, "ap", [result.share_abnormal for result in results]),
    ):
        _bars(axis, places - 0.2, [getattr(result, f"video_{name}") for result in results], COARSE_COLOUR, video)
        _bars(axis, places + 0.2, [getattr(result, name) for result in results], FINE_COLOUR, probability)
        axis.plot(chance, places - 0.2, "D", color="white", mec="black", ms=5, label="blue, by chance", ls="none")
        axis.set_xlabel(name.upper())
    _bars(right, places, [result.detection_ap for result in results], GREY, "detection", height=0.5)
    right.set_xlabel("detection AP, mean over IoU 0.1 … 0.5")
    left.set_yticks(places, [f"{result.label} ({result.videos})" for result in results])
    left.invert_yaxis()
    left.set_ylabel("class (test videos)")
    for axis in (left, middle, right):
        axis.set_xlim(0, 1)
    hide_spines(left, middle, right)
    legend_above(figure, left)
    return figure


def _bars(axis: Axes, places: np.ndarray, values: list[float], colour: str, label: str, height: float = 0.38) -> None:
    axis.barh(places, np.nan_to_num(values), height, color=colour, label=label)
    for place in places[np.isnan(values)]:
        axis.text(0.01, place, UNKNOWN, va="center", fontsize=8, color=GREY)


def classes(test: Tested) -> AnalysisResult:
    """AUC, AP and detection AP by class."""
    import pandas as pd

    results = class_results(test)
    table = pd.DataFrame(results).rename(columns={"label": "class"})
    return AnalysisResult(table, draw_classes(results), [table_text(table)])
