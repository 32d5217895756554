"""How well each class is found (ranking of frames, detection of segments), and which classes are taken for which.

C classes, of which 0 is *normal*; K columns of a confusion: C, or two for a method without class probabilities.
"""

import numpy as np
import torch

from clipfusionvad.engine.evaluator import evaluate_classes
from clipfusionvad.io.errors import UserError
from clipfusionvad.losses import topk_mean
from clipfusionvad.metrics import corrected_detection_map
from clipfusionvad.report.curves import Confusion, PooledScores, confuse, pool
from clipfusionvad.report.scores import TestResult
from clipfusionvad.tools.analysis import figures
from clipfusionvad.tools.analysis.result import UNKNOWN, AnalysisResult, DataFrame, make_table, table_text

_REMARK = (
    "video_auc, video_ap: of the anomaly score over the frames of the class's videos (share_abnormal: AP of random\n"
    "scores there). auc, ap: of the class probability over all frames. detection_ap: mean over IoU 0.1 … 0.5."
)


def class_results(test: TestResult) -> DataFrame:
    """Return every anomalous class that has a video, the highest AP first; rates in 0..1, NaN where undefined.

    ``share_abnormal`` of the frames of its videos, which is the AP of random scores. ``video_auc``, ``video_ap``: the
    anomaly score over the frames of its videos (IEF-VAD). ``auc``, ``ap``: its probability against all other frames
    (AnomalyCLIP). ``detection_ap``: the mean over IoUs 0.1 … 0.5, anomalous videos only.
    """
    videos, labels = test.videos, test.videos.dataset.labels
    metrics = evaluate_classes(test.scores, videos)["per_class"]
    pooled = pool(test.scores, videos)
    detection = _detection(test, pooled)
    video_of = np.repeat(np.arange(len(pooled.snippets)), pooled.snippets)
    named = np.stack([videos.dataset.encode(entry.label) > 0 for entry in videos.entries])
    rows = []
    for column, label in enumerate(labels[1:], start=1):
        chosen = named[video_of, column]
        if chosen.any():
            share = pooled.positives[chosen].sum() / max(pooled.frames[chosen].sum(), 1)
            found = metrics.get(label, {})
            rates = {name: float(found.get(name, np.nan)) for name in ("video_auc", "video_ap", "auc", "ap")}
            row = {"class": label, "videos": int(named[:, column].sum()), "share_abnormal": float(share)}
            rows.append(row | rates | {"detection_ap": float(detection[column])})
    return make_table(rows).sort_values("video_ap", ascending=False, kind="stable", ignore_index=True)


def _detection(test: TestResult, pooled: PooledScores) -> np.ndarray:
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


def classes(test: TestResult) -> AnalysisResult:
    """AUC, AP and detection AP by class."""
    table = class_results(test)
    figure = figures.new_figure(12, 0.42 * len(table) + 1.9)
    axes = figure.subplots(1, 3, sharey=True)
    places = np.arange(len(table))
    score, probability = "anomaly score, frames of the class's videos", "class probability, all frames"
    bars = [
        (axes[0], "video_auc", -0.2, figures.COARSE_COLOUR, score),
        (axes[0], "auc", 0.2, figures.FINE_COLOUR, probability),
        (axes[1], "video_ap", -0.2, figures.COARSE_COLOUR, score),
        (axes[1], "ap", 0.2, figures.FINE_COLOUR, probability),
        (axes[2], "detection_ap", 0, figures.GREY, "detection"),
    ]
    for axis, column, shift, colour, label in bars:
        axis.barh(places + shift, table[column].fillna(0), 0.38 if shift else 0.5, color=colour, label=label)
        for place in places[table[column].isna()] + shift:
            axis.text(0.01, place, UNKNOWN, va="center", fontsize=8, color=figures.GREY)
    for axis, chance in zip(axes, (np.full(len(table), 0.5), table["share_abnormal"]), strict=False):
        axis.plot(chance, places - 0.2, "D", color="white", mec="black", ms=5, label="chance (blue bars)", ls="none")
    for axis, title in zip(axes, ("AUC", "AP", "detection AP, mean over IoU 0.1 … 0.5"), strict=True):
        axis.set(xlim=(0, 1), xlabel=title)
    axes[0].set_yticks(places, [f"{name} ({count})" for name, count in zip(table["class"], table.videos, strict=True)])
    axes[0].invert_yaxis()
    axes[0].set_ylabel("class (test videos)")
    figures.hide_spines(*axes)
    figures.legend_above(figure, axes[0])
    return AnalysisResult(table, figure, [table_text(table), _REMARK])


