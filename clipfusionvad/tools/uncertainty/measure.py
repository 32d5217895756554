"""Measure how a model that fuses two modalities by uncertainty weighs each of them, also when one is damaged.

For any method whose output has the fields of ``NEEDED``. n snippets of all videos, D dimensions of the fused state,
T snippets of a model input; the two modalities, image and event, are the method's streams in their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from clipfusionvad.engine.device import autocast
from clipfusionvad.engine.evaluator import VideoDataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.metrics import count_frames, snippet_metrics
from clipfusionvad.models.base import Method
from clipfusionvad.tools.uncertainty import LEVELS

MODALITIES = ("image", "event")
NEEDED = ("fused", *(f"{kind}_{what}" for what in ("mu", "weight") for kind in MODALITIES))
CURVES = [f"{kind}_{what}" for what in ("weight", "cosine", "euclidean") for kind in MODALITIES]
# The factor of a corrupted feature. Source: released code of IEF-VAD.
ATTENUATION = 0.01
PROBABILITY_FLOOR = 1e-8


@dataclass(frozen=True)
class Corruption:
    """Attenuation of one modality at a random share ``level`` of the T positions of a model input.

    The positions are the same in all inputs of a video, and differ between videos. With one seed the positions of a
    level contain those of each lower level, for either modality, so that only the level differs between results.
    """

    modality: int
    level: float
    seed: int

    def positions(self, video: int, length: int) -> np.ndarray:
        """Return the corrupted positions of a video by its number in the list, floor(T · level) of 0..T-1."""
        return np.random.default_rng([self.seed, video]).permutation(length)[: int(length * self.level)]

    def apply(self, windows: np.ndarray, video: int) -> np.ndarray:
        """Return a corrupted copy of a video's inputs (N, T, 2 · D)."""
        width = windows.shape[2] // len(MODALITIES)
        corrupted = windows.astype(np.float32)
        stream = corrupted[:, :, self.modality * width : (self.modality + 1) * width]
        stream[:, self.positions(video, windows.shape[1])] *= ATTENUATION
        return corrupted


def observe_videos(
    model: Method,
    videos: VideoDataset,
    device: torch.device,
    precision: str = "fp32",
    corruption: Corruption | None = None,
) -> tuple[pd.DataFrame, np.ndarray]:
    """Run a model on videos whose truth is known, and leave it in eval mode.

    Returns a row for each snippet: the number of its ``video``, the ``frames`` behind it and how many are abnormal
    (``positives``), the ``anomaly`` probability, and ``CURVES``: the mean over D of a modality's weights, and cosine
    similarity and Euclidean distance of the fused state and the modality's mean. The second result is the weights
    (2, D), averaged over frames. ``UserError`` for a model that does not weigh two modalities.
    """
    if len(model.streams) != len(MODALITIES):
        raise _unsuitable(model)
    model.eval()
    tables, dimensions = [], np.zeros(1)
    with torch.inference_mode(), autocast(device, precision):
        fixed = model.fixed_inputs()
        for video, (rows, truth) in enumerate(zip(videos.features, videos.known_truth.frames, strict=True)):
            positives, frames = count_frames(truth, len(rows), videos.frames_per_snippet)
            windows, lengths = model.sampling.windows(rows)
            if corruption:
                windows = corruption.apply(windows, video)
            curves, weights = (
                model.sampling.restore(values, len(rows)) for values in _observe_windows(model, windows, lengths, fixed)
            )
            counted = {"video": video, "frames": frames, "positives": positives}
            tables.append(pd.DataFrame(curves, columns=["anomaly", *CURVES]).assign(**counted))
            dimensions = dimensions + np.einsum("n,nmd->md", frames.astype(np.float64), weights)
    table = pd.concat(tables, ignore_index=True)
    return table, dimensions / table.frames.sum()


