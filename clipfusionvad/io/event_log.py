"""Append to text and TensorBoard records; a failed write is one clear line, not the traceback of a late thread."""

import os
import socket
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from clipfusionvad.io.files import write_text, writing


class _Appended:
    """A file open for appending; nothing is lost once ``flush`` has returned."""

    def __init__(self, path: Path):
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")

    def flush(self) -> None:
        with writing(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with writing(self.path):
            self._file.close()


class AppendedText(_Appended):
    """A text file whose content is replaced by ``text`` and then grows; ``crc32`` is that of all of it."""

    def __init__(self, path: Path, text: str):
        write_text(path, text)
        super().__init__(path)
        self.size, self.crc32 = len(text.encode()), zlib.crc32(text.encode())

    def write(self, text: str) -> None:
        content = text.encode()
        with writing(self.path):
            self._file.write(content)
        self.size, self.crc32 = self.size + len(content), zlib.crc32(content, self.crc32)


class Curves(_Appended):
    """A file of TensorBoard events, which replaces the events after ``step`` in other files of its folder."""

    def __init__(self, folder: Path, step: int):
        stamp = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        super().__init__(folder / f"events.out.tfevents.{stamp}")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each of some curves at a step."""
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=points)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with writing(self.path):
            self._records.write(event.SerializeToString())
