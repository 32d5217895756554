"""Synthetic event images: where and how often the brightness of a pixel changes (second stream of IEF-VAD)."""

import numpy as np

# Weights of R, G and B in ten-thousandths: with whole numbers, float32 arithmetic is exact.
_GREY = np.array([2989, 5870, 1140], np.float32)
_UNIT = 10_000


class EventCounter:
    """Count the events of one chunk frame by frame: (H, W) uint8.

    An event is a change of grey (0..255) by more than ``threshold`` between consecutive frames of the chunk, in either
    direction.
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
        """Return the chunk's counts, None without any frame; the next frame starts another chunk."""
        counts, self._counts, self._last = self._counts, None, None
        return counts


def normalise_counts(counts: np.ndarray, scope: str = "block", empty: str = "zero") -> np.ndarray:
    """Return event images (chunks, crops, H, W) float32 in 0..1 from the counts of one block.

    Each crop's counts are divided by their maximum: over the whole block, as released, or over each chunk. Where
    nothing moves, ``empty`` "zero" gives a black image; "nan" gives 0 / 0 = NaN, as the released scripts for UCF-Crime,
    ShanghaiTech and MSAD did.
    """
    axes = (0, 2, 3) if scope == "block" else (2, 3)
    highest = counts.max(axis=axes, keepdims=True).astype(np.float32)
    if empty == "zero":
        highest = np.maximum(highest, 1)
    with np.errstate(invalid="ignore"):
        return counts / highest
