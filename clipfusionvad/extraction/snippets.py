"""From frames to feature rows: the crops of the released features or CLIP's own, event images, chunks, blocks.

Frames are resized to canvases and cut into crops. A chunk of frames becomes a row; blocks of chunks are encoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import cv2
import numpy as np
from PIL import Image

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option, size

if TYPE_CHECKING:
    from clipfusionvad.extraction.encoder import ImageEncoder

SIZE = 224
#: Width and height to which the released code resized frames; the aspect ratio is not kept.
CANVAS = (340, 256)
# Weights of R, G and B in ten-thousandths: with whole numbers, float32 arithmetic is exact.
_GREY, _UNIT = np.array([2989, 5870, 1140], np.float32), 10_000
#: Chunks that the released scripts encode at once.
BLOCK_CHUNKS = 32


_TAIL = """frames left at the end: floor drops them, ceil makes a shorter chunk of them, released drops them and \
also a last row that follows whole blocks of 32"""


@dataclass(frozen=True)
class ExtractOptions:
    """How frames become rows; the defaults are the released protocol with a corrected tail rule.

    ``stride`` frames form a chunk, and a chunk becomes a row. The tail "floor" gives each whole chunk a row.
    "released" does too, but drops the last row if it is the only one after whole blocks of 32 chunks (with 16 frames
    a chunk: if frames % 512 == 16). "ceil" also gives the last, shorter chunk a row.
    """

    stride: Annotated[int, size("frames in a chunk, which becomes a row")] = 16
    reduce: Annotated[
        str, Option("rows: mean of a chunk's frames, its middle frame, or each one", choices=("mean", "middle", "none"))
    ] = "mean"
    crops: tuple[int, ...] = (0,)
    stream: Annotated[str, Option("encode frames, or synthetic event images", choices=("rgb", "event"))] = "rgb"
    event_threshold: Annotated[float, Option("change of grey (0..255) that counts as an event", minimum=0)] = 10
    event_scope: Annotated[
        str, Option("event images are normalised over a block of 32 chunks or each chunk", choices=("block", "chunk"))
    ] = "block"
    tail: Annotated[str, Option(_TAIL, choices=("released", "floor", "ceil"))] = "floor"
    resize: Annotated[
        str, Option("to 340x256 before cropping, or CLIP's own (crops 0 and 5 only)", choices=("released", "clip"))
    ] = "released"
    event_empty: Annotated[
        str, Option("where nothing moves: black, or NaN rows as in some released files", choices=("zero", "nan"))
    ] = "zero"

    def __post_init__(self) -> None:
        crops = set(self.crops)
        if not crops or len(crops) != len(self.crops) or not crops <= set(range(10)):
            given = ", ".join(map(str, self.crops)) or "none"
            raise UserError(f"crops must be different numbers from 0 to 9, not {given}")
        if self.resize == "clip" and not crops <= {0, 5}:
            raise UserError("CLIP's own preprocessing has crop 0 and its mirror image 5 only; others need 'released'")
        if self.stream == "event" and self.reduce != "mean":
            raise UserError(f"an event image covers a whole chunk: --reduce {self.reduce} does not apply to it")
        if self.stream == "event" and self.stride < 2:
            raise UserError("events are changes between the frames of a chunk: --stride must be 2 or more")


def to_canvas(frame: np.ndarray, resize: str = "released", size: int = SIZE) -> np.ndarray:
    """Resize a frame (H, W, 3) uint8 to the canvas that crops are cut from; a canvas is returned as it is.

    "released": (256, 340, 3), bilinear as in OpenCV. "clip": CLIP's own preprocessing, (size, size, 3), the shorter
    side bicubically to ``size`` and the centre cut out.
    """
    if resize == "released":
        return frame if frame.shape[1::-1] == CANVAS else cv2.resize(frame, CANVAS, interpolation=cv2.INTER_LINEAR)
    height, width = frame.shape[:2]
    short = min(height, width)
    if short != size:
        width, height = int(size * width / short), int(size * height / short)
        frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return frame[top : top + size, left : left + size]


def cut_windows(canvases: np.ndarray, crops: Sequence[int], size: int = SIZE) -> np.ndarray:
    """Cut crops from canvases (n, H, W, ...): (n, len(crops), size, size, ...).

    0 centre, 1 top left, 2 top right, 3 bottom left, 4 bottom right; 5 to 9 their mirror images (released IEF-VAD).
    """
    down, right = canvases.shape[1] - size, canvases.shape[2] - size
    corners = [(down // 2, right // 2), (0, 0), (0, right), (down, 0), (down, right)]
    windows = np.empty((len(canvases), len(crops), size, size, *canvases.shape[3:]), canvases.dtype)
    for index, crop in enumerate(crops):
        top, left = corners[crop % 5]
        window = canvases[:, top : top + size, left : left + size]
        windows[:, index] = window[:, :, ::-1] if crop >= 5 else window
    return windows


def count_events(frames: Sequence[np.ndarray], threshold: float) -> np.ndarray:
    """Return how often each pixel changes in a chunk of frames (H, W, 3) uint8: (H, W) uint16 (stream of IEF-VAD).

    An event is a change of grey (0..255) by more than ``threshold`` between consecutive frames, in either direction.
    """
    counts = np.zeros(frames[0].shape[:2], np.uint16)
    last = frames[0].astype(np.float32) @ _GREY
    for frame in frames[1:]:
        grey = frame.astype(np.float32) @ _GREY
        counts += np.abs(grey - last) > np.float32(threshold * _UNIT)
        last = grey
    return counts


def normalise_counts(counts: np.ndarray, scope: str = "block", empty: str = "zero") -> np.ndarray:
    """Return event images (chunks, crops, H, W) float32 in 0..1 from the counts of one block.

    Each crop's counts are divided by their maximum: over the whole block, as released, or over each chunk. Where
    nothing moves, ``empty`` "zero" gives black; "nan" gives NaN, as released for UCF-Crime, ShanghaiTech and MSAD.
    """
    highest = counts.max(axis=(0, 2, 3) if scope == "block" else (2, 3), keepdims=True).astype(np.float32)
    with np.errstate(invalid="ignore"):
        return counts / (np.maximum(highest, 1) if empty == "zero" else highest)


class SnippetEncoder:
    """Turn the frames of a video, which may arrive in any portions, into rows.

    ``block_frames`` frames are encoded at once (default: 32 chunks, as released; always whole chunks). RGB rows do not
    depend on it, event rows of scope "block" do. Memory use is that of one block.
    """

    def __init__(self, encoder: ImageEncoder, options: ExtractOptions, block_frames: int | None = None):
        self.encoder, self.options = encoder, options
        self.block_frames = block_frames or BLOCK_CHUNKS * options.stride
        # Only CLIP's own preprocessing has other sizes than that of the released crops.
        self.size = encoder.resolution if options.resize == "clip" else SIZE
        self._frames = 0
        self._chunk: list[np.ndarray] = []
        # For each row of the current block: its frames, or the counts of its events.
        self._block: list[Any] = []

    def add(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """Take frames (H, W, 3) uint8; return the rows that they complete, (crops, rows, D) float32."""
        rows = [self._encode_block([])]
        for frame in frames:
            self._chunk.append(to_canvas(frame, self.options.resize, self.size))
            self._frames += 1
            if len(self._chunk) == self.options.stride:
                self._end_chunk()
            if self._frames % self.block_frames == 0:
                block, self._block = self._block, []
                rows.append(self._encode_block(block))
        return np.concatenate(rows, axis=1)

    def finish(self) -> np.ndarray:
        """Return the last rows by the tail rule, (crops, rows, D)."""
        options = self.options
        if options.tail == "ceil" or options.reduce == "none":
            self._end_chunk()
        elif options.tail == "released" and self._frames % (BLOCK_CHUNKS * options.stride) == options.stride:
            del self._block[-1:]
        return self._encode_block(self._block)

    def _end_chunk(self) -> None:
        chunk, self._chunk = self._chunk, []
        if self.options.reduce == "none":
            self._block += [[frame] for frame in chunk]
        elif self.options.reduce == "middle":
            self._block += [[frame] for frame in chunk[len(chunk) // 2 :][:1]]
        elif chunk:
            event = self.options.stream == "event"
            self._block.append(count_events(chunk, self.options.event_threshold) if event else chunk)

    def _encode_block(self, block: list[Any]) -> np.ndarray:
        """Return (crops, rows, D)."""
        options, encoder = self.options, self.encoder
        if not block:
            return np.empty((len(options.crops), 0, encoder.dim), np.float32)
        event = options.stream == "event"
        frames = block if event else [frame for row in block for frame in row]
        # One batch of images at a time: ten crops of a whole block would take too much memory.
        step = len(frames) if event else max(1, encoder.batch_size // len(options.crops))
        embedded = []
        for start in range(0, len(frames), step):
            images = cut_windows(np.stack(frames[start : start + step]), options.crops, self.size)
            if event:
                images = normalise_counts(images, options.event_scope, options.event_empty)
            embedded.append(encoder.encode(images.reshape(-1, *images.shape[2:])))
        features = np.concatenate(embedded).reshape(len(frames), len(options.crops), -1)
        if not event:
            lengths = np.array([len(row) for row in block])
            sums = np.add.reduceat(features, np.cumsum(lengths) - lengths, axis=0)
            features = sums / lengths[:, None, None].astype(np.float32)
        return features.swapaxes(0, 1)
