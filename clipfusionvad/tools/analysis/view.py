"""One video as a model sees it: its inputs, scores and truth, for insights into what happens inside.

n snippets of the video, N inputs of T snippets, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from torch import Tensor

from clipfusionvad.engine.evaluator import VideoSet, score_videos
from clipfusionvad.io.errors import UserError, nearest
from clipfusionvad.metrics import count_frames
from clipfusionvad.models import Method
from clipfusionvad.report.plots import COARSE_COLOUR, TRUTH_COLOUR


@dataclass(frozen=True)
class View:
    """A video's ``windows`` (N, T, D) with their valid ``lengths`` (N,), and ``rows`` (N, T), the snippet at each place
    or -1 for padding; its anomaly score and share of abnormal frames by snippet, (n,) each."""

    name: str
    label: str
    windows: Tensor
    lengths: Tensor
    rows: np.ndarray
    anomaly: np.ndarray
    truth: np.ndarray
    seconds_per_snippet: float

    @property
    def title(self) -> str:
        name = self.name if len(self.name) <= 60 else f"{self.name[:59]}…"
        return f"{name} ({self.label})"

    def busiest(self) -> int:
        """The input that holds most abnormal snippets, the first of equals."""
        return int(np.argmax(self.truth_at(self.rows).sum(axis=1)))

    def truth_at(self, rows: np.ndarray) -> np.ndarray:
        """The truth at places of inputs, 0 at padding."""
        return np.where(rows >= 0, self.truth[rows], 0)


def view(model: Method, videos: VideoSet, name: str | None, device: torch.device) -> View:
    """The test video of that name, else the first anomalous one. The model is left in eval mode."""
    index = _find(videos, name)
    entry, features = videos.entries[index], videos.load([index])[0]
    scores = score_videos(model, [features], device)[0]
    windows, lengths = model.sampling.windows(features)
    count = len(features)
    # Numbers from 1 on in place of features, so that what padding makes of them is told apart.
    rows = model.sampling.windows(np.arange(1, count + 1, dtype=np.int64)[:, None])[0][..., 0] - 1
    truth = np.zeros(count)
    if videos.truth is not None:
        positives, frames = count_frames(videos.truth.frames[index], count, videos.frames_per_snippet)
        truth = positives / np.maximum(frames, 1)
    return View(
        entry.video,
        entry.label,
        torch.from_numpy(windows.astype(np.float32)).to(device),
        torch.from_numpy(lengths).to(device),
        rows,
        scores.anomaly[0],
        truth,
        videos.frames_per_snippet / videos.dataset.fps,
    )


def _find(videos: VideoSet, name: str | None) -> int:
    names = [entry.video for entry in videos.entries]
    if name is None:
        return int(np.argmax(videos.anomalous))
    if name not in names:
        raise UserError(f"no test video is called {name!r}{nearest(name, names)}")
    return names.index(name)


def shade(axis: matplotlib.axes.Axes, truth: np.ndarray, step: float = 1.0, along: str = "x") -> None:
    """Shade the abnormal stretches of snippets (n,) of ``step`` units each."""
    edges = np.flatnonzero(np.diff((truth > 0).astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    for start, end in edges * step:
        span = axis.axvspan if along == "x" else axis.axhspan
        span(start, end, color=TRUTH_COLOUR, lw=0, zorder=0)


def draw_score(axis: matplotlib.axes.Axes, seen: View) -> None:
    """The anomaly score over the truth, in seconds."""
    step = seen.seconds_per_snippet
    shade(axis, seen.truth, step)
    axis.stairs(seen.anomaly, np.arange(len(seen.anomaly) + 1) * step, color=COARSE_COLOUR, lw=1.4, baseline=None)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("anomaly score")
    axis.set_xlim(0, len(seen.anomaly) * step)


def mark_truth(axis: matplotlib.axes.Axes, truth: np.ndarray) -> None:
    """Bars beside both axes of a matrix of snippets, (n,) along each, where they are abnormal."""
    for along in ("x", "y"):
        strip = axis.inset_axes((0, 1.005, 1, 0.025) if along == "x" else (-0.03, 0, 0.025, 1))
        strip.set(xlim=axis.get_xlim(), ylim=(0, 1)) if along == "x" else strip.set(ylim=axis.get_ylim(), xlim=(0, 1))
        edges = np.flatnonzero(np.diff((truth > 0).astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        for start, end in edges - 0.5:
            (strip.axvspan if along == "x" else strip.axhspan)(start, end, color="#c4452d", lw=0)
        strip.axis("off")
    if len(truth):
        axis.tick_params(axis="y", pad=8)
