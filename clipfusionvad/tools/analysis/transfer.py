"""Models on the test data of other datasets: sources × targets.

The anomaly score needs no class names. If a method learned nothing for single classes, its prompts take the names of
the target's classes, so it also tells those apart. Otherwise it keeps its own classes, and only its score is tested.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from clipfusionvad.engine.checkpoint import ModelFile
from clipfusionvad.engine.config import Settings
from clipfusionvad.engine.device import pick_device
from clipfusionvad.engine.evaluator import evaluate, score_videos, smooth_videos
from clipfusionvad.engine.setup import class_weights, read_test_set, restore_model
from clipfusionvad.tools.analysis import figures
from clipfusionvad.tools.analysis.result import UNKNOWN, AnalysisResult, DataFrame, make_table, table_text
from clipfusionvad.tools.demo import make_demo

#: Titles of the metrics of ``evaluate`` that are shown, and their factor to percent.
METRICS = {
    "auc1": ("AUC", 100),
    "ap1": ("AP", 100),
    "auc2": ("AUC, fine branch", 100),
    "ap2": ("AP, fine branch", 100),
    "map_average": ("detection mAP", 1),
}
TRAINED, TESTED = "trained on", "tested on"


class TrainedRun(NamedTuple):
    """A run, with its settings and its checkpoint."""

    folder: Path
    settings: Settings
    file: ModelFile


def transfer(runs: Sequence[TrainedRun]) -> AnalysisResult:
    """Models on the test data of each other's datasets."""
    # Runs with the same test data make one target.
    unique: dict[tuple[str | int | None, ...], TrainedRun] = {}
    for run in runs:
        data = run.settings.data
        truth = data.gt_path, data.gt_segment_path, data.gt_label_path
        test = run.settings.dataset.name, data.test_list, *truth, data.feature_root, data.stride
        unique.setdefault(test, run)
    targets = list(unique.values())
    names = _unique([f"{run.settings.model.method} on {run.settings.dataset.title}" for run in runs], runs)
    titles = _unique([run.settings.dataset.title for run in targets], targets)
    weights = [min(class_weights(run.settings, run.file), default=None) for run in runs]
    rows, home = [], []
    for row, column in tqdm([*np.ndindex(len(runs), len(targets))], "transfer", unit="test", disable=None, leave=False):
        run, target = runs[row], targets[column].settings
        home.append(run.settings.dataset.labels == target.dataset.labels)
        metrics = _test(run, target, keeps_classes=weights[row] is not None and not home[-1])
        found = {name: np.nan if metrics.get(name) is None else float(metrics[name]) for name in METRICS}
        percent = {title: factor * found[name] for name, (title, factor) in METRICS.items()}
        rows.append({TRAINED: names[row], TESTED: titles[column], **percent})
    remarks = [
        f"{name} has learned weights for each of its classes ({weight}): on other classes it keeps its own, and only "
        f"its anomaly score is tested"
        for name, weight in zip(names, weights, strict=True)
        if weight
    ]
    table = make_table(rows).dropna(axis=1, how="all")
    figure = draw_transfer(table, np.reshape(home, (len(runs), len(targets))))
    return AnalysisResult(table, figure, [table_text(table), *remarks])


def _unique(names: Sequence[str], runs: Sequence[TrainedRun]) -> list[str]:
    """Return the names of runs, with the folder where two are the same."""
    return [f"{name} ({run.folder})" if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]


def _test(run: TrainedRun, target: Settings, keeps_classes: bool) -> dict[str, Any]:
    """Return the metrics of a model on a target; it may keep the classes that it was trained on."""
    settings, dataset = run.settings, target.dataset
    if target.run.demo:
        make_demo(dataset)
    data = replace(target.data, stream_folders=settings.data.stream_folders or target.data.stream_folders)
    model, _ = restore_model(replace(settings, dataset=settings.dataset if keeps_classes else dataset), run.file)
    device = pick_device(settings.device.device)
    videos = read_test_set(dataset, settings.model, data)
    scored = score_videos(model.to(device), videos.features, device, settings.device.precision)
    scores = smooth_videos(scored, float(settings.training.smooth))
    if keeps_classes:
        scores = [replace(video, classes=None) for video in scores]
    return evaluate(scores, videos, settings.training.protocol)


def draw_transfer(table: DataFrame, home: np.ndarray) -> figures.Figure:
    """Draw a heat map for each metric; ``home`` (sources, targets): model and data are of the same dataset."""
    from matplotlib.patches import Rectangle

    sources, targets = list(table[TRAINED].unique()), list(table[TESTED].unique())
    metrics = [column for column in table if column not in (TRAINED, TESTED)]
    width = 0.09 * max(map(len, sources)) + (1.5 + 0.85 * len(targets)) * len(metrics)
    figure = figures.new_figure(max(width, 6), 1.9 + 0.55 * len(sources))
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        values = table[metric].to_numpy().reshape(home.shape)
        figures.draw_matrix(axis, values, sources, targets, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        axis.tick_params(axis="x", rotation=20)
        axis.set_title(metric, fontsize=10)
        for (row, column), value in np.ndenumerate(values):
            text, colour = (UNKNOWN, figures.GREY) if np.isnan(value) else (f"{value:.1f}", "black")
            axis.text(column, row, text, ha="center", va="center", color="white" if value > 55 else colour)
            if home[row, column]:
                axis.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, ec="#d98200", lw=2))
    axes[0].set_ylabel(TRAINED)
    figure.supxlabel("tested on (percent; framed: the dataset that the model was trained on)", fontsize=9)
    return figure
