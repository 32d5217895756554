"""The whole analysis of a model's uncertainty: every table and every figure of how much it trusts its modalities."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from clipfusionvad.tools.uncertainty.measure import (
    MODALITIES,
    FrameCounts,
    Observation,
    SweepPoint,
    class_averages,
    count_video_frames,
    observe_videos,
    sweep,
)

# Frames along the time axis of one figure. Source: released code of IEF-VAD.
CHUNK = 3000
COLOURS = dict(zip(MODALITIES, ("#56b4e9", "#e69f00"), strict=True))
SCORE_COLOUR, BORDER_COLOUR = "#1f4e79", "#999999"
TABLE = {"brier": "Brier", "kl": "KL", "auc": "AUC", "ap": "AP", "image_weight": "w image", "event_weight": "w event"}
PARTS = ("anomalous", "normal")
CURVES = "curves.npz"


def write_analysis(
    folder: Path,
    model: Method,
    videos: VideoDataset,
    device: torch.device,
    precision: str,
    options: UncertaintyOptions,
) -> list[SweepPoint]:
    """Analyse a model on test videos, write every table and figure into a folder, and return the sweep."""
    counts = count_video_frames(videos)
    # A video of several classes counts for its first, as in the released code of IEF-VAD.
    classes = [videos.dataset.codes(entry.label)[0] for entry in videos.entries]
    observations = observe_videos(model, videos.features, counts, device, precision)
    averages = class_averages(observations, counts, classes)
    write_curves(folder / CURVES, videos, observations)
    write_averages(folder, averages)
    draw_class_bars(folder / "weights_by_class.png", averages, {"weight": "mean weight"})
    distances = {"cosine": "cosine similarity to fused", "euclidean": "distance to fused"}
    draw_class_bars(folder / "distances.png", averages, distances)
    draw_class_curves(folder / "curves", videos, observations, counts, classes, options.curve_pictures)
    levels = sorted(set(options.levels))
    points = sweep(model, videos.features, counts, device, precision, levels, options.sweep_seed)
    write_sweep(folder, points)
    draw_sweep(folder / "uncertainty.png", points)
    return points


def sweep_table(points: Sequence[SweepPoint]) -> str:
    """Render the sweep as text, a row per corruption."""
    rows = [[point.modality, f"{point.level:.2f}", *(f"{point.metrics[key]:.4f}" for key in TABLE)] for point in points]
    return to_text(Table(["corrupted", "level", *TABLE.values()], rows))


def write_sweep(folder: Path, points: Sequence[SweepPoint]) -> None:
    """Write ``uncertainty.csv``, and the change of each dimension's weight to ``weight_change_image.csv``, …

    All have a row for each corrupted modality and level; a change concerns the modality in the file's name.
    """
    tables: dict[str, list[dict[Any, Any]]] = {"uncertainty": [point.metrics for point in points]}
    for index, modality in enumerate(MODALITIES):
        tables[f"weight_change_{modality}"] = [dict(enumerate(point.change[index].tolist())) for point in points]
    for name, rows in tables.items():
        corrupted = [{"corrupted": point.modality, "level": point.level} for point in points]
        _write_table(folder / f"{name}.csv", [a | b for a, b in zip(corrupted, rows, strict=True)])


def write_averages(folder: Path, averages: Sequence[Mapping[str, Any]]) -> None:
    """Write the result of ``class_averages`` to ``weights_by_class.csv`` and ``distances.csv``."""
    for name, curves in (("weights_by_class", ("weight",)), ("distances", ("cosine", "euclidean"))):
        columns = ["class", "part", "frames", *(f"{kind}_{curve}" for curve in curves for kind in MODALITIES)]
        _write_table(folder / f"{name}.csv", averages, columns)


def _write_table(path: Path, rows: Sequence[Mapping[Any, Any]], columns: list[str] | None = None) -> None:
    write_text(path, pd.DataFrame(rows, columns=columns).to_csv(index=False, na_rep="nan"))


def write_curves(path: Path, videos: VideoDataset, observations: Sequence[Observation]) -> None:
    """Write all curves by snippet, the videos joined, as one .npz.

    ``videos``, ``labels`` and ``snippets`` hold each video's name, label and length; split a curve by ``snippets``.
    """
    arrays = {
        "videos": np.array([entry.video for entry in videos.entries]),
        "labels": np.array([entry.label for entry in videos.entries]),
        "snippets": np.array([len(video.anomaly) for video in observations]),
        "anomaly": np.concatenate([video.anomaly for video in observations]),
    }
    for name in observations[0].by_modality:
        arrays[name] = np.concatenate([video.by_modality[name] for video in observations])
    with atomic_write(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def draw_class_curves(
    folder: Path,
    videos: VideoDataset,
    observations: Sequence[Observation],
    counts: Sequence[FrameCounts],
    classes: Sequence[str],
    limit: int,
) -> None:
    """Draw ``CLASS_0.png`` …: a class's videos joined, 3000 frames per figure, at most ``limit`` figures (0: all)."""
    for name in dict.fromkeys(classes):
        members = [index for index, own in enumerate(classes) if own == name]
        curves = {"anomaly": np.concatenate([observations[index].anomaly for index in members])}
        for curve in observations[0].by_modality:
            curves[curve] = np.concatenate([observations[index].by_modality[curve] for index in members])
        frames = np.concatenate([counts[index].frames for index in members])
        truth = np.concatenate([videos.known_truth.frames[index] for index in members])
        borders = np.cumsum([len(videos.known_truth.frames[index]) for index in members])
        starts = range(0, len(truth), CHUNK)
        for number, start in enumerate(starts[:limit] if limit else starts):
            figure = Figure(figsize=(12, 8), layout="constrained")
            figure.suptitle(f"{name}, frames from {start} of the videos joined")
            _draw_chunk(figure, start, curves, frames, truth, borders)
            save_figure(figure, folder / f"{name}_{number}.png")


