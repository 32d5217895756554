"""Made-up models, batches and test sets for the benchmarks: random weights and features, sizes as in the real ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks import sizes
from benchmarks.plain.model import PlainClipFusionVAD
from clipfusionvad.data.config import FRAMES_PER_SNIPPET
from clipfusionvad.data.truth import Truth, frames_from_segments
from clipfusionvad.datasets import NORMAL_IN_TRUTH, UCF, XD, Dataset
from clipfusionvad.models import Method, build_method
from clipfusionvad.models.clip import ClipWeights, toy_state

#: Frames of the anomalous and of the normal test videos.
TEST_FRAMES = {
    UCF.name: (sizes.UCF_TEST_ANOMALOUS, sizes.UCF_TEST_NORMAL),
    XD.name: (sizes.XD_TEST_ANOMALOUS, sizes.XD_TEST_NORMAL),
}


@dataclass(frozen=True)
class Size:
    """Dimensions of a model."""

    width: int
    text_layers: int
    length: int
    window: int = 8
    visual_layers: int = 2
    context: int = 10


#: The published model with ViT-B/16's text tower, and one to see that a script runs.
FULL, SMALL = Size(512, 12, 256), Size(64, 2, 32, visual_layers=1, context=2)


def pick_size(quick: bool) -> Size:
    return SMALL if quick else FULL


def made_model(size: Size, plain: bool = False, dataset: Dataset = UCF, seed: int = 0) -> Method | PlainClipFusionVAD:
    """ClipFusionVAD of the package or, with the same weights, the plain one."""
    clip = ClipWeights(toy_state(size.width, size.text_layers), "random")
    options = {
        "embed_dim": size.width,
        "visual_width": size.width,
        "visual_length": size.length,
        "visual_layers": size.visual_layers,
        "attn_window": size.window,
        "prompt_prefix": size.context,
        "prompt_postfix": size.context,
    }
    torch.manual_seed(seed)
    ours = build_method("clipfusionvad", dataset.prompts, clip, **options)
    if not plain:
        return ours
    model = PlainClipFusionVAD(dataset.prompts, clip, **options)
    model.load_state_dict(ours.state_dict())
    return model


def made_batch(size: Size, each: int, dataset: Dataset = UCF, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A training batch of ``each`` normal and as many anomalous videos: visual (B, T, D), lengths (B,), targets."""
    rng = np.random.default_rng(seed)
    visual = rng.normal(size=(2 * each, size.length, size.width)).astype(np.float32)
    lengths = rng.integers(size.length // 4, size.length + 1, 2 * each)
    visual[np.arange(size.length) >= lengths[:, None]] = 0
    anomalous = rng.choice(dataset.labels[1:], each)
    targets = np.stack([dataset.encode(label) for label in [dataset.labels[0]] * each + anomalous.tolist()])
    return torch.from_numpy(visual), torch.from_numpy(lengths), torch.from_numpy(targets)


def made_features(counts: Sequence[int], width: int, seed: int = 0) -> list[np.ndarray]:
    """Features (n, D) of videos of so many snippets."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((count, width), np.float32) for count in counts]


def made_truth(dataset: Dataset, frames: tuple[Sequence[int], Sequence[int]], seed: int = 0) -> Truth:
    """Truth of videos of so many frames, the anomalous ones with one to three events, the others without any.

    Frames are cut to whole snippets, as the released truth does, and a video has at least two snippets.
    """
    rng = np.random.default_rng(seed)
    truth = Truth([], [], [])
    anomalous, normal = (
        [max(count // FRAMES_PER_SNIPPET, 2) * FRAMES_PER_SNIPPET for count in part] for part in frames
    )
    for number, count in enumerate(anomalous):
        events = int(rng.integers(1, 4))
        bounds = np.sort(rng.choice(count + 1, 2 * events, replace=False)).reshape(-1, 2)
        label = dataset.labels[1 + number % (len(dataset.labels) - 1)]
        truth.segments.append([(int(start), int(end)) for start, end in bounds])
        truth.labels.append([label] * events)
    for count in normal:
        truth.segments.append([(0, count)])
        truth.labels.append([NORMAL_IN_TRUTH])
    for spans, names, count in zip(truth.segments, truth.labels, [*anomalous, *normal], strict=True):
        truth.frames.append(frames_from_segments([] if names == [NORMAL_IN_TRUTH] else spans, count))
    return truth


def made_probabilities(dataset: Dataset, truth: Truth, seed: int = 0) -> list[np.ndarray]:
    """Class probabilities (n, C) float32 that follow the truth as a trained model's do: smooth, and wrong at times."""
    rng = np.random.default_rng(seed)
    probabilities = []
    for frames, spans, names in zip(truth.frames, truth.segments, truth.labels, strict=True):
        count = len(frames) // FRAMES_PER_SNIPPET
        noise = rng.normal(size=(count + 8, len(dataset.labels))).cumsum(axis=0)
        logits = (noise[8:] - noise[:-8]) / 4
        logits[:, 0] += 1
        for (start, end), name in zip(spans, names, strict=True):
            rows = slice(start // FRAMES_PER_SNIPPET, -(-end // FRAMES_PER_SNIPPET))
            logits[rows, 0 if name == NORMAL_IN_TRUTH else dataset.labels.index(name)] += rng.uniform(0, 4)
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities.append((raised / raised.sum(axis=1, keepdims=True)).astype(np.float32))
    return probabilities


def benchmark_frames(dataset: Dataset, videos: int | None = None) -> tuple[Sequence[int], Sequence[int]]:
    """Frames of a benchmark's anomalous and normal test videos, or of the shortest ``videos`` of each kind."""
    anomalous, normal = TEST_FRAMES[dataset.name]
    return anomalous[:videos], normal[:videos]
