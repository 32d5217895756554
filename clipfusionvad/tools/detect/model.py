"""A model that is ready to score frames: the encoders of its streams, its class texts, its labels.

n snippets, D width of a stream's features, C classes (0 is *normal*).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.device import autocast, pick_device
from clipfusionvad.extraction.encoder import ImageEncoder
from clipfusionvad.extraction.snippets import ExtractOptions, SnippetEncoder
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_text
from clipfusionvad.io.hub import local_path, pinned
from clipfusionvad.metrics import smooth_scores, snippet_edges
from clipfusionvad.models import Method
from clipfusionvad.models.clip import TOY, ClipWeights, load_clip
from clipfusionvad.tools.detect.config import ModelOptions

# Frames that are encoded at once, if rows do not depend on their number.
_BATCH = 64
_CROPS = "centre", "top left", "top right", "bottom left", "bottom right"
# The CLIP of features by their width, for methods whose files do not name it.
_CLIP_OF_WIDTH = {512: "ViT-B/16", 768: "ViT-L/14"}


class DetectionModel:
    """Everything that turns frames into scores; ``settings`` describe it in the results."""

    def __init__(
        self,
        own: ModelOptions,
        model: Method,
        clip: ClipWeights | None,
        clip_name: str,
        dataset: Dataset,
        frames: int,
        parts: int | None = None,
        sigma: float = 0,
    ):
        """``clip``, of the name ``clip_name``, encodes the model's texts, if any; ``frames`` are those of a snippet.

        With ``parts``, a video has that many snippets: each is the mean over an equal part of its rows.
        ``sigma`` is how far ``score_whole`` smooths.
        """
        self.parts, self.sigma = parts, sigma
        self.device, self.precision, self.frames_per_snippet = pick_device(own.device), own.precision, frames
        self.model = model.to(self.device).eval()
        with torch.inference_mode(), autocast(self.device, self.precision):
            self.fixed = model.fixed_inputs()
        clips = _image_clips(own, model, clip, clip_name)
        self.encoders = {stream: ImageEncoder(clip, self.device, own.precision) for stream, clip in clips.items()}
        for stream, encoder in self.encoders.items():
            if encoder.dim != model.feature_width:
                raise UserError(
                    f"CLIP {clips[stream].source} makes {stream} features of width {encoder.dim}, but "
                    f"{own.checkpoint} reads {model.feature_width}: pass the one whose features it was trained on"
                )
        reduce: dict[str, Any] = {"stride": frames, "reduce": "mean"} if frames > 1 else {"reduce": "none"}
        events: dict[str, Any] = {"event_threshold": own.event_threshold, "event_scope": own.event_scope}
        self.options = ExtractOptions(crops=(own.crop,), tail="ceil", **reduce, **events)
        # If labels are codes, prompts are shown in their place.
        self.dataset = dataset
        self.labels = tuple(dataset.prompts if dataset.multi_label else dataset.labels)
        self.settings = {
            "checkpoint": pinned(own.checkpoint),
            "checkpoint_bytes": local_path(own.checkpoint).stat().st_size,
            "method": model.name,
            "dataset": dataset.name,
            "classes": dict(zip(self.labels, dataset.prompts, strict=True)),
            "frames_per_snippet": frames,
            "clip": {stream: source.source for stream, source in clips.items()},
            "crop": own.crop,
            "tail": self.options.tail,
            "features": _in_words(own.crop, frames, dataset),
            "precision": own.precision,
            **({"parts": parts} if parts else {}),
            **({"smooth": sigma} if sigma else {}),
            **(events if "event" in clips else {}),
        }

    def score(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Score snippets (n, streams · D) as a test without smoothing does: anomaly (n,) of the main branch and
        classes (n, C).
        """
        sampling, count = self.model.sampling, len(features)
        with autocast(self.device, self.precision):
            anomaly, classes = self.model.score_windows(*sampling.windows(features), *self.fixed)
        return sampling.restore(anomaly[0], count), None if classes is None else sampling.restore(classes, count)

    def score_whole(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Score a whole video, smoothed over time."""
        anomaly, classes = self.score(features)
        return smooth_scores(anomaly, self.sigma), None if classes is None else smooth_scores(classes, self.sigma)

    def snippets(self, rows: np.ndarray) -> np.ndarray:
        """Return the snippets (n, D) of a whole video's rows (L, D): these rows, or the means of equal parts."""
        if self.parts is None:
            return rows
        edges = snippet_edges(self.parts, len(rows), None)
        # A part of a video of fewer rows than parts is the row that it lies in.
        return np.stack([rows[i : max(j, i + 1)].mean(axis=0) for i, j in pairwise(edges)])

    def rows(self, chunks: Iterable[Sequence[np.ndarray]], live: bool = False) -> Iterator[np.ndarray]:
        """Yield the rows (n, streams · D) that each chunk of frames completes, and the last ones by the tail rule.

        ``live`` yields a row as soon as its frames are there, unless event images are normalised over blocks.
        """
        stride, by_block = self.options.stride, self.options.event_scope == "block" and "event" in self.encoders
        block = None if by_block else (1 if live else max(1, _BATCH // stride)) * stride
        options = {stream: replace(self.options, stream=stream) for stream in self.encoders}
        encoders = [SnippetEncoder(self.encoders[stream], options[stream], block) for stream in options]
        for frames in chunks:
            yield np.concatenate([encoder.add(frames)[0] for encoder in encoders], axis=1)
        yield np.concatenate([encoder.finish()[0] for encoder in encoders], axis=1)


def _image_clips(own: ModelOptions, model: Method, clip: ClipWeights | None, clip_name: str) -> dict[str, ClipWeights]:
    """Return the CLIP whose image encoder makes the features of each stream."""
    width = model.feature_width
    if clip is None or not any(key.startswith("visual.") for key in clip.state):
        name = own.clip or (clip_name if clip else _CLIP_OF_WIDTH.get(width))
        if name is None:
            raise UserError(f"pass --clip: the CLIP whose features of width {width} the model was trained on")
        clip = load_clip(name, width)
    if "event" not in model.streams:
        return {"rgb": clip}
    source = own.event_clip or (TOY if clip.source == TOY else None)
    if source is None:
        raise UserError(f"{model.name} also reads event images: pass the weights for them with --event-clip")
    return {"rgb": clip, "event": load_clip(source, width)}


def _in_words(crop: int, frames: int, dataset: Dataset) -> str:
    """Return how features are made here, and how those of a test usually differ."""
    here, there = (f"crop {k} ({_CROPS[k % 5]}{', mirrored' * (k > 4)})" for k in (crop, dataset.test_crop))
    rows, differs = "a row per frame", list[str]()
    if here != there:
        differs.append(f"a test on {dataset.title} reads {there}, as --crop {dataset.test_crop} does here")
    if frames > 1:
        rows = f"means of {frames} frames; the last frames count too, as a row of fewer"
        differs.append("feature files usually have no row for the last frames (extract --tail floor)")
    return f"{here} of each frame; {rows}." + (
        f" Scores of a test may differ: {'; '.join(differs)}." if differs else ""
    )


def read_classes(words: Sequence[str]) -> dict[str, str]:
    """Return class names and prompts from words NAME or NAME=PROMPT, or from a file with one such word per line."""
    if len(words) == 1 and Path(words[0]).is_file():
        lines = [line.strip() for line in read_text(words[0], "class file").splitlines()]
        words = [line for line in lines if line and not line.startswith("#")]
    halves = [word.partition("=") for word in words]
    classes = {name.strip(): (prompt if equals else name).strip() for name, equals, prompt in halves}
    if len(words) < 2 or len(classes) < len(words) or not all(name and prompt for name, prompt in classes.items()):
        raise UserError(
            f"--classes takes at least two different names, the normal one first (or a file with one per line), "
            f"each with =PROMPT if that is another text; got: {', '.join(words)}"
        )
    return classes