def confuse_frames(test: TestResult) -> Confusion:
    """Count all frames of all test videos, by the main branch and the class probabilities."""
    pooled, labels = pool(test.scores, test.videos), test.videos.dataset.labels
    return confuse(labels, pooled.truth, pooled.anomaly[0], pooled.classes, pooled.positives, pooled.frames)


def confuse_videos(test: TestResult) -> Confusion:
    """Count whole videos, by the top-k means of their scores that training uses too."""
    videos = test.videos
    anomaly = np.concatenate([_top(video.anomaly[:1]) for video in test.scores])
    classes = [_top(video.classes.T) for video in test.scores if video.classes is not None]
    truth = np.stack([videos.dataset.encode(entry.label) for entry in videos.entries]).astype(np.int64)
    abnormal, known = videos.anomalous.astype(np.int64), np.stack(classes) if classes else None
    return confuse(videos.dataset.labels, truth, anomaly, known, abnormal, np.ones_like(abnormal))


def _top(curves: np.ndarray) -> np.ndarray:
    """Return the top-k means of curves (R, n): (R,)."""
    rows = torch.from_numpy(curves.astype(np.float32))
    return topk_mean(rows, torch.full((len(rows),), rows.shape[1])).numpy()


def draw_confusion(labels: list[str], frames: Confusion, videos: Confusion) -> figures.Figure:
    """Draw both tables: the shares of each row as colours, the numbers in the cells."""
    figure = figures.new_figure(2 * (0.42 * len(frames.labels) + 2.6), 0.36 * len(labels) + 2.4)
    panels = ("frames, percent", frames, np.round(100 * frames.shares)), ("videos, counted", videos, videos.table)
    for axis, (title, found, numbers) in zip(figure.subplots(1, 2), panels, strict=True):
        totals = found.table.sum(axis=1)
        present = np.flatnonzero(totals)
        shares = found.shares[present]
        rows = [f"{labels[row]} ({totals[row]:,})" for row in present.tolist()]
        figures.draw_matrix(axis, shares, rows, found.labels, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(f"predicted class (anomalous at a score of {found.threshold:.3g} or more)")
        axis.set_ylabel(f"true class ({title.split(',')[0]})")
        for row, column in zip(*np.nonzero(numbers[present] > 0), strict=True):
            colour = "white" if shares[row, column] > 0.55 else "black"
            text = str(int(numbers[present[row], column]))
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    return figure


def confusion(test: TestResult) -> AnalysisResult:
    """Which classes are taken for which, by frames and videos."""
    labels = test.videos.dataset.labels
    frames, videos = confuse_frames(test), confuse_videos(test)
    if not frames.table[1:].any():
        raise UserError("no frame of these videos is annotated as anomalous")
    columns = frames.labels
    rows = [
        (unit, labels[row], columns[column], int(count), float(found.shares[row, column]))
        for unit, found in (("frames", frames), ("videos", videos))
        for (row, column), count in np.ndenumerate(found.table)
    ]
    short = []
    for row in np.flatnonzero(frames.table.sum(axis=1)):
        right = min(int(row), len(columns) - 1)
        others = frames.table[row] * (np.arange(len(columns)) != right)
        wrong = int(others.argmax())
        most = f"{columns[wrong]} ({100 * frames.shares[row, wrong]:.0f} %)" if others[wrong] else "-"
        counts = int(videos.table[row, right]), int(videos.table[row].sum())
        short.append((labels[row], float(frames.shares[row, right]), most, *counts))
    text = table_text(short, ["class", "frames correct", "most confused with", "videos correct", "of"])
    numbers = make_table(rows, ["unit", "true_class", "taken_for", "count", "share"])
    return AnalysisResult(numbers, draw_confusion(labels, frames, videos), [text])
