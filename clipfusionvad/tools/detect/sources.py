"""Frames of a live stream: files that grow, standard input, cameras, network streams."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from clipfusionvad.extraction.decode import (
    VideoInfo,
    error_reason,
    index_is_last,
    is_address,
    missing_bytes,
    open_video,
    upright,
    video_info,
)
from clipfusionvad.io.errors import UserError
from clipfusionvad.tools.detect.detect import Chunk

STDIN = "-"
# Seconds between two checks of a file that has not grown.
_PAUSE = 0.1
# Seconds between attempts to connect: twice as long each time, up to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
# Chunks that may wait for a scorer that is slower than a live source.
_WAITING = 8


@dataclass(frozen=True)
class StreamSource:
    """Where frames come from. ``timeout`` seconds without data end the stream; 0: no limit.

    ``input_format`` is ffmpeg's name of a format that it cannot detect. ``report`` gets a line about every
    interruption; setting ``stop`` ends the stream soon.
    """

    name: str
    timeout: float = 30.0
    input_format: str | None = None
    report: Callable[[str], object] = lambda line: None
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def live(self) -> bool:
        """Whether the source sets the pace, so that frames that are not read in time are lost."""
        device = self.input_format is not None and self.name != STDIN and not Path(self.name).is_file()
        return is_address(self.name) or device

    def frames(self, on_info: Callable[[VideoInfo], object]) -> Iterator[np.ndarray]:
        """Yield RGB uint8 (H, W, 3), upright; ``on_info`` is called before the first frame of each connection.

        Damaged frames are left out. Raises ``UserError`` if there is no frame at all.
        """
        if self.live:
            yield from self._reconnecting(on_info)
            return
        stdin: Any = sys.stdin.buffer
        file = _ForwardOnly(stdin.read1) if self.name == STDIN else self._growing(Path(self.name))
        yield from self._decode(file, lambda info, endless: on_info(info))

    def _growing(self, path: Path) -> Any:
        """Return what to open: the name of a file that must be complete, else a reader that waits for more data."""
        timer = Timer(self.timeout, self.stop)
        while not path.is_file() or path.stat().st_size == 0 or (index_is_last(path) and not self._is_complete(path)):
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is not a file, camera or address")
            if not timer.wait():
                raise UserError(f"{path} is not a video yet: an .mp4 with its index at the end must be complete")
        if index_is_last(path):
            return str(path)
        return _ForwardOnly(GrowingFile(open(path, "rb", buffering=0), self.timeout, self.stop).read)

    def _is_complete(self, path: Path) -> bool:
        try:
            with open_video(path):
                return not missing_bytes(path)
        except UserError:
            return False

    def _reconnecting(self, on_info: Callable[[VideoInfo], object]) -> Iterator[np.ndarray]:
        timer, pause, seen, replays = Timer(self.timeout, self.stop), _FIRST_PAUSE, False, False

        def note(info: VideoInfo, endless: bool) -> None:
            nonlocal replays
            replays = not endless
            on_info(info)

        while not self.stop.is_set():
            reason = "the stream ended"
            try:
                for frame in self._decode(self.name, note):
                    timer.restart()
                    pause, seen = _FIRST_PAUSE, True
                    yield frame
            except UserError as error:
                reason = str(error)
            if replays or not timer.wait(pause):
                break
            self.report(f"{self.name}: {reason}; connecting again")
            pause = min(2 * pause, _LONGEST_PAUSE)
        if not seen and not self.stop.is_set():
            raise UserError(reason)

    def _decode(self, file: Any, on_info: Callable[[VideoInfo, bool], object]) -> Iterator[np.ndarray]:
        """Yield the frames of one connection; ``on_info`` also gets whether the stream has no end."""
        with open_video(self.name, file, self.input_format) as (container, stream):
            # Frame threads would each delay a frame.
            stream.thread_type = "SLICE"
            first = True
            for frame in self._tolerant(container, stream):
                image = upright(frame)
                if first:
                    on_info(video_info(self.name, stream, image), container.duration is None)
                    first = False
                yield image
            if first and not self.stop.is_set():
                raise UserError(f"{self.name} holds no frame that can be decoded")

    def _tolerant(self, container: Any, stream: Any) -> Iterator[Any]:
        """Yield the frames of all packets that can be decoded: a stream that is joined late starts with others."""
        packets = container.demux(stream)
        while not self.stop.is_set():
            try:
                packet = next(packets, None)
            except (av.error.FFmpegError, OSError) as error:
                self.report(f"{self.name} breaks off ({error_reason(error)})")
                return
            if packet is None:
                return
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue
            yield from frames


class Timer:
    """The time since the last data, with a limit in seconds (0: none)."""

    def __init__(self, limit: float, stop: threading.Event):
        self.limit, self.stop = limit, stop
        self.restart()

    def restart(self) -> None:
        self.since = time.monotonic()

    def wait(self, pause: float = _PAUSE) -> bool:
        """Wait a little and return True; return False if the limit is reached or the stream is stopped."""
        if self.limit and time.monotonic() - self.since > self.limit:
            return False
        return not self.stop.wait(pause)


class GrowingFile:
    """Reads a file to its end, and waits there for more data."""

    def __init__(self, file: BinaryIO, timeout: float, stop: threading.Event):
        self.file, self.timeout, self.stop = file, timeout, stop

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes, none if the file has not grown within the time limit."""
        timer = Timer(self.timeout, self.stop)
        while not (data := self.file.read(size)) and timer.wait():
            pass
        return data


@dataclass(frozen=True)
class _ForwardOnly:
    """A file without ``seek``, so that ffmpeg does not look for its end first."""

    read: Callable[[int], bytes]


def keep_up(chunks: Iterable[Chunk], stop: threading.Event, waiting: int = _WAITING) -> Iterator[Chunk]:
    """Yield chunks that a thread reads; if more than ``waiting`` wait, the oldest are left out."""
    queue: deque[Chunk] = deque(maxlen=waiting)
    arrived = threading.Event()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            for chunk in chunks:
                queue.append(chunk)
                arrived.set()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    while not stop.is_set():
        ended = not thread.is_alive()
        if queue:
            yield queue.popleft()
        elif ended:
            if errors:
                raise errors[0]
            return
        else:
            # With a timeout, because neither a signal nor the end of the thread ends the wait.
            arrived.wait(_PAUSE)
            arrived.clear()
