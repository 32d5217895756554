"""The ten crops of the released features, and CLIP's own single one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from clipfusionvad.io.errors import UserError

Resize = Literal["released", "clip"]
SIZE = 224
#: Width and height that the released features were cut from; the aspect is not kept.
CANVAS = (340, 256)
#: Crops that "clip" has: the centre and its mirror image.
CENTRE_CROPS = (0, 5)


def to_canvas(frame: np.ndarray, resize: Resize = "released", size: int = SIZE) -> np.ndarray:
    """What crops are cut from: a frame (H, W, 3) uint8 as (256, 340, 3), or for "clip" as (size, size, 3).

    "released": resized bilinearly whatever the aspect, as OpenCV does it. "clip": CLIP's own preprocessing, the
    shorter side bicubically to ``size`` and the centre of it. A canvas is its own canvas.
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

    0 centre, 1 top left, 2 top right, 3 bottom left, 4 bottom right; 5 to 9 are these mirrored left to right
    (released code of IEF-VAD).
    """
    down, right = canvases.shape[1] - size, canvases.shape[2] - size
    corners = [(down // 2, right // 2), (0, 0), (0, right), (down, 0), (down, right)]
    cut = np.empty((len(canvases), len(crops), size, size, *canvases.shape[3:]), canvases.dtype)
    for place, crop in enumerate(crops):
        top, left = corners[crop % 5]
        window = canvases[:, top : top + size, left : left + size]
        cut[:, place] = window[:, :, ::-1] if crop >= 5 else window
    return cut


def cut_crops(frames: Sequence[np.ndarray] | np.ndarray, crops: Sequence[int], resize: Resize) -> np.ndarray:
    """Crops of frames (n, H, W, 3) uint8: (n, len(crops), 224, 224, 3) uint8, by the numbers of ``cut_windows``."""
    check_crops(crops, resize)
    return cut_windows(np.stack([to_canvas(frame, resize) for frame in frames]), crops)


def check_crops(crops: Sequence[int], resize: Resize) -> None:
    """Raise ``UserError`` for crops that there are not, or not for this way of resizing."""
    if not crops or len(set(crops)) != len(crops) or not set(crops) <= set(range(10)):
        raise UserError(f"crops must be different numbers from 0 to 9, not {', '.join(map(str, crops)) or 'none'}")
    if resize == "clip" and not set(crops) <= set(CENTRE_CROPS):
        raise UserError("CLIP's own preprocessing has crop 0 and its mirror image 5 only; the others need 'released'")
