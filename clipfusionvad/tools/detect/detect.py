"""From the frames of one video to features, scores of its snippets, and segments.

n snippets, C classes (0 is *normal*), D feature width of one stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from clipfusionvad.data.prefetch import ahead
from clipfusionvad.engine.device import autocast
from clipfusionvad.engine.evaluator import VideoScores
from clipfusionvad.extraction.crops import to_canvas
from clipfusionvad.extraction.decode import BrokenVideo, VideoInfo, read_frames
from clipfusionvad.extraction.encoder import ImageEncoder
from clipfusionvad.extraction.snippets import ExtractOptions, SnippetEncoder
from clipfusionvad.io.errors import UserError
from clipfusionvad.metrics.segments import Segment, Thresholds, find_segments
from clipfusionvad.models import Method

#: Frames that are handed on together.
CHUNK = 16
#: Frames that are encoded at once, where no row depends on how many they are.
BATCH = 64


class FrameFeatures:
    """The features of a method's streams, all from the same frames, side by side."""

    def __init__(
        self,
        encoders: Sequence[tuple[str, ImageEncoder]],
        options: ExtractOptions,
        live: bool = False,
    ):
        """``encoders`` in the order of the method's streams; ``options`` of them all, the stream aside.

        ``live`` gives a row as soon as its frames are there, unless event images are normalised over blocks.
        """
        by_block = options.event_scope == "block" and any(stream == "event" for stream, _ in encoders)
        chunks = 1 if live else max(1, BATCH // options.stride)
        block = None if by_block else chunks * options.stride
        self.streams = [
            SnippetEncoder(encoder, replace(options, stream=stream), block_frames=block) for stream, encoder in encoders
        ]

    def add(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Frames (H, W, 3) uint8 → the rows that they complete, (rows, streams · D) float32."""
        return np.concatenate([stream.add(frames)[0] for stream in self.streams], axis=1)

    def finish(self) -> np.ndarray:
        """The last rows by the tail rule; the object may be used anew."""
        return np.concatenate([stream.finish()[0] for stream in self.streams], axis=1)


class Scorer:
    """A model whose class texts are encoded once."""

    def __init__(self, model: Method, device: torch.device, precision: str = "fp32"):
        self.model, self.device, self.precision = model.to(device).eval(), device, precision
        with torch.inference_mode(), autocast(device, precision):
            self.fixed = model.fixed_inputs()

    def __call__(self, features: np.ndarray) -> VideoScores:
        """Score a whole video (n, streams · D) as a test does."""
        sampling = self.model.sampling
        with autocast(self.device, self.precision):
            anomaly, classes = self.model.score_windows(*sampling.windows(features), *self.fixed)
        count = len(features)
        return VideoScores(
            sampling.restore(anomaly.T, count).T, None if classes is None else sampling.restore(classes, count)
        )


@dataclass(frozen=True)
class Detection:
    """What is known of one video: ``anomaly`` (n,) of the main branch, ``classes`` (n, C) or None.

    Snippet i is frames bounds[i] … bounds[i + 1] - 1; ``broken`` says why decoding broke off, if it did.
    """

    info: VideoInfo
    anomaly: np.ndarray
    classes: np.ndarray | None
    bounds: np.ndarray
    labels: tuple[str, ...]
    thresholds: Thresholds
    segments: tuple[Segment, ...]
    broken: str | None = None

    @property
    def frames(self) -> int:
        return int(self.bounds[-1])

    @property
    def seconds(self) -> float:
        return self.frames / self.info.fps

    @property
    def verdict(self) -> Segment | None:
        """The segment of highest confidence; None for a video without any."""
        return max(self.segments, key=lambda segment: segment.confidence, default=None)

    def by_second(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Seconds that have frames (s,), and the means over those frames: anomaly (s,), classes (s, C) or None."""
        second = (np.arange(self.frames) / self.info.fps).astype(np.int64)
        starts = np.flatnonzero(np.diff(second, prepend=-1))
        counts = np.diff(np.append(starts, self.frames))
        snippet = np.repeat(np.arange(len(self.anomaly)), np.diff(self.bounds))
        anomaly = np.add.reduceat(self.anomaly[snippet], starts) / counts
        if self.classes is None:
            return second[starts], anomaly, None
        return second[starts], anomaly, np.add.reduceat(self.classes[snippet], starts) / counts[:, None]


class Detector:
    """Scores video files with one model."""

    def __init__(
        self,
        features: FrameFeatures,
        scorer: Scorer,
        labels: Sequence[str],
        thresholds: Thresholds,
        frames_per_snippet: int,
    ):
        self.features, self.scorer, self.labels = features, scorer, tuple(labels)
        self.thresholds, self.frames_per_snippet = thresholds, frames_per_snippet

    def detect(self, path: str | Path, on_frames: Callable[[int, VideoInfo], None] | None = None) -> Detection:
        """Score one file; ``on_frames`` hears of frames as they are read.

        Where decoding breaks off, what was read by then is scored. ``UserError`` for a file without any frame.
        """
        infos: list[VideoInfo] = []
        rows, count, broken = [], 0, None
        with contextlib.closing(ahead(in_chunks(read_frames(path, infos.append), CHUNK))) as chunks:
            try:
                for frames in chunks:
                    count += len(frames)
                    rows.append(self.features.add(frames))
                    if on_frames:
                        on_frames(len(frames), infos[0])
            except BrokenVideo as error:
                broken = str(error)
        rows.append(self.features.finish())
        if not count:
            raise UserError(broken or f"{path} holds no frame")
        return self.judge(infos[0], np.concatenate(rows), count, broken)

    def judge(self, info: VideoInfo, features: np.ndarray, frames: int, broken: str | None = None) -> Detection:
        """Score the features (n, streams · D) of a video of so many frames."""
        scores = self.scorer(features)
        if not np.isfinite(scores.anomaly).all():
            raise UserError(f"the scores of {info.path} are not finite: do the weights fit this CLIP's features?")
        bounds = np.minimum(np.arange(len(features) + 1) * self.frames_per_snippet, frames)
        anomaly, classes = scores.anomaly[0], scores.classes
        segments = find_segments(anomaly, classes, bounds, info.fps, self.labels, self.thresholds)
        return Detection(info, anomaly, classes, bounds, self.labels, self.thresholds, tuple(segments), broken)


def in_chunks(frames: Iterable[np.ndarray], size: int) -> Generator[list[np.ndarray], None, None]:
    """Frames as crops are cut from them, so many at a time; at the end, or where decoding breaks off, the rest."""
    chunk: list[np.ndarray] = []
    broken: BrokenVideo | None = None
    try:
        for frame in frames:
            chunk.append(to_canvas(frame))
            if len(chunk) == size:
                yield chunk
                chunk = []
    except BrokenVideo as error:
        broken = error
    if chunk:
        yield chunk
    if broken:
        raise broken
