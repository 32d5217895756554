"""A model with its test set, and one video as the model sees it: inputs, scores and truth.

n snippets of the video, N inputs of T snippets, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipfusionvad.engine.evaluator import VideoDataset, score_videos
from clipfusionvad.io.errors import UserError, nearest
from clipfusionvad.io.option import Option
from clipfusionvad.metrics import count_frames
from clipfusionvad.models import Method
from clipfusionvad.tools.analysis.result import DataFrame, make_table

VideoName = Annotated[str | None, Option("name of the test video (default: the first anomalous one)")]
WindowIndex = Annotated[int | None, Option("which input of that video (default: the most abnormal one)", minimum=0)]


class LoadedModel(NamedTuple):
    """A model in evaluation mode with its class prompts; ``read_test_set`` reads the test list, features and truth."""

    model: Method
    prompts: list[str]
    read_test_set: Callable[[], VideoDataset]

    def view(self, video: str | None) -> VideoView:
        return view(self.model, self.read_test_set(), video)


@dataclass(frozen=True)
class VideoView:
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

    def truth_at(self, rows: np.ndarray) -> np.ndarray:
        """Return the truth at places of inputs, 0 at padding."""
        return np.where(rows >= 0, self.truth[rows], 0)

    def check_window(self, index: int | None) -> int:
        """Return the index of an input, by default of the most abnormal one; ``UserError`` if it does not exist."""
        if index is None:
            return int(np.argmax(self.truth_at(self.rows).sum(axis=1)))
        if index >= len(self.rows):
            raise UserError(f"--window {index}, but {self.name} has {len(self.rows)} inputs, counted from 0")
        return index

    def table(self, rows: np.ndarray, columns: Mapping[str, Any]) -> DataFrame:
        """Return index, truth, score and further columns of snippets, given by their indices."""
        score = self.anomaly[rows].astype(np.float64)
        return make_table({"snippet": rows, "truth": self.truth[rows], "score": score, **columns})


def view(model: Method, videos: VideoDataset, name: str | None) -> VideoView:
    """Return the test video of that name, or the first anomalous one. The model is left in evaluation mode."""
    names = [entry.video for entry in videos.entries]
    if name is not None and name not in names:
        raise UserError(f"no test video is called {name!r}{nearest(name, names)}")
    index = int(np.argmax(videos.anomalous)) if name is None else names.index(name)
    entry, features = videos.entries[index], videos.load([index])[0]
    device = next(model.parameters()).device
    scores = score_videos(model, [features], device)[0]
    windows, lengths = model.sampling.windows(features)
    count = len(features)
    # Numbers from 1 on in place of features, so that padding is 0.
    rows = model.sampling.windows(np.arange(1, count + 1, dtype=np.int64)[:, None])[0][..., 0] - 1
    truth = np.zeros(count)
    if videos.truth is not None:
        positives, frames = count_frames(videos.truth.frames[index], count, videos.frames_per_snippet)
        truth = positives / np.maximum(frames, 1)
    inputs = torch.from_numpy(windows.astype(np.float32)).to(device), torch.from_numpy(lengths).to(device)
    step = videos.mean_frames(index, count) / videos.dataset.fps
    return VideoView(entry.video, entry.label, *inputs, rows, scores.anomaly[0], truth, step)


def mean_by_truth(values: Any, truth: np.ndarray) -> list[float]:
    """Return the mean of values (n, …) over abnormal and over normal snippets (n,); NaN if there is none."""
    parts = [values[part] for part in (truth > 0.5, truth <= 0.5)]
    return [float(part.mean()) if part.size else float("nan") for part in parts]
