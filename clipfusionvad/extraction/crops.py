"""The ten crops of the released features, and CLIP's own single crop."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from clipfusionvad.io.errors import UserError

SIZE = 224
#: Width and height to which the released code resized frames; the aspect ratio is not kept.
CANVAS = (340, 256)
#: Crops of CLIP's own preprocessing: the centre and its mirror image.
CENTRE_CROPS = (0, 5)


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


def check_crops(crops: Sequence[int], resize: str) -> None:
    """Raise ``UserError`` for crop numbers that do not exist, or not for this way of resizing."""
    if not crops or len(set(crops)) != len(crops) or not set(crops) <= set(range(10)):
        raise UserError(f"crops must be different numbers from 0 to 9, not {', '.join(map(str, crops)) or 'none'}")
    if resize == "clip" and not set(crops) <= set(CENTRE_CROPS):
        raise UserError("CLIP's own preprocessing has crop 0 and its mirror image 5 only; the others need 'released'")
