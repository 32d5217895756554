"""From frames to feature rows: chunks of frames, blocks of chunks, and the rule for the end of a video."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from clipfusionvad.extraction.crops import SIZE, check_crops, cut_windows, to_canvas
from clipfusionvad.extraction.events import EventCounter, normalise_counts
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option, size

if TYPE_CHECKING:
    from clipfusionvad.extraction.encoder import ImageEncoder

#: Chunks that the released scripts encode at once.
BLOCK_CHUNKS = 32


@dataclass(frozen=True)
class ExtractOptions:
    """How frames become rows; the defaults are the released protocol with a corrected tail rule.

    ``stride`` frames form a chunk, and a chunk becomes a row. The tail "floor" gives each whole chunk a row.
    "released" does too, but drops the last row if it is the only one after whole blocks of 32 chunks (with 16 frames
    a chunk: if frames % 512 == 16). "ceil" also gives the last, shorter chunk a row.
    """

    stride: Annotated[int, size("frames in a chunk, which becomes a row")] = 16
    reduce: Annotated[
        str,
        Option(
            "a row is the mean of its frames' embeddings, or the embedding of its middle frame; none: a row per frame",
            choices=("mean", "middle", "none"),
        ),
    ] = "mean"
    crops: tuple[int, ...] = (0,)
    stream: Annotated[str, Option("encode frames, or synthetic event images", choices=("rgb", "event"))] = "rgb"
    event_threshold: Annotated[float, Option("change of grey (0..255) that counts as an event", minimum=0)] = 10
    event_scope: Annotated[
        str, Option("event images are normalised over a block of 32 chunks or each chunk", choices=("block", "chunk"))
    ] = "block"
    tail: Annotated[
        str,
        Option(
            "frames left at the end: floor drops them, ceil makes a shorter chunk of them, released drops them and "
            "also a last row that follows whole blocks of 32",
            choices=("released", "floor", "ceil"),
        ),
    ] = "floor"
    resize: Annotated[
        str,
        Option(
            "released: to 340x256 before cropping; clip: CLIP's own preprocessing, which has crops 0 and 5 only",
            choices=("released", "clip"),
        ),
    ] = "released"
    event_empty: Annotated[
        str,
        Option(
            "where nothing moves: zero gives a black image, nan NaN rows as in some released features",
            choices=("zero", "nan"),
        ),
    ] = "zero"

    def __post_init__(self) -> None:
        check_crops(self.crops, self.resize)
        if self.stride < 1:
            raise UserError(f"--stride must be at least one frame, not {self.stride}")
        if self.stream == "event" and self.reduce != "mean":
            raise UserError(f"an event image covers a whole chunk: --reduce {self.reduce} does not apply to it")
        if self.stream == "event" and self.stride < 2:
            raise UserError("events are changes between the frames of a chunk: --stride must be 2 or more")


def row_count(frames: int, options: ExtractOptions) -> int:
    """Return the number of rows of a video with ``frames`` frames."""
    if options.reduce == "none":
        return frames
    whole, rest = divmod(frames, options.stride)
    if options.tail == "ceil":
        return whole + (rest > 0)
    single = frames % (BLOCK_CHUNKS * options.stride) == options.stride
    return whole - 1 if options.tail == "released" and single else whole


class SnippetEncoder:
    """Turn the frames of a video, which may arrive in any portions, into rows.

    ``block_frames`` frames are encoded at once (default: 32 chunks, as released; always whole chunks). RGB rows do not
    depend on it, event rows of scope "block" do. Memory use is that of one block.
    """

    def __init__(self, encoder: ImageEncoder, options: ExtractOptions, block_frames: int | None = None):
        released = BLOCK_CHUNKS * options.stride
        self.encoder, self.options = encoder, options
        self.block_frames = released if block_frames is None else block_frames
        if self.block_frames < 1 or self.block_frames % options.stride:
            raise UserError(
                f"a block of {self.block_frames} frames is not a whole number of {options.stride}-frame chunks"
            )
        if options.tail == "released" and self.block_frames % released:
            raise UserError(f"the released tail rule needs blocks of {released} frames, not {self.block_frames}")
        # Only CLIP's own preprocessing has other sizes than that of the released crops.
        self.size = encoder.resolution if options.resize == "clip" else SIZE
        self._counter = EventCounter(options.event_threshold)
        self._reset()

    def add(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """Take frames (H, W, 3) uint8; return the rows that they complete, (crops, rows, D) float32."""
        rows = [self._no_rows()]
        for frame in frames:
            self._add_canvas(to_canvas(frame, self.options.resize, self.size))
            if self._frames % self.block_frames == 0:
                rows.append(self._encode_block())
        return np.concatenate(rows, axis=1)

    def finish(self) -> np.ndarray:
        """Return the last rows by the tail rule, (crops, rows, D); the next frame starts another video."""
        wanted = row_count(self._frames, self.options) - self._rows
        self._end_chunk()
        del self._block[wanted:]
        rows = self._encode_block()
        self._reset()
        return rows

    def _reset(self) -> None:
        self._frames = self._rows = 0
        # Frames of the current chunk (of event images the counter keeps what it needs).
        self._chunk: list[np.ndarray] = []
        # For each row of the current block: its frames, or the counts of its events.
        self._block: list[Any] = []

    def _add_canvas(self, canvas: np.ndarray) -> None:
        self._frames += 1
        if self.options.stream == "event":
            self._counter.add(canvas)
        else:
            self._chunk.append(canvas)
        if self._frames % self.options.stride == 0:
            self._end_chunk()

    def _end_chunk(self) -> None:
        if self.options.stream == "event":
            counts = self._counter.take()
            self._block += [] if counts is None else [counts]
            return
        chunk, self._chunk = self._chunk, []
        if self.options.reduce == "none":
            self._block += [[frame] for frame in chunk]
        elif chunk:
            self._block.append([chunk[len(chunk) // 2]] if self.options.reduce == "middle" else chunk)

    def _encode_block(self) -> np.ndarray:
        block, self._block = self._block, []
        self._rows += len(block)
        if not block:
            return self._no_rows()
        rows = self._encode_events(block) if self.options.stream == "event" else self._encode_frames(block)
        return rows.swapaxes(0, 1)

    def _encode_frames(self, block: list[list[np.ndarray]]) -> np.ndarray:
        """Return (rows, crops, D) from the frames of each row."""
        crops, frames = self.options.crops, [frame for row in block for frame in row]
        # One batch of images at a time: ten crops of a whole block would take too much memory.
        step = max(1, self.encoder.batch_size // len(crops))
        embedded = []
        for start in range(0, len(frames), step):
            images = cut_windows(np.stack(frames[start : start + step]), crops, self.size)
            embedded.append(self.encoder.encode(images.reshape(-1, *images.shape[2:])))
        features = np.concatenate(embedded).reshape(len(frames), len(crops), -1)
        lengths = np.array([len(row) for row in block])
        sums = np.add.reduceat(features, np.cumsum(lengths) - lengths, axis=0)
        return sums / lengths[:, None, None].astype(np.float32)

    def _encode_events(self, block: list[np.ndarray]) -> np.ndarray:
        """Return (chunks, crops, D) from the counts of each chunk."""
        options = self.options
        counts = cut_windows(np.stack(block), options.crops, self.size)
        images = normalise_counts(counts, options.event_scope, options.event_empty)
        features = self.encoder.encode_events(images.reshape(-1, *images.shape[2:]))
        return features.reshape(len(block), len(options.crops), -1)

    def _no_rows(self) -> np.ndarray:
        return np.empty((len(self.options.crops), 0, self.encoder.dim), np.float32)
