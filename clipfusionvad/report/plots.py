"""Figures of a run: scores over the truth, losses and metrics of the training. The first one loads matplotlib."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clipfusionvad.engine.evaluator import VideoDataset, VideoScores
from clipfusionvad.io.files import atomic_write
from clipfusionvad.report.fonts import drawing
from clipfusionvad.report.scores import abnormal_spans

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRUTH_COLOUR, COARSE_COLOUR, FINE_COLOUR = "#f4b6a6", "#1f4e79", "#d98200"
#: The colour of each class by its number in the dataset, on light and on dark ground; normal is grey.
CLASS_COLOURS = (
    ("#717171", "#a4a4a4"), ("#c13e2e", "#f38b7a"), ("#ba02b4", "#fe60f5"), ("#52a32f", "#89dc6a"),
    ("#631e5f", "#ab61a5"), ("#bc78c2", "#f4adfa"), ("#00580d", "#519b52"), ("#b4911b", "#ebc75e"),
    ("#5c1fb4", "#996bff"), ("#683c00", "#ac7c4a"), ("#439e8e", "#7dd6c5"), ("#bb0a71", "#f372ac"),
    ("#343a6e", "#717bb6"), ("#751424", "#c15c62"), ("#5e90fd", "#bacbec"), ("#b08d7b", "#e7c1af"),
    ("#7555a8", "#b191ea"), ("#000ac0", "#3c74fb"),
)  # fmt: skip


def colour_number(number: int) -> int:
    """Return the index into ``CLASS_COLOURS`` of class ``number``; beyond the last colour the first ones are reused."""
    return number and 1 + (number - 1) % (len(CLASS_COLOURS) - 1)


def draw_score_curves(path: Path, scores: Sequence[VideoScores], videos: VideoDataset) -> None:
    """Draw the anomaly probability over time of up to twelve test videos, with the annotated frames shaded."""
    from matplotlib.figure import Figure

    chosen, fps = _varied(videos, 12), videos.dataset.fps
    rows = -(-len(chosen) // 3)
    figure = Figure(figsize=(15, 2.3 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, 3, sharey=True, squeeze=False).ravel()
    for axis in axes[len(chosen) :]:
        axis.remove()
    for axis, index in zip(axes, chosen, strict=False):
        entry, anomaly = videos.entries[index], scores[index].anomaly
        truth = videos.truth.frames[index] if videos.truth else np.zeros(0, np.uint8)
        seconds = (np.arange(anomaly.shape[1]) + 0.5) * videos.mean_frames(index, anomaly.shape[1]) / fps
        for number, (start, end) in enumerate(abnormal_spans(truth)):
            label = "_repeated" if number else "annotated anomaly"
            axis.axvspan(start / fps, end / fps, color=TRUTH_COLOUR, lw=0, label=label)
        for curve, colour, name in zip(anomaly, (COARSE_COLOUR, FINE_COLOUR), ("coarse", "fine"), strict=False):
            axis.plot(seconds, curve, color=colour, lw=1.4, label=f"{name} branch")
        name = entry.video if len(entry.video) <= 34 else f"{entry.video[:33]}…"
        axis.set_title(f"{name} · {entry.label}", fontsize=9, loc="left")
        axis.set(ylim=(0, 1), xlim=(0, max(len(truth) / fps, seconds[-1])))
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel("seconds")
    figure.supylabel("anomaly probability")
    save_figure(figure, path)


def _varied(videos: VideoDataset, count: int) -> list[int]:
    """Choose up to ``count`` videos: anomalous ones of as many labels as possible, then two normal ones."""
    import pandas as pd

    labels = pd.Series([entry.label for entry in videos.entries])
    ranked = labels.groupby(labels).cumcount().sort_values(kind="stable").index.tolist()
    normal = [index for index in ranked if not videos.anomalous[index]][:2]
    anomalous = [index for index in ranked if videos.anomalous[index]][: count - len(normal)]
    return sorted(anomalous) + normal


#: The metrics of evaluations that are drawn over the steps of a training.
EVALUATIONS = r"^(auc|ap|ano_auc)\d+$"


def draw_training(path: Path, folder: Path) -> None:
    """Draw losses per step and metrics per evaluation, from a run's ``losses.csv`` and ``metrics.csv``.

    Nothing is drawn for a run without a step, of a checkpoint that was trained to the end.
    """
    import pandas as pd
    from matplotlib.figure import Figure

    if not (folder / "losses.csv").stat().st_size:
        return
    losses = pd.read_csv(folder / "losses.csv", index_col="step").drop(columns=["epoch", "lr"])
    evaluations = pd.read_csv(folder / "metrics.csv", index_col="step").filter(regex=EVALUATIONS)
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses.plot(ax=left, title="training loss", lw=1)
    evaluations.plot(ax=right, title="evaluations", marker="o", ms=3, lw=1, ylim=(0, 1))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def save_figure(figure: "Figure", path: Path, dpi: int = 110) -> None:
    buffer = io.BytesIO()
    with drawing(figure):
        figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=dpi)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
