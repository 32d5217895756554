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
from clipfusionvad.report.table import BRANCHES, RANKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUTH_COLOUR, COARSE_COLOUR, FINE_COLOUR = "#f4b6a6", "#1f4e79", "#d98200"
_LIGHT = (
    "#717171 #c13e2e #ba02b4 #52a32f #631e5f #bc78c2 #00580d #b4911b #5c1fb4 #683c00 #439e8e #bb0a71 #343a6e "
    "#751424 #5e90fd #b08d7b #7555a8 #000ac0"
)
_DARK = (
    "#a4a4a4 #f38b7a #fe60f5 #89dc6a #ab61a5 #f4adfa #519b52 #ebc75e #996bff #ac7c4a #7dd6c5 #f372ac #717bb6 "
    "#c15c62 #bacbec #e7c1af #b191ea #3c74fb"
)
#: The colour of each class by its number in the dataset, on light and on dark ground; normal is grey.
CLASS_COLOURS = tuple(zip(_LIGHT.split(), _DARK.split(), strict=True))


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
        axis.set(ylim=(0, 1.02), xlim=(0, max(len(truth) / fps, seconds[-1])))
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


def training_series(
    losses: "pd.DataFrame | None", evaluations: "pd.DataFrame | None"
) -> list[tuple[str, "pd.DataFrame", str, str]]:
    """Return title, table by step, unit and marker of each plot of a training, as far as its logs hold numbers."""
    series = []
    if losses is not None:
        terms = losses.drop(columns=["epoch", "lr"], errors="ignore")
        # A single step is not a line.
        marker = "o" if len(losses) == 1 else ""
        series += [("Training loss", terms, "loss", marker), ("Learning rate", losses.filter(["lr"]), "", marker)]
    if evaluations is not None:
        # As short as a legend needs it: AUC coarse.
        short = {f"{key}{n}": f"{RANKING[key]} {short_branch(n)}" for key in ("auc", "ap", "ano_auc") for n in BRANCHES}
        series.append(("Evaluations", 100 * evaluations.filter(list(short)).rename(columns=short), "percent", "o"))
        series.append(("Detection mAP, average", evaluations.filter(["map_average"]), "percent", "o"))
    return [one for one in series if one[1].size]


def short_branch(number: str) -> str:
    return BRANCHES.get(number, f"branch {number}").removesuffix(" branch")


def fit_steps(axis: "Axes", title: str) -> None:
    """Let the axes of a training plot fit its data; a learning rate begins at 0, so a constant one is a high line."""
    axis.locator_params("x", integer=True)
    axis.yaxis.set_major_formatter("{x:.6g}")
    if not axis.dataLim.width:
        axis.set_xlim(axis.dataLim.x0 - 1, axis.dataLim.x0 + 1)
    if title == "Learning rate":
        axis.set_ylim(0, 1.05 * axis.dataLim.y1 or None)


def draw_training(path: Path, folder: Path) -> None:
    """Draw the plots of a training from a run's ``losses.csv`` and ``metrics.csv``.

    Nothing is drawn for a run without a step, of a checkpoint that was trained to the end.
    """
    import pandas as pd
    from matplotlib.figure import Figure

    if not (folder / "losses.csv").stat().st_size:
        return
    losses, evaluations = (pd.read_csv(folder / name, index_col="step") for name in ("losses.csv", "metrics.csv"))
    series = training_series(losses, evaluations)
    rows = -(-len(series) // 2)
    figure = Figure(figsize=(12, 3.8 * rows), layout="constrained")
    for place, (title, table, unit, marker) in enumerate(series, start=1):
        axis = figure.add_subplot(rows, 2, place)
        for name, values in table.items():
            axis.plot(table.index, values, marker=marker, ms=3, lw=1, label=name)
        axis.set(title=title, xlabel="step", ylabel=unit)
        fit_steps(axis, title)
        if len(table.columns) > 1:
            axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def save_figure(figure: "Figure", path: Path, dpi: int = 160) -> None:
    buffer = io.BytesIO()
    with drawing(figure):
        figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=dpi)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
