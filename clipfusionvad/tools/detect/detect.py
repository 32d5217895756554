"""Score video files: from frames to features, scores of snippets, and segments.

n snippets, C classes (0 is *normal*).
"""

import contextlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipfusionvad.data.prefetch import prefetch
from clipfusionvad.extraction.crops import to_canvas
from clipfusionvad.extraction.decode import BrokenVideo, VideoInfo, read_frames
from clipfusionvad.io.errors import UserError
from clipfusionvad.metrics.segments import Segment, Thresholds, find_segments
from clipfusionvad.tools.detect.model import DetectionModel, FrameFeatures

#: Frames that are handed over together.
CHUNK = 16


@dataclass(frozen=True)
class Chunk:
    """Consecutive frames; ``first`` is the number of the first one."""

    first: int
    frames: list[np.ndarray]


def read_chunks(frames: Iterable[np.ndarray], size: int) -> Generator[Chunk, None, None]:
    """Yield frames, resized to the canvas of the crops, ``size`` at a time.

    The last chunk may be shorter; it also comes before the ``BrokenVideo`` of a damaged video.
    """
    first, chunk = 0, []
    broken: BrokenVideo | None = None
    try:
        for frame in frames:
            chunk.append(to_canvas(frame))
            if len(chunk) == size:
                yield Chunk(first, chunk)
                first, chunk = first + size, []
    except BrokenVideo as error:
        broken = error
    if chunk:
        yield Chunk(first, chunk)
    if broken:
        raise broken


@dataclass(frozen=True)
class Detection:
    """The result of one video: ``anomaly`` (n,) of the main branch, ``classes`` (n, C) or None.

    Snippet i has the frames bounds[i] … bounds[i + 1] - 1; ``broken`` says why decoding stopped early, if it did.
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
        """The segment of highest confidence; None for a video without segments."""
        return max(self.segments, key=lambda segment: segment.confidence, default=None)

    def by_second(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return the seconds that have frames (s,), and means over their frames: anomaly (s,), classes (s, C)."""
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

    def __init__(self, model: DetectionModel, thresholds: Thresholds):
        self.model, self.thresholds, self.features = model, thresholds, FrameFeatures(model)

    def detect(self, path: str | Path, on_frames: Callable[[int, VideoInfo], None] | None = None) -> Detection:
        """Score one file; ``on_frames`` gets the number of frames of each chunk.

        If decoding stops early, the frames before are scored. ``UserError`` for a file without any frame.
        """
        infos: list[VideoInfo] = []
        rows, count, broken = [], 0, None
        with contextlib.closing(prefetch(read_chunks(read_frames(path, infos.append), CHUNK))) as chunks:
            try:
                for chunk in chunks:
                    count += len(chunk.frames)
                    rows.append(self.features.add(chunk.frames))
                    if on_frames:
                        on_frames(len(chunk.frames), infos[0])
            except BrokenVideo as error:
                broken = str(error)
        rows.append(self.features.finish())
        if not count:
            raise UserError(broken or f"{path} holds no frame")
        scores = self.model.scorer(np.concatenate(rows))
        if not np.isfinite(scores.anomaly).all():
            raise UserError(f"the scores of {path} are not finite: do the weights fit this CLIP's features?")
        info, anomaly, classes, labels = infos[0], scores.anomaly[0], scores.classes, self.model.labels
        bounds = np.minimum(np.arange(len(anomaly) + 1) * self.model.frames_per_snippet, count)
        segments = find_segments(anomaly, classes, bounds, info.fps, labels, self.thresholds)
        return Detection(info, anomaly, classes, bounds, labels, self.thresholds, tuple(segments), broken)
