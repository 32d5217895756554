"""Frames of what goes on: files that grow, standard input, cameras, network streams."""

from __future__ import annotations

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

from clipfusionvad.extraction.crops import to_canvas
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

STDIN = "-"
# Seconds between looks at a file that has not grown.
_PAUSE = 0.1
# Seconds between attempts to connect: twice as long each time, up to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
# Chunks that may wait for a scorer that is slower than a live source.
_WAITING = 8


@dataclass(frozen=True)
class Source:
    """Where frames come from. ``timeout`` seconds without anything new end the stream; 0: nothing does.

    ``input_format`` is ffmpeg's name of a device's or stream's format where it cannot be told. ``tell`` gets a line
    about every break; ``stop`` ends the stream soon after it is set.
    """

    name: str
    timeout: float = 30.0
    input_format: str | None = None
    tell: Callable[[str], object] = lambda line: None
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def live(self) -> bool:
        """Whether frames come at a pace of their own and are lost where nobody takes them."""
        device = self.input_format is not None and self.name != STDIN and not Path(self.name).is_file()
        return is_address(self.name) or device

    def frames(self, on_info: Callable[[VideoInfo], object]) -> Iterator[np.ndarray]:
        """RGB uint8 (H, W, 3), upright; ``on_info`` is called before the first frame of each connection.

        Damaged frames are left out. Raises ``UserError`` where there never was a frame.
        """
        if self.live:
            yield from self._reconnecting(on_info)
            return
        if self.name == STDIN:
            stdin: Any = sys.stdin.buffer
            file = _OpenEnded(stdin.read1)
        else:
            file = self._growing(Path(self.name))
        yield from self._decode(file, lambda info, endless: on_info(info))

    def _growing(self, path: Path) -> Any:
        """What to open for a file: its name if it has to be complete, else a reader that waits for more of it."""
        waited = Waiting(self.timeout, self.stop)
        while not path.is_file() or path.stat().st_size == 0 or (index_is_last(path) and not _opens(path)):
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is no file, camera or address")
            if not waited.longer():
                raise UserError(f"{path} is no video yet: an .mp4 with its index at the end is one when complete")
        if index_is_last(path):
            return str(path)
        return _OpenEnded(GrowingFile(open(path, "rb", buffering=0), self.timeout, self.stop).read)

    def _reconnecting(self, on_info: Callable[[VideoInfo], object]) -> Iterator[np.ndarray]:
        waited, pause, seen, replays = Waiting(self.timeout, self.stop), _FIRST_PAUSE, False, False

        def note(info: VideoInfo, endless: bool) -> None:
            nonlocal replays
            replays = not endless
            on_info(info)

        while not self.stop.is_set():
            reason = "the stream ended"
            try:
                for frame in self._decode(self.name, note):
                    waited.restart()
                    pause, seen = _FIRST_PAUSE, True
                    yield frame
            except UserError as error:
                reason = str(error)
            if replays or not waited.longer(pause):
                break
            self.tell(f"{self.name}: {reason}; connecting again")
            pause = min(2 * pause, _LONGEST_PAUSE)
        if not seen and not self.stop.is_set():
            raise UserError(reason)

    def _decode(self, file: Any, on_info: Callable[[VideoInfo, bool], object]) -> Iterator[np.ndarray]:
        """Frames of one connection; ``on_info`` also hears whether the stream has no end."""
        with open_video(self.name, file, self.input_format) as (container, stream):
            # Threads that each take a frame would hold as many back.
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
        """Frames of all packets that can be decoded: who joins a stream late cannot decode the first ones."""
        packets = container.demux(stream)
        while not self.stop.is_set():
            try:
                packet = next(packets, None)
            except (av.error.FFmpegError, OSError) as error:
                self.tell(f"{self.name} breaks off ({error_reason(error)})")
                return
            if packet is None:
                return
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue
            yield from frames


class Waiting:
    """Time since something last happened, against a limit in seconds (0: none)."""

    def __init__(self, limit: float, stop: threading.Event):
        self.limit, self.stop = limit, stop
        self.restart()

    def restart(self) -> None:
        self.since = time.monotonic()

    def longer(self, pause: float = _PAUSE) -> bool:
        """Wait a little and return True, or return False where the limit is reached or the end is asked for."""
        if self.limit and time.monotonic() - self.since > self.limit:
            return False
        return not self.stop.wait(pause)


class GrowingFile:
    """Reads a file to its end, and waits there for more."""

    def __init__(self, file: BinaryIO, timeout: float, stop: threading.Event):
        self.file, self.timeout, self.stop = file, timeout, stop

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; none once the file has not grown for too long."""
        waited = Waiting(self.timeout, self.stop)
        while not (data := self.file.read(size)) and waited.longer():
            pass
        return data


@dataclass(frozen=True)
class _OpenEnded:
    """A file that can be read only forwards: nobody will look for its end first."""

    read: Callable[[int], bytes]


def _opens(path: Path) -> bool:
    if missing_bytes(path):
        return False
    try:
        with av.open(str(path), metadata_errors="replace"):
            return True
    except (av.error.FFmpegError, OSError):
        return False


@dataclass(frozen=True)
class Chunk:
    """Consecutive frames of a stream; ``first`` is the number of the first one."""

    first: int
    frames: list[np.ndarray]


def read_chunks(frames: Iterable[np.ndarray], size: int) -> Iterator[Chunk]:
    """Frames as crops are cut from them, so many at a time; the last ones may be fewer."""
    first, chunk = 0, []
    for frame in frames:
        chunk.append(to_canvas(frame))
        if len(chunk) == size:
            yield Chunk(first, chunk)
            first, chunk = first + size, []
    if chunk:
        yield Chunk(first, chunk)


def keep_up(chunks: Iterable[Chunk], stop: threading.Event, waiting: int = _WAITING) -> Iterator[Chunk]:
    """The same chunks, read by a thread; of those that wait too long for their turn the oldest are left out."""
    queue: deque[Chunk] = deque(maxlen=waiting)
    ready = threading.Condition()
    ended: list[BaseException | None] = []

    def read() -> None:
        error: BaseException | None = None
        try:
            for chunk in chunks:
                with ready:
                    queue.append(chunk)
                    ready.notify()
        except BaseException as raised:
            error = raised
        with ready:
            ended.append(error)
            ready.notify()

    threading.Thread(target=read, daemon=True).start()
    while not stop.is_set():
        with ready:
            # Woken now and then, since a signal does not end the wait.
            if not ready.wait_for(lambda: queue or ended, timeout=_PAUSE):
                continue
            chunk = queue.popleft() if queue else None
        if chunk is None:
            if ended[0] is not None:
                raise ended[0]
            return
        yield chunk
