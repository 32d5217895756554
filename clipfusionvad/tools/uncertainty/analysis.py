"""The whole analysis of a model's uncertainty: every table and every figure."""

from __future__ import annotations

from pathlib import Path

import torch

from clipfusionvad.engine.evaluator import VideoDataset
from clipfusionvad.models.base import Method
from clipfusionvad.tools.uncertainty import UncertaintyOptions
from clipfusionvad.tools.uncertainty.figures import (
    draw_class_bars,
    draw_class_curves,
    draw_sweep,
    sweep_table,
    write_averages,
    write_curves,
    write_sweep,
)
from clipfusionvad.tools.uncertainty.measure import (
    SweepPoint,
    class_averages,
    count_video_frames,
    observe_videos,
    sweep,
)

__all__ = ["CURVES", "sweep_table", "write_analysis"]
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
