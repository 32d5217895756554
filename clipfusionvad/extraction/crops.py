"""Pictures for the encoder: the ten crops of the released features, CLIP's own single crop, synthetic event images."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

SIZE = 224
#: Width and height to which the released code resized frames; the aspect ratio is not kept.
CANVAS = (340, 256)
# Weights of R, G and B in ten-thousandths: with whole numbers, float32 arithmetic is exact.
_GREY, _UNIT = np.array([2989, 5870, 1140], np.float32), 10_000


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

    0 centre, 1 top left, 2 top right, 3 bottom left, 4 bottom right; 5 to 9 are their mirror images (released code
    of IEF-VAD).
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
    nothing moves, ``empty`` "zero" gives a black image; "nan" gives 0 / 0 = NaN, as the released scripts for UCF-Crime,
    ShanghaiTech and MSAD did.
    """
    highest = counts.max(axis=(0, 2, 3) if scope == "block" else (2, 3), keepdims=True).astype(np.float32)
    with np.errstate(invalid="ignore"):
        return counts / (np.maximum(highest, 1) if empty == "zero" else highest)
