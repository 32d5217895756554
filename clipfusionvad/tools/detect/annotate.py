"""Write a copy of a video with its score curve below the picture and the class of the current segment in it."""

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from clipfusionvad.extraction.decode import BrokenVideo, read_frames
from clipfusionvad.io.files import atomic_write
from clipfusionvad.report.fonts import font_file
from clipfusionvad.tools.detect.page import Detection, class_line

# RGB.
CALM, WHITE = (90, 140, 190), (255, 255, 255)
GROUND: tuple[int, ...] = (24, 24, 28)
_TICK = Fraction(1, 90_000)


def write_annotated(path: Path, source: str | Path, found: Detection) -> None:
    """Write an H.264 mp4 that every browser plays, without sound and without an odd last row or column."""
    with atomic_write(path) as file, av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(found.info.fps).limit_denominator(100_000))
        stream.codec_context.time_base = _TICK
        pts = -1
        for index, frame in enumerate(_annotated(source, found)):
            if index == 0:
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            # The curve of the page is in the times of the original.
            picture.pts, picture.time_base = max(pts + 1, round(found.times[index] / _TICK)), _TICK
            pts = picture.pts
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _annotated(source: str | Path, found: Detection) -> Iterator[np.ndarray]:
    strip: np.ndarray | None = None
    with contextlib.suppress(BrokenVideo):
        for index, frame in enumerate(islice(read_frames(source), found.frames)):
            even = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
            if strip is None:
                strip = draw_strip(found, even.shape[1], max(16, even.shape[0] // 12 * 2))
                size = even.shape[1::-1]
            # A video may change its size; a stream of an mp4 may not.
            even = even if even.shape[1::-1] == size else cv2.resize(even, size)
            below, column = strip.copy(), int(index / found.frames * strip.shape[1])
            below[:, column : column + 2] = WHITE
            yield np.concatenate([_labelled(even, found, index), below])


def draw_strip(found: Detection, width: int, height: int) -> np.ndarray:
    """Draw the whole score curve as columns, those of segments in the class's colour: (height, width, 3) uint8."""
    frames = (np.arange(width) + 0.5) * found.frames / width
    snippet = np.searchsorted(found.bounds, frames, side="right") - 1
    level = np.ceil(found.anomaly[snippet] * height)
    colours = np.tile(CALM, (width, 1))
    for segment in found.segments:
        inside = (frames >= segment.start_frame) & (frames < segment.end_frame)
        colours[inside] = ImageColor.getrgb(found.colour_of(segment, dark=True))
    filled = np.arange(height, 0, -1)[:, None] <= level
    return np.where(filled[..., None], colours, GROUND).astype(np.uint8)


def _labelled(frame: np.ndarray, found: Detection, index: int) -> np.ndarray:
    snippet = int(np.searchsorted(found.bounds, index, side="right")) - 1
    text, ground = f"anomaly score {found.anomaly[snippet]:.2f}", GROUND
    if segment := next((one for one in found.segments if one.start_frame <= index < one.end_frame), None):
        text, ground = f"{text}\nclass {class_line(segment)}", ImageColor.getrgb(found.colour_of(segment))
    label = _label(text, ground, max(10, frame.shape[0] // 20))[: frame.shape[0], : frame.shape[1]]
    frame = frame.copy()
    frame[: label.shape[0], : label.shape[1]] = label
    return frame


@lru_cache(maxsize=8)
def _label(text: str, ground: tuple[int, ...], size: int) -> np.ndarray:
    """Return white text on a ground as a picture (h, w, 3) uint8."""
    font = ImageFont.truetype(font_file(text), size)
    right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((6, 4), text, font)[2:]
    picture = Image.new("RGB", (round(right) + 6, round(bottom) + 4), ground)
    ImageDraw.Draw(picture).text((6, 4), text, WHITE, font)
    return np.asarray(picture)
