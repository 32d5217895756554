"""Read videos frame by frame with PyAV: any container, codec, size and frame rate that ffmpeg reads."""

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.format import Flags
from av.stream import Disposition

from clipfusionvad.extraction.pictures import files_of, is_pictures, read_picture
from clipfusionvad.io.errors import UserError

#: Assumed for a file that declares no frame rate; ffmpeg's own value for raw streams.
DEFAULT_FPS = 25.0
_CAMERA = "/dev/video"
# Where the times of frames come from.
TIMESTAMPS, FRAME_RATE = "timestamps", "frame rate"
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067


@dataclass(frozen=True)
class VideoInfo:
    """Metadata of a video: width and height of upright frames, frames by the container's header, None without one.

    ``fps`` is the announced rate. ``times`` says where the seconds of frames come from: timestamps or frame rate.
    """

    path: str
    fps: float
    frames: int | None
    width: int
    height: int
    codec: str
    times: str = FRAME_RATE

    def end(self, frames: int, last: float) -> float:
        """Return when a video of so many frames ends, the last one at ``last``: it lasts as long as the mean frame."""
        return last + (last / (frames - 1) if last else 1 / self.fps)

    def measured(self, frames: int, seconds: float) -> "VideoInfo":
        """Return the same with the mean rate if the announced one misses the length by a frame or more."""
        wrong = abs(frames - seconds * self.fps) >= 1
        return replace(self, fps=frames / seconds) if wrong else self


class BrokenVideo(UserError):
    """A video that cannot be decoded to its end."""


def is_address(source: str | Path) -> bool:
    """Return whether a source is a URL or a camera rather than a file."""
    return "://" in str(source) or str(source).startswith(_CAMERA)


def read_frames(
    source: str | Path,
    on_info: Callable[[VideoInfo], object] | None = None,
    on_time: Callable[[float], object] | None = None,
    fps: float | None = None,
) -> Generator[np.ndarray, None, None]:
    """Yield every frame of a video in presentation order: RGB uint8 (H, W, 3), upright.

    A variable frame rate neither duplicates nor drops frames; OpenCV reads the same ones. ``on_info`` gets the
    metadata before the first frame, and ``on_time`` the seconds of every frame since the first one: those of its
    timestamp, else of the announced rate; those of ``fps`` if it is given. Memory does not grow with the length.

    Raises ``UserError`` if the source does not exist or is not a video, and ``BrokenVideo`` where decoding fails: at
    damaged data, at the end of a truncated file, or at the start of a video without any frame.
    """
    if is_pictures(source):
        yield from _read_pictures(source, on_info, on_time, fps or DEFAULT_FPS)
        return
    path, local = Path(source), not is_address(source)
    if local and path.is_dir():
        raise UserError(f"{path} is a folder, not a video")
    if local and not path.exists():
        raise UserError(f"video not found: {path}")
    if local and path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    count, reason = 0, ""
    with open_video(source) as (container, stream):
        try:
            for frame in decode(source, container, stream, on_info, on_time, fps):
                count += 1
                yield frame
        except (av.error.FFmpegError, OSError) as error:
            reason = error_reason(error)
        else:
            if count == 0:
                raise BrokenVideo(f"{source} holds no frame that can be decoded")
            missing = missing_bytes(source) if local else 0
            if missing and not (stream.frames and count >= stream.frames):
                reason = f"the file lacks at least {missing} bytes: copy it again"
        if reason:
            expected = f" of {stream.frames}" if stream.frames else ""
            raise BrokenVideo(f"{source} breaks off after {count}{expected} frames ({reason})")


def _read_pictures(
    source: str | Path,
    on_info: Callable[[VideoInfo], object] | None,
    on_time: Callable[[float], object] | None,
    fps: float,
) -> Iterator[np.ndarray]:
    if not (files := files_of(source)):
        raise UserError(f"video not found: {source}")
    for index, file in enumerate(files):
        try:
            frame = read_picture(file)
        except OSError as error:
            raise BrokenVideo(f"{source} breaks off after {index} of {len(files)} frames ({error})") from error
        if on_info and index == 0:
            height, width = frame.shape[:2]
            on_info(VideoInfo(str(source), fps, len(files), width, height, file.suffix[1:].lower()))
        if on_time:
            on_time(index / fps)
        yield frame


def batched(frames: Iterable[np.ndarray], size: int) -> Generator[list[np.ndarray], None, None]:
    """Yield ``size`` frames at a time; the last list may be shorter."""
    rest = iter(frames)
    while batch := list(islice(rest, size)):
        yield batch


@contextlib.contextmanager
def open_video(source: str | Path, file: Any = None, input_format: str | None = None) -> Iterator[tuple[Any, Any]]:
    """Open a file, an address, a camera, or the open ``file``: yield the container and its first video stream.

    ``input_format`` is ffmpeg's name of a format that it cannot detect. A cover image does not count as a stream.
    """
    path, options = str(source), dict[str, Any]()
    if input_format or path.startswith(_CAMERA):
        options["format"] = input_format or "v4l2"
    if "://" in path:
        options["timeout"] = 10.0  # seconds without data that close a connection
    if path.startswith("rtsp"):
        options["options"] = {"rtsp_transport": "tcp"}
    try:
        container = av.open(file or path, metadata_errors="replace", **options)
    except (av.error.FFmpegError, OSError) as error:
        # The index of an MP4 file is written last.
        unfinished = Path(path).is_file() and next(_boxes(path), (b"", 0))[0] == b"ftyp"
        hint = "; an MP4 without its index: cut off, or not finished yet" if unfinished else ""
        raise UserError(f"{path} is not a video that can be read ({error_reason(error)}{hint})") from error
    with container:
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams:
            raise UserError(f"{source} has no video stream")
        yield container, streams[0]


