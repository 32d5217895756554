"""Reading videos frame by frame with PyAV: any container, codec, size and frame rate that it knows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from clipfusionvad.extraction.truncation import missing_bytes
from clipfusionvad.io.errors import UserError

#: Assumed where a file announces no frame rate; ffmpeg's own value for raw streams.
DEFAULT_FPS = 25.0
# Seconds after which an address that sends nothing is given up.
_SILENCE = 10.0
_CAMERA = "/dev/video"


@dataclass(frozen=True)
class VideoInfo:
    """What a video says of itself; width and height are those of upright frames.

    ``frames`` is the count that the container announces, None where it announces none.
    """

    path: str
    fps: float
    frames: int | None
    width: int
    height: int
    codec: str


class BrokenVideo(UserError):
    """A video that cannot be decoded to its end; ``frames`` were read before."""

    def __init__(self, message: str, frames: int = 0):
        super().__init__(message)
        self.frames = frames


def is_address(source: str | Path) -> bool:
    """Whether a source is a URL or a camera rather than a file."""
    return "://" in str(source) or str(source).startswith(_CAMERA)


def probe(source: str | Path) -> VideoInfo:
    """What a video says of itself, and whether its first frame can be decoded.

    Raises ``UserError`` for what is not there, no video or without a picture.
    """
    found: list[VideoInfo] = []
    frames = read_frames(source, found.append)
    with contextlib.closing(frames):
        next(frames)
    return found[0]


def read_frames(
    source: str | Path, on_info: Callable[[VideoInfo], object] | None = None
) -> Generator[np.ndarray, None, None]:
    """Every frame of a video in the order of presentation: RGB uint8 (H, W, 3), turned upright.

    Frames come as they were decoded, none doubled or dropped for a variable frame rate, as OpenCV reads them.
    ``on_info`` is told about the video before the first frame. Memory does not grow with the length, and an
    address is read without delay.

    Raises ``UserError`` for what is not there or no video, and ``BrokenVideo`` where decoding breaks off: at
    damaged data, at the end of a truncated file, or at once where there is not a single frame.
    """
    count = 0
    with _open(source) as container:
        stream = video_stream(container, source)
        # Decoding several frames at once is fastest, but holds as many back.
        stream.thread_type = "SLICE" if is_address(source) else "AUTO"
        try:
            for frame in container.decode(stream):
                image = upright(frame)
                if count == 0 and on_info:
                    on_info(describe(source, stream, image))
                count += 1
                yield image
        except (av.error.FFmpegError, OSError) as error:
            raise _broken(source, stream, count, _reason(error)) from error
        if count == 0:
            raise BrokenVideo(f"{source} holds no frame that can be decoded")
        missing = 0 if is_address(source) else missing_bytes(source)
        if missing and not (stream.frames and count >= stream.frames):
            raise _broken(source, stream, count, f"the file lacks at least {missing} bytes: copy it again")


@contextlib.contextmanager
def _open(source: str | Path) -> Iterator[Any]:
    path, options = str(source), dict[str, Any]()
    if path.startswith(_CAMERA):
        options["format"] = "v4l2"
    elif is_address(source):
        options["timeout"] = _SILENCE
    elif Path(path).is_dir():
        raise UserError(f"{path} is a folder, not a video")
    elif not Path(path).exists():
        raise UserError(f"video not found: {path}")
    elif Path(path).stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    try:
        container = av.open(path, metadata_errors="replace", **options)
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{path} is not a video that can be read ({_reason(error)}{_hint(path)})") from error
    with container:
        yield container


def video_stream(container: Any, source: str | Path) -> Any:
    """The first stream of moving pictures; a recording's cover is none. Raises ``UserError`` where there is none."""
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise UserError(f"{source} has no video stream")
    return streams[0]


def upright(frame: Any) -> np.ndarray:
    """A decoded frame as RGB uint8 (H, W, 3), turned as its display matrix says."""
    image = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, quarters)) if quarters else image


def describe(source: str | Path, stream: Any, image: np.ndarray) -> VideoInfo:
    """What an open stream says of itself, its first upright frame being known."""
    rate = stream.average_rate or stream.guessed_rate
    fps = float(rate) if rate else DEFAULT_FPS
    height, width = image.shape[:2]
    codec = stream.codec_context.name
    return VideoInfo(
        str(source), fps if math.isfinite(fps) else DEFAULT_FPS, stream.frames or None, width, height, codec
    )


def _broken(source: str | Path, stream: Any, count: int, reason: str) -> BrokenVideo:
    announced = f" of {stream.frames}" if stream.frames else ""
    return BrokenVideo(f"{source} breaks off after {count}{announced} frames ({reason})", count)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).strip().rstrip(".")


def _hint(path: str) -> str:
    """More about a file that does not open: an MP4 has its index at the end, which a recording writes last."""
    if is_address(path):
        return ""
    with open(path, "rb") as file:
        return "; an MP4 without its index: cut off, or not finished yet" if file.read(8)[4:] == b"ftyp" else ""
