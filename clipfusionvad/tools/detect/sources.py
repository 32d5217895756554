"""Frames of a live stream: files that grow, standard input, cameras, network streams."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import av
import numpy as np

from clipfusionvad.extraction.decode import (
    VideoInfo,
    decode,
    error_reason,
    index_is_last,
    is_address,
    missing_bytes,
    open_video,
)
from clipfusionvad.io.errors import UserError

Item = TypeVar("Item")
# Seconds between two checks of a file that has not grown.
_PAUSE = 0.1
# Seconds between attempts to connect: twice as long each time, up to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
# Chunks that may wait for a scorer that is slower than a live source.
_WAITING = 8


@dataclass
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

    def __post_init__(self) -> None:
        device = self.input_format is not None and self.name != "-" and not Path(self.name).is_file()
        # A live source sets the pace: frames that are not read in time are lost.
        self.live = is_address(self.name) or device
        self._last_data, self._endless = time.monotonic(), True

    def frames(self, on_info: Callable[[VideoInfo], object]) -> Iterator[np.ndarray]:
        """Yield RGB uint8 (H, W, 3), upright; ``on_info`` is called before the first frame of each connection.

        Damaged frames are left out. Raises ``UserError`` if there is no frame at all.
        """
        if self.live:
            yield from self._reconnecting(on_info)
        elif self.name == "-":
            stdin: Any = sys.stdin.buffer
            yield from self._decode(SimpleNamespace(read=stdin.read1), on_info)
        else:
            yield from self._decode(self._growing(Path(self.name)), on_info)

    def _wait(self, pause: float = _PAUSE) -> bool:
        """Wait a little and return True; return False if the time without data is over or the stream is stopped."""
        if self.timeout and time.monotonic() - self._last_data > self.timeout:
            return False
        return not self.stop.wait(pause)

    def _growing(self, path: Path) -> Any:
        """Return what to open: the name of a file that must be complete, else a reader that waits for more data."""
        self._last_data = time.monotonic()
        while not path.is_file() or path.stat().st_size == 0 or (index_is_last(path) and not self._is_complete(path)):
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is not a file, camera or address")
            if not self._wait():
                raise UserError(f"{path} is not a video yet: an .mp4 with its index at the end must be complete")
        if index_is_last(path):
            return str(path)
        file = open(path, "rb", buffering=0)

        def read(size: int) -> bytes:
            self._last_data = time.monotonic()
            while not (data := file.read(size)) and self._wait():
                pass
            return data

        # Without ``seek``, ffmpeg does not look for the end first.
        return SimpleNamespace(read=read)

    def _is_complete(self, path: Path) -> bool:
        try:
            with open_video(path):
                return not missing_bytes(path)
        except UserError:
            return False

    def _reconnecting(self, on_info: Callable[[VideoInfo], object]) -> Iterator[np.ndarray]:
        pause, seen, reason = _FIRST_PAUSE, False, ""
        self._last_data = time.monotonic()
        while not self.stop.is_set():
            reason = "the stream ended"
            try:
                for frame in self._decode(self.name, on_info):
                    self._last_data = time.monotonic()
                    pause, seen = _FIRST_PAUSE, True
                    yield frame
            except UserError as error:
                reason = str(error)
            if not self._endless or not self._wait(pause):
                break
            self.report(f"{self.name}: {reason}; connecting again")
            pause = min(2 * pause, _LONGEST_PAUSE)
        if not seen and not self.stop.is_set():
            raise UserError(reason)

    def _decode(self, file: Any, on_info: Callable[[VideoInfo], object]) -> Iterator[np.ndarray]:
        seen = False
        with open_video(self.name, file, self.input_format) as (container, stream):
            # A recording has a length; connecting again would replay it.
            self._endless = container.duration is None
            try:
                for frame in decode(self.name, container, stream, on_info, live=True):
                    seen = True
                    yield frame
                    if self.stop.is_set():
                        return
            except (av.error.FFmpegError, OSError) as error:
                self.report(f"{self.name} breaks off ({error_reason(error)})")
        if not seen and not self.stop.is_set():
            raise UserError(f"{self.name} holds no frame that can be decoded")


def keep_up(items: Iterable[Item], stop: threading.Event, waiting: int = _WAITING) -> Iterator[Item]:
    """Yield items that a thread reads; if more than ``waiting`` wait, the oldest are left out."""
    queue: deque[Item] = deque(maxlen=waiting)
    arrived = threading.Event()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            for item in items:
                queue.append(item)
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
