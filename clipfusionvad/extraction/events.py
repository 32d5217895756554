"""Synthetic event images: where, and how often, the brightness of a pixel changes (IEF-VAD's second stream)."""

from __future__ import annotations

from typing import Literal

import numpy as np

Scope = Literal["block", "chunk"]
Empty = Literal["zero", "nan"]
# Weights of R, G and B in ten-thousandths: whole numbers, so that float32 arithmetic on them is exact.
_GREY = np.array([2989, 5870, 1140], np.float32)
_UNIT = 10_000


class EventCounter:
    """Counts the events of one chunk, frame by frame: (H, W) uint8.

    An event is a change of grey (0..255) by more than ``threshold`` from one frame of the chunk to the next;
    its sign does not count.
    """

    def __init__(self, threshold: float):
        self.threshold = np.float32(threshold * _UNIT)
        self._last: np.ndarray | None = None
        self._counts: np.ndarray | None = None

    def add(self, canvas: np.ndarray) -> None:
        """Add the next frame of the chunk, (H, W, 3) uint8."""
        grey = canvas.astype(np.float32) @ _GREY
        if self._last is None:
            self._counts = np.zeros(grey.shape, np.uint8)
        else:
            self._counts += np.abs(grey - self._last) > self.threshold
        self._last = grey

    def take(self) -> np.ndarray | None:
        """The chunk's counts, None without any frame; the next frame starts another chunk."""
        counts, self._counts, self._last = self._counts, None, None
        return counts


def normalise_counts(counts: np.ndarray, scope: Scope = "block", empty: Empty = "zero") -> np.ndarray:
    """Event images (chunks, crops, H, W) float32 in 0..1 from counts of one block.

    Counts are divided by their maximum within a crop: over the whole block, as released, or over each chunk.
    Where nothing moves that is a division of nothing by nothing: ``empty`` "zero" gives a black image, "nan" what
    the released scripts for UCF-Crime, ShanghaiTech and MSAD wrote.
    """
    axes = (0, 2, 3) if scope == "block" else (2, 3)
    highest = counts.max(axis=axes, keepdims=True).astype(np.float32)
    if empty == "zero":
        highest = np.maximum(highest, 1)
    with np.errstate(invalid="ignore"):
        return counts / highest
