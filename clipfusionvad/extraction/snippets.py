"""From frames to feature rows: chunks of frames, blocks of chunks, and what happens at a video's end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clipfusionvad.extraction.crops import SIZE, Resize, check_crops, cut_windows, to_canvas
from clipfusionvad.extraction.encoder import ImageEncoder
from clipfusionvad.extraction.events import Empty, EventCounter, Scope, normalise_counts
from clipfusionvad.io.errors import UserError

#: Chunks that the released scripts encode at once.
BLOCK_CHUNKS = 32


@dataclass(frozen=True)
class ExtractOptions:
    """How frames become rows; the defaults are the released protocol with its tail put right.

    ``stride`` frames make a chunk and a row. ``reduce``: "mean" of the embeddings of a chunk's frames, "middle" its
    frame number stride // 2 alone, "none" a row for every frame. ``tail``: "floor" gives a row for every whole
    chunk; "released" too, but drops the last one where it stands alone behind whole blocks of 32 chunks (with 16
    frames a chunk: where the number of frames leaves 16 when divided by 512); "ceil" gives a last, shorter chunk
    its own row. ``event_*``: see ``clipfusionvad.extraction.events``.
    """

    stride: int = 16
    reduce: Literal["mean", "middle", "none"] = "mean"
    crops: tuple[int, ...] = (0,)
    stream: str = "rgb"
    event_threshold: float = 10
    event_scope: Scope = "block"
    tail: Literal["released", "floor", "ceil"] = "floor"
    resize: Resize = "released"
    event_empty: Empty = "zero"

    def __post_init__(self) -> None:
        check_crops(self.crops, self.resize)
        if self.stride < 1:
            raise UserError(f"a stride is at least one frame, not {self.stride}")
        if self.stream == "event" and self.reduce != "mean":
            raise UserError(f"an event image stands for a whole chunk: it cannot be reduced by {self.reduce!r}")
        if self.stream == "event" and self.stride < 2:
            raise UserError("events are changes between the frames of a chunk: the stride must be 2 or more")


def row_count(frames: int, options: ExtractOptions) -> int:
    """Rows that a video of so many frames gives."""
    if options.reduce == "none":
        return frames
    whole, rest = divmod(frames, options.stride)
    if options.tail == "ceil":
        return whole + (rest > 0)
    alone = frames % (BLOCK_CHUNKS * options.stride) == options.stride
    return whole - 1 if options.tail == "released" and alone else whole


class SnippetEncoder:
    """Turns a video's frames, given bit by bit, into rows.

    ``block_frames`` are encoded at once (default: 32 chunks, as released; a whole number of chunks in any case).
    RGB rows do not depend on it, event rows of scope "block" do. Memory is that of one block.
    """

    def __init__(self, encoder: ImageEncoder, options: ExtractOptions, block_frames: int | None = None):
        released = BLOCK_CHUNKS * options.stride
        self.encoder, self.options = encoder, options
        self.block_frames = released if block_frames is None else block_frames
        if self.block_frames < 1 or self.block_frames % options.stride:
            raise UserError(
                f"a block of {self.block_frames} frames is no whole number of {options.stride}-frame chunks"
            )
        if options.tail == "released" and self.block_frames % released:
            raise UserError(f"the released tail rule is about blocks of {released} frames, not {self.block_frames}")
        # Only CLIP's own preprocessing knows of other sizes than that of the released crops.
        self.size = encoder.resolution if options.resize == "clip" else SIZE
        self._counter = EventCounter(options.event_threshold)
        self._restart()

    def add(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """Take frames (H, W, 3) uint8, return the rows that they complete: (crops, rows, D) float32."""
        rows = [self._no_rows()]
        for frame in frames:
            self._take(to_canvas(frame, self.options.resize, self.size))
            if self._frames % self.block_frames == 0:
                rows.append(self._encode_block())
        return np.concatenate(rows, axis=1)

    def finish(self) -> np.ndarray:
        """The last rows by the tail rule, (crops, rows, D); what comes next is another video."""
        wanted = row_count(self._frames, self.options) - self._rows
        self._end_chunk()
        del self._block[wanted:]
        rows = self._encode_block()
        self._restart()
        return rows

    def _restart(self) -> None:
        self._frames = self._rows = 0
        # Frames of the chunk that is being filled (for events, the counter has them).
        self._chunk: list[np.ndarray] = []
        # What each row of the block is made of: the frames whose mean it is, or the counts of its events.
        self._block: list[Any] = []

    def _take(self, canvas: np.ndarray) -> None:
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
        """(rows, crops, D) from the frames of each row."""
        crops, frames = self.options.crops, [frame for row in block for frame in row]
        # As many frames at a time as make a batch, so that ten crops of a whole block never lie in memory.
        step = max(1, self.encoder.batch_size // len(crops))
        embedded = []
        for start in range(0, len(frames), step):
            cut = cut_windows(np.stack(frames[start : start + step]), crops, self.size)
            embedded.append(self.encoder.encode(cut.reshape(-1, *cut.shape[2:])))
        features = np.concatenate(embedded).reshape(len(frames), len(crops), -1)
        lengths = np.array([len(row) for row in block])
        sums = np.add.reduceat(features, np.cumsum(lengths) - lengths, axis=0)
        return sums / lengths[:, None, None].astype(np.float32)

    def _encode_events(self, block: list[np.ndarray]) -> np.ndarray:
        """(chunks, crops, D) from the counts of each chunk."""
        options = self.options
        counts = cut_windows(np.stack(block), options.crops, self.size)
        images = normalise_counts(counts, options.event_scope, options.event_empty)
        features = self.encoder.encode_events(images.reshape(-1, *images.shape[2:]))
        return features.reshape(len(block), len(options.crops), -1)

    def _no_rows(self) -> np.ndarray:
        return np.empty((len(self.options.crops), 0, self.encoder.dim), np.float32)
