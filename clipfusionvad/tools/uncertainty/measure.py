"""Measure how a model that fuses two modalities by uncertainty weighs each of them, also when one is damaged.

For any method whose output has the fields of ``NEEDED``. n snippets of a video, D dimensions of the fused state,
T snippets of a model input; the two modalities, image and event, are the method's streams in their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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
CURVE_NAMES = [f"{kind}_{what}" for what in ("weight", "cosine", "euclidean") for kind in MODALITIES]
# The factor of a corrupted feature. Source: released code of IEF-VAD.
ATTENUATION = 0.01
PROBABILITY_FLOOR = 1e-8


@dataclass(frozen=True)
class FrameCounts:
    """Frames behind each snippet of a video, (n,) each: the abnormal ones, and all (``count_frames``)."""

    positives: np.ndarray
    frames: np.ndarray

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """The frames that averages are taken over."""
        return {"all": self.frames, "anomalous": self.positives, "normal": self.frames - self.positives}


def count_video_frames(videos: VideoDataset) -> list[FrameCounts]:
    """Count the frames behind the snippets of videos whose truth is known."""
    return [
        FrameCounts(*count_frames(frames, len(rows), videos.frames_per_snippet))
        for frames, rows in zip(videos.known_truth.frames, videos.features, strict=True)
    ]


@dataclass(frozen=True)
class Observation:
    """A model's outputs for one video: a probability per snippet (n,), and curves (n,) by ``CURVE_NAMES``.

    ``weight`` is the mean over D of the modality's weights; ``cosine`` (similarity) and ``euclidean`` (distance)
    compare the fused state with the modality's mean. ``dimensions`` (2, D) sums the weights over all frames.
    """

    anomaly: np.ndarray
    by_modality: dict[str, np.ndarray]
    dimensions: np.ndarray


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


@dataclass(frozen=True)
class SweepPoint:
    """The effect of a corruption: ``metrics`` over all frames, ``change`` (2, D) of mean weights, clean - corrupt."""

    modality: str
    level: float
    metrics: dict[str, float]
    change: np.ndarray


def observe_videos(
    model: Method,
    features: Sequence[np.ndarray],
    counts: Sequence[FrameCounts],
    device: torch.device,
    precision: str = "fp32",
    corruption: Corruption | None = None,
) -> list[Observation]:
    """Run a model on whole videos, the streams joined (n, 2 · D). The model is left in eval mode.

    Raises ``UserError`` for a model that does not weigh two modalities.
    """
    if len(model.streams) != len(MODALITIES):
        raise _unsuitable(model)
    model.eval()
    observations = []
    with torch.inference_mode(), autocast(device, precision):
        fixed = model.fixed_inputs()
        for video, (rows, frames) in enumerate(zip(features, counts, strict=True)):
            windows, lengths = model.sampling.windows(rows)
            if corruption:
                windows = corruption.apply(windows, video)
            curves, weights = _observe_windows(model, windows, lengths, fixed)
            curves = model.sampling.restore(curves, len(rows)).T
            weights = model.sampling.restore(weights, len(rows))
            dimensions = np.einsum("n,nmd->md", frames.frames.astype(np.float64), weights)
            observations.append(Observation(curves[0], dict(zip(CURVE_NAMES, curves[1:], strict=True)), dimensions))
    return observations


def _observe_windows(
    model: Method, windows: np.ndarray, lengths: np.ndarray, fixed: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the anomaly and ``CURVE_NAMES`` (N·T, 7), and weights (N·T, 2, D) of model inputs (N, T, 2 · D)."""
    device, at_once = next(model.parameters()).device, model.windows_at_once
    curves, weights = [], []
    for start in range(0, len(windows), at_once):
        chosen = slice(start, start + at_once)
        visual = torch.from_numpy(windows[chosen]).to(device, torch.float32)
        output = model(visual, torch.from_numpy(lengths[chosen]).to(device), *fixed)
        anomaly = model.scores(output).anomaly[0]
        compared, weight = _compare(model, output)
        curves.append(torch.cat([anomaly[..., None], compared], dim=-1).flatten(0, 1).cpu().numpy())
        weights.append(weight.flatten(0, 1).cpu().numpy())
    return np.concatenate(curves), np.concatenate(weights)