def _observe_windows(
    model: Method, windows: np.ndarray, lengths: np.ndarray, fixed: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the anomaly and ``CURVES`` (N·T, 7), and weights (N·T, 2, D) of model inputs (N, T, 2 · D)."""
    device, at_once = next(model.parameters()).device, model.windows_at_once
    curves, weights = [], []
    for start in range(0, len(windows), at_once):
        chosen = slice(start, start + at_once)
        visual = torch.from_numpy(windows[chosen]).to(device, torch.float32)
        output: Any = model(visual, torch.from_numpy(lengths[chosen]).to(device), *fixed)
        if any(getattr(output, name, None) is None for name in NEEDED):
            raise _unsuitable(model)
        weight, mu = (_stack(output, what) for what in ("weight", "mu"))
        fused, anomaly = output.fused.float().unsqueeze(-2), model.scores(output).anomaly[0]
        compared = weight.mean(-1), F.cosine_similarity(fused, mu, dim=-1), (fused - mu).norm(dim=-1)
        curves.append(torch.cat([anomaly[..., None], *compared], dim=-1).flatten(0, 1).cpu().numpy())
        weights.append(weight.flatten(0, 1).cpu().numpy())
    return np.concatenate(curves), np.concatenate(weights)


def _stack(output: Any, what: str) -> Tensor:
    return torch.stack([getattr(output, f"{kind}_{what}").float() for kind in MODALITIES], dim=-2)


def _unsuitable(model: Method) -> UserError:
    return UserError(f"{model.name} does not weigh two modalities by their uncertainty, so there is nothing to analyse")


def sweep(
    model: Method,
    videos: VideoDataset,
    device: torch.device,
    precision: str = "fp32",
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
) -> tuple[pd.DataFrame, np.ndarray]:
    """Corrupt the image at each level with clean events, then the reverse. Source: released code of IEF-VAD.

    Returns a row for each of P corruptions: ``corrupted``, ``level`` and ``sweep_metrics``; and the change of the mean
    weights, clean - corrupt, (P, 2, D).
    """
    clean, before = observe_videos(model, videos, device, precision)
    rows, changes = [], []
    for index, modality in enumerate(MODALITIES):
        for level in levels:
            corrupt, after = observe_videos(model, videos, device, precision, Corruption(index, level, seed))
            rows.append({"corrupted": modality, "level": level} | sweep_metrics(clean, corrupt))
            changes.append(before - after)
    return pd.DataFrame(rows), np.stack(changes)


def sweep_metrics(clean: pd.DataFrame, corrupt: pd.DataFrame) -> dict[str, float]:
    """Average the effect of a corruption over frames.

    ``brier``: (p_corrupt - truth)²; ``kl``: Bernoulli KL(p_clean ‖ p_corrupt) in nats; ``auc``, ``ap`` and the mean
    weights (``image_weight``, ``image_weight_anomalous``, …) of the corrupted. NaN where there are no such frames.
    """
    before, after = (table["anomaly"].to_numpy(np.float64) for table in (clean, corrupt))
    parts = _parts(corrupt)
    brier = (parts["anomalous"] * (after - 1) ** 2 + parts["normal"] * after**2).sum() / parts["all"].sum()
    metrics = {"brier": float(brier), "kl": _mean(bernoulli_kl(before, after), parts["all"])}
    metrics |= snippet_metrics(after, parts["anomalous"], parts["all"])
    for part, frames in parts.items():
        suffix = "" if part == "all" else f"_{part}"
        metrics |= {f"{name}{suffix}": _mean(corrupt[name], frames) for name in CURVES[:2]}
    return metrics


def bernoulli_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return KL(Bernoulli(p) ‖ Bernoulli(q)) in nats, elementwise, both clipped to [1e-8, 1 - 1e-8]."""
    p, q = (np.clip(values, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR) for values in (p, q))
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def class_averages(table: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Return the mean of every curve of ``observe_videos`` over the frames of each class's videos: all, the anomalous
    and the normal ones by truth. ``classes`` names the class of each video; parts without frames are left out."""
    rows = []
    for name, videos in table.groupby(table["video"].map(dict(enumerate(classes))), sort=False):
        for part, frames in _parts(videos).items():
            if frames.any():
                means = {curve: _mean(videos[curve], frames) for curve in CURVES}
                rows.append({"class": name, "part": part, "frames": int(frames.sum())} | means)
    return pd.DataFrame(rows)


def _parts(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return the frames that averages are taken over."""
    frames, positives = table["frames"].to_numpy(), table["positives"].to_numpy()
    return {"all": frames, "anomalous": positives, "normal": frames - positives}


def _mean(values: Any, frames: np.ndarray) -> float:
    """Average one value per snippet over the frames behind the snippets; NaN without frames."""
    return float(np.asarray(values, dtype=np.float64) @ frames / frames.sum()) if frames.any() else float("nan")