def decode(
    source: str | Path,
    container: Any,
    stream: Any,
    on_info: Callable[[VideoInfo], object] | None,
    on_time: Callable[[float], object] | None = None,
    fps: float | None = None,
    live: bool = False,
) -> Iterator[np.ndarray]:
    """Yield the frames of an open stream, rotated as their display matrices say, after ``on_info`` and ``on_time``.

    ``live``: no frame is delayed, and damaged ones are left out; a stream that is joined late starts with such.
    """
    # Decoding several frames in parallel is fastest, but each thread delays a frame.
    stream.thread_type = "SLICE" if live else "AUTO"
    # For a raw stream ffmpeg makes up an average rate and timestamps; the stream's own header may know the rate.
    raw, times = bool(container.format.flags & Flags.no_timestamps.value), None
    for packet in _packets(container, stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if not live:
                raise
            continue
        for frame in frames:
            image = frame.to_ndarray(format="rgb24")
            if quarters := round(frame.rotation / 90) % 4:
                image = np.ascontiguousarray(np.rot90(image, quarters))
            if times is None:
                rates = [stream.average_rate, stream.guessed_rate]
                rate = float(fps or next(filter(None, reversed(rates) if raw else rates), DEFAULT_FPS))
                rate = rate if math.isfinite(rate) else DEFAULT_FPS
                stamped = not (raw or fps or frame.pts is None) and stream.time_base
                times = _FrameTimes(rate, stream.time_base if stamped else None)
                if on_info:
                    facts = stream.frames or None, image.shape[1], image.shape[0], stream.codec_context.name
                    on_info(VideoInfo(str(source), rate, *facts, TIMESTAMPS if stamped else FRAME_RATE))
            if on_time:
                on_time(times.of(frame.pts))
            yield image


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the packets of a stream; an empty one is the last."""
    ended = False
    while not ended:
        # PyAV stumbles over a stream that begins later, such as sound in FLV: only its packet is lost.
        with contextlib.suppress(IndexError):
            for packet in container.demux(stream):
                ended = packet.size == 0
                yield packet
            return


class _FrameTimes:
    """Seconds of frames since the first one, by timestamps in units of ``base``, or by the rate if it is None."""

    def __init__(self, fps: float, base: Fraction | None):
        self.fps, self.base = fps, base
        self.frames, self.last, self.origin = 0, 0.0, 0

    def of(self, pts: int | None) -> float:
        """Return the time of the next frame; time neither stands still nor goes back."""
        time = following = self.last + 1 / self.fps if self.frames else 0.0
        if self.base is None:
            time = self.frames / self.fps
        elif pts is not None:
            since = (pts - self.origin) * self.base.numerator / self.base.denominator
            # The clock starts anew where recordings were joined.
            if not self.frames or since < self.last - 1:
                self.origin = pts - round(following / self.base)
                since = following
            time = since if since > self.last else following
        self.frames, self.last = self.frames + 1, time
        return time


def error_reason(error: Exception) -> str:
    """Return what ffmpeg or the system says about an error."""
    return (getattr(error, "strerror", None) or str(error)).strip().rstrip(".")


def missing_bytes(path: str | Path) -> int:
    """Return the bytes that a truncated file lacks by its own outermost structure; 0 if none are known to lack.

    Knows MP4 and QuickTime, AVI, and Matroska with WebM. Other containers, such as MPEG streams, may end anywhere.
    """
    end = 0
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            end = 8 + int.from_bytes(head[4:8], "little")
        elif head[:4] == _EBML.to_bytes(4, "big"):
            end = _matroska_end(file)
        elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            end = max(end for _, end in _boxes(path))
    return max(0, end - Path(path).stat().st_size)


def index_is_last(path: str | Path) -> bool:
    """Return whether this is an MP4 file whose data comes before its index, or whose index is not written yet."""
    small = (b"ftyp", b"free", b"skip", b"wide", b"uuid")
    return next((kind for kind, _ in _boxes(path) if kind not in small), b"") == b"mdat"


def _boxes(path: str | Path) -> Iterator[tuple[bytes, int]]:
    """Yield kind and end of each MP4 box that starts within the file; a box of unknown length ends with the file."""
    position, size = 0, Path(path).stat().st_size
    with open(path, "rb") as file:
        while position + 8 <= size:
            file.seek(position)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1 and len(head) == 16:
                length = int.from_bytes(head[8:], "big")
            position = position + length if length >= 8 else size
            yield head[4:8], position


def _matroska_end(file: BinaryIO) -> int:
    """Return where the segment after the header ends; 0 if that is unknown, as in a live recording."""
    position = 0
    for wanted in (_EBML, _SEGMENT):
        file.seek(position)
        head = file.read(12)
        if len(head) < 12 or int.from_bytes(head[:4], "big") != wanted or not head[4]:
            return 0
        width = 9 - head[4].bit_length()
        unknown = (1 << 7 * width) - 1
        length = int.from_bytes(head[4 : 4 + width], "big") & unknown
        if length == unknown:
            return 0
        position += 4 + width + length
    return position