def _draw_chunk(
    figure: Figure,
    start: int,
    curves: Mapping[str, np.ndarray],
    frames: np.ndarray,
    truth: np.ndarray,
    borders: np.ndarray,
) -> None:
    end = min(start + CHUNK, len(truth))
    edges = np.concatenate([[0], np.cumsum(frames)])
    shown = slice(np.searchsorted(edges, start, "right") - 1, np.searchsorted(edges, end))
    axes = figure.subplots(4, 1, sharex=True)
    axes[0].stairs(curves["anomaly"][shown], edges[shown.start : shown.stop + 1], color=SCORE_COLOUR, baseline=None)
    axes[0].set_ylim(0, 1)
    for axis, curve in zip(axes[1:], ("weight", "cosine", "euclidean"), strict=True):
        for kind in MODALITIES:
            values = curves[f"{kind}_{curve}"][shown]
            axis.stairs(values, edges[shown.start : shown.stop + 1], color=COLOURS[kind], baseline=None, label=kind)
    titles = ("anomaly probability", "mean weight", "cosine to fused", "distance to fused")
    for axis, title in zip(axes, titles, strict=True):
        for low, high in abnormal_spans(truth[start:end]):
            axis.axvspan(start + low, start + high, color=TRUTH_COLOUR, lw=0, zorder=0)
        for border in borders[(borders > start) & (borders < end)]:
            axis.axvline(border, color=BORDER_COLOUR, lw=0.6, ls=":")
        axis.set_ylabel(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xlim(start, end)
    axes[1].legend(loc="upper right", frameon=False, fontsize=8, ncols=2)
    axes[-1].set_xlabel("frames; shaded: annotated anomaly, dotted: the next video")


def draw_class_bars(path: Path, averages: Sequence[Mapping[str, Any]], curves: Mapping[str, str]) -> None:
    """Draw bars of both modalities per class, over its anomalous and its normal frames.

    ``averages`` come from ``class_averages``; ``curves`` (weight, cosine, euclidean) have a row and a title each.
    """
    figure = Figure(figsize=(15, 3.2 * len(curves) + 1), layout="constrained")
    axes = figure.subplots(len(curves), len(PARTS), sharey="row", squeeze=False)
    for row, (curve, title) in zip(axes, curves.items(), strict=True):
        for axis, part in zip(row, PARTS, strict=True):
            bars = [average for average in averages if average["part"] == part]
            places = np.arange(len(bars))
            for shift, kind in zip((-0.2, 0.2), MODALITIES, strict=True):
                heights = [bar[f"{kind}_{curve}"] for bar in bars]
                axis.bar(places + shift, heights, 0.4, color=COLOURS[kind], label=kind)
            axis.set_xticks(places, [bar["class"] for bar in bars], rotation=35, ha="right", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{title}, {part} frames", fontsize=9, loc="left")
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=2)
    save_figure(figure, path)


def draw_sweep(path: Path, points: Sequence[SweepPoint]) -> None:
    """Draw the columns of ``uncertainty.csv`` over the level, a line for each corrupted modality."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(2, 3).flat, TABLE.items(), strict=True):
        # Weights also over anomalous frames only and over normal frames only.
        styles = {key: "-", f"{key}_{PARTS[0]}": "--", f"{key}_{PARTS[1]}": ":"}
        for modality in MODALITIES:
            own = [point for point in points if point.modality == modality]
            for name, style in styles.items():
                if name in points[0].metrics:
                    values = [point.metrics[name] for point in own]
                    label = f"{modality} corrupted{name.removeprefix(key).replace('_', ', ')}"
                    axis.plot([point.level for point in own], values, style, color=COLOURS[modality], label=label)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("share of attenuated positions", fontsize=9)
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    save_figure(figure, path)