def _compare(model: Method, output: Any) -> tuple[Tensor, Tensor]:
    """Return mean weights, cosine similarities and distances (B, T, 6), and all weights (B, T, 2, D)."""
    if any(getattr(output, name, None) is None for name in NEEDED):
        raise _unsuitable(model)
    weight, mu = (
        torch.stack([getattr(output, f"{kind}_{what}").float() for kind in MODALITIES], dim=-2)
        for what in ("weight", "mu")
    )
    fused = output.fused.float().unsqueeze(-2)
    cosine = F.cosine_similarity(fused, mu, dim=-1)
    return torch.cat([weight.mean(-1), cosine, (fused - mu).norm(dim=-1)], dim=-1), weight


def _unsuitable(model: Method) -> UserError:
    return UserError(f"{model.name} does not weigh two modalities by their uncertainty, so there is nothing to analyse")


def sweep(
    model: Method,
    features: Sequence[np.ndarray],
    counts: Sequence[FrameCounts],
    device: torch.device,
    precision: str = "fp32",
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
) -> list[SweepPoint]:
    """Corrupt the image at each level with clean events, then the reverse. Source: released code of IEF-VAD."""
    clean = observe_videos(model, features, counts, device, precision)
    points = []
    for index, modality in enumerate(MODALITIES):
        for level in levels:
            corrupt = observe_videos(model, features, counts, device, precision, Corruption(index, level, seed))
            change = _mean_dimensions(clean, counts) - _mean_dimensions(corrupt, counts)
            points.append(SweepPoint(modality, level, sweep_metrics(clean, corrupt, counts), change))
    return points


def sweep_metrics(
    clean: Sequence[Observation], corrupt: Sequence[Observation], counts: Sequence[FrameCounts]
) -> dict[str, float]:
    """Average the effect of a corruption over frames.

    ``brier``: (p_corrupt - truth)²; ``kl``: Bernoulli KL(p_clean ‖ p_corrupt) in nats; ``auc``, ``ap`` and the mean
    weights (``image_weight``, ``image_weight_anomalous``, …) of the corrupted. NaN where there are no such frames.
    """
    before, after = (np.concatenate([video.anomaly for video in run]).astype(np.float64) for run in (clean, corrupt))
    parts = _joined_parts(counts)
    positives, normal, frames = parts["anomalous"], parts["normal"], parts["all"]
    brier = (positives * (after - 1) ** 2 + normal * after**2).sum() / frames.sum()
    metrics = {"brier": float(brier), "kl": _mean(bernoulli_kl(before, after), frames)}
    metrics |= snippet_metrics(after, positives, frames)
    for part, counted in parts.items():
        for name in (f"{kind}_weight" for kind in MODALITIES):
            curve = np.concatenate([video.by_modality[name] for video in corrupt])
            metrics[name if part == "all" else f"{name}_{part}"] = _mean(curve, counted)
    return metrics


def bernoulli_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return KL(Bernoulli(p) ‖ Bernoulli(q)) in nats, elementwise, both clipped to [1e-8, 1 - 1e-8]."""
    p, q = (np.clip(values, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR) for values in (p, q))
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def class_averages(
    observations: Sequence[Observation], counts: Sequence[FrameCounts], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Average over the frames of each class's videos: all, the anomalous and the normal ones by truth.

    ``classes`` names the class of each video. Rows hold ``class``, ``part``, ``frames`` and a mean of every curve of
    ``Observation.by_modality``, in the order of the list; parts without frames are left out.
    """
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(classes):
        members = [index for index, own in enumerate(classes) if own == name]
        videos = [observations[index].by_modality for index in members]
        curves = {curve: np.concatenate([video[curve] for video in videos]) for curve in videos[0]}
        for part, frames in _joined_parts([counts[index] for index in members]).items():
            if frames.any():
                means = {curve: _mean(values, frames) for curve, values in curves.items()}
                rows.append({"class": name, "part": part, "frames": int(frames.sum())} | means)
    return rows


def _joined_parts(counts: Sequence[FrameCounts]) -> dict[str, np.ndarray]:
    parts = [video.parts for video in counts]
    return {part: np.concatenate([video[part] for video in parts]) for part in parts[0]}


def _mean(values: np.ndarray, frames: np.ndarray) -> float:
    """Average one value per snippet over the frames behind the snippets; NaN without frames."""
    return float(values.astype(np.float64) @ frames / frames.sum()) if frames.any() else float("nan")


def _mean_dimensions(observations: Sequence[Observation], counts: Sequence[FrameCounts]) -> np.ndarray:
    return sum(video.dimensions for video in observations) / sum(video.frames.sum() for video in counts)
