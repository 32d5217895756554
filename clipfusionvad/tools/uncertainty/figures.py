"""The whole analysis of a model's uncertainty: every table and every figure of how much it trusts its modalities."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from clipfusionvad.engine.evaluator import VideoDataset
from clipfusionvad.io.files import atomic_write, write_text
from clipfusionvad.models.base import Method
from clipfusionvad.report.formatting import Table, to_text
from clipfusionvad.report.plots import TRUTH_COLOUR, save_figure
from clipfusionvad.report.scores import abnormal_spans
from clipfusionvad.tools.uncertainty import UncertaintyOptions
from clipfusionvad.tools.uncertainty.measure import CURVES, MODALITIES, class_averages, observe_videos, sweep

# Frames along the time axis of one figure. Source: released code of IEF-VAD.
CHUNK = 3000
COLOURS = dict(zip(MODALITIES, ("#56b4e9", "#e69f00"), strict=True))
TABLE = {"brier": "Brier", "kl": "KL", "auc": "AUC", "ap": "AP", "image_weight": "w image", "event_weight": "w event"}
PARTS = ("anomalous", "normal")
CURVES_FILE = "curves.npz"


def write_analysis(
    folder: Path,
    model: Method,
    videos: VideoDataset,
    device: torch.device,
    precision: str,
    options: UncertaintyOptions,
) -> str:
    """Analyse a model on test videos, write every table and figure into a folder, and return the sweep as text.

    ``uncertainty.csv`` and ``weight_change_image.csv``, … have a row for each corrupted modality and level; a change of
    each dimension's weight concerns the modality in the file's name.
    """
    # A video of several classes counts for its first, as in the released code of IEF-VAD.
    classes = [videos.dataset.codes(entry.label)[0] for entry in videos.entries]
    table, _ = observe_videos(model, videos, device, precision)
    write_curves(folder / CURVES_FILE, videos, table)
    averages = class_averages(table, classes)
    for name, curves in (("weights_by_class", CURVES[:2]), ("distances", CURVES[2:])):
        _write_table(folder / f"{name}.csv", averages[["class", "part", "frames", *curves]])
    draw_class_bars(folder / "weights_by_class.png", averages, {"weight": "mean weight"})
    distances = {"cosine": "cosine similarity to fused", "euclidean": "distance to fused"}
    draw_class_bars(folder / "distances.png", averages, distances)
    for name in dict.fromkeys(classes):
        own = [index for index, other in enumerate(classes) if other == name]
        draw_curves(folder / "curves", name, videos, table[table.video.isin(own)], options.curve_pictures)

    levels = sorted(set(options.levels))
    points, changes = sweep(model, videos, device, precision, levels, options.sweep_seed)
    _write_table(folder / "uncertainty.csv", points)
    for modality, change in zip(MODALITIES, changes.swapaxes(0, 1), strict=True):
        dimensions = [points[["corrupted", "level"]], pd.DataFrame(change)]
        _write_table(folder / f"weight_change_{modality}.csv", pd.concat(dimensions, axis=1))
    draw_sweep(folder / "uncertainty.png", points)
    cells = [
        [row["corrupted"], f"{row['level']:.2f}", *(f"{row[key]:.4f}" for key in TABLE)] for _, row in points.iterrows()
    ]
    return to_text(Table(["corrupted", "level", *TABLE.values()], cells))


def _write_table(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, na_rep="nan"))


def write_curves(path: Path, videos: VideoDataset, table: pd.DataFrame) -> None:
    """Write all curves by snippet, the videos joined, as one .npz.

    ``videos``, ``labels`` and ``snippets`` hold each video's name, label and length; split a curve by ``snippets``.
    """
    arrays = {
        "videos": np.array([entry.video for entry in videos.entries]),
        "labels": np.array([entry.label for entry in videos.entries]),
        "snippets": np.bincount(table.video, minlength=len(videos.entries)),
    }
    arrays |= {name: table[name].to_numpy() for name in ("anomaly", *CURVES)}
    with atomic_write(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def draw_curves(folder: Path, name: str, videos: VideoDataset, table: pd.DataFrame, limit: int) -> None:
    """Draw ``NAME_0.png`` …: the videos of a table joined, 3000 frames per figure, at most ``limit`` (0: all)."""
    parts = [videos.known_truth.frames[index] for index in table.video.unique()]
    truth, borders = np.concatenate(parts), np.cumsum([len(part) for part in parts])
    edges = np.concatenate([[0], np.cumsum(table.frames)])
    rows = {"anomaly": "anomaly probability", "weight": "mean weight", "cosine": "cosine to fused"}
    rows |= {"euclidean": "distance to fused"}
    starts = range(0, len(truth), CHUNK)
    for number, start in enumerate(starts[:limit] if limit else starts):
        figure, end = Figure(figsize=(12, 8), layout="constrained"), min(start + CHUNK, len(truth))
        figure.suptitle(f"{name}, frames from {start} of the videos joined")
        shown = slice(np.searchsorted(edges, start, "right") - 1, np.searchsorted(edges, end))
        axes = figure.subplots(len(rows), 1, sharex=True)
        for axis, (curve, title) in zip(axes, rows.items(), strict=True):
            lines = {curve: "#1f4e79"} if curve in table else {f"{kind}_{curve}": COLOURS[kind] for kind in MODALITIES}
            for column, colour in lines.items():
                values, label = table[column].to_numpy()[shown], column.partition("_")[0]
                axis.stairs(values, edges[shown.start : shown.stop + 1], color=colour, baseline=None, label=label)
            for low, high in abnormal_spans(truth[start:end]):
                axis.axvspan(start + low, start + high, color=TRUTH_COLOUR, lw=0, zorder=0)
            for border in borders[(borders > start) & (borders < end)]:
                axis.axvline(border, color="#999999", lw=0.6, ls=":")
            axis.set_ylabel(title, fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set(xlim=(start, end), ylim=(0, 1))
        axes[1].legend(loc="upper right", frameon=False, fontsize=8, ncols=2)
        axes[-1].set_xlabel("frames; shaded: annotated anomaly, dotted: the next video")
        save_figure(figure, folder / f"{name}_{number}.png")


def draw_class_bars(path: Path, averages: pd.DataFrame, curves: Mapping[str, str]) -> None:
    """Draw bars of both modalities per class, over its anomalous and its normal frames.

    ``averages`` come from ``class_averages``; ``curves`` (weight, cosine, euclidean) have a row and a title each.
    """
    figure = Figure(figsize=(15, 3.2 * len(curves) + 1), layout="constrained")
    axes = figure.subplots(len(curves), len(PARTS), sharey="row", squeeze=False)
    for row, (curve, title) in zip(axes, curves.items(), strict=True):
        for axis, part in zip(row, PARTS, strict=True):
            bars = averages[averages.part == part]
            places = np.arange(len(bars))
            for shift, kind in zip((-0.2, 0.2), MODALITIES, strict=True):
                axis.bar(places + shift, bars[f"{kind}_{curve}"], 0.4, color=COLOURS[kind], label=kind)
            axis.set_xticks(places, bars["class"], rotation=35, ha="right", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{title}, {part} frames", fontsize=9, loc="left")
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=2)
    save_figure(figure, path)


def draw_sweep(path: Path, points: pd.DataFrame) -> None:
    """Draw the columns of ``uncertainty.csv`` over the level, a line for each corrupted modality."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(2, 3).flat, TABLE.items(), strict=True):
        # Weights also over anomalous frames only and over normal frames only.
        styles = {key: "-", f"{key}_{PARTS[0]}": "--", f"{key}_{PARTS[1]}": ":"}
        for modality, own in points.groupby("corrupted", sort=False):
            for name in points.columns.intersection([*styles]):
                label = f"{modality} corrupted{name.removeprefix(key).replace('_', ', ')}"
                axis.plot(own["level"], own[name], styles[name], color=COLOURS[modality], label=label)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("share of attenuated positions", fontsize=9)
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    save_figure(figure, path)
