"""Live streams: frames as they arrive, scored snippet by snippet in bounded time and memory; logs of scores and alerts.

Frames come from files that grow, standard input, cameras and network streams. They are scored in the consecutive
windows of a test, the last one again as snippets arrive, until it is complete. D width of a row, C classes.
"""

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO, TypeVar

import av
import numpy as np
from tqdm import tqdm

from clipfusionvad.extraction.decode import (
    VideoInfo,
    batched,
    decode,
    error_reason,
    index_is_last,
    is_address,
    missing_bytes,
    open_video,
)
from clipfusionvad.extraction.snippets import to_canvas
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_writable, without_nan
from clipfusionvad.metrics.segments import Alert, OnlineSegments, Span, Thresholds
from clipfusionvad.tools.detect.config import CHUNK
from clipfusionvad.tools.detect.model import DetectionModel
from clipfusionvad.tools.detect.page import DIGITS, class_line, short_clock

Item = TypeVar("Item")
SCORES, ALERTS = "scores.jsonl", "alerts.jsonl"
# Seconds between two checks of a file that has not grown.
_PAUSE = 0.1
# Seconds between attempts to connect: twice as long each time, up to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0


class Chunk(NamedTuple):
    """Consecutive frames as canvases, the number of the chunk, and the seconds of the frames since the start."""

    number: int
    frames: list[np.ndarray]
    times: list[float]


@dataclass
class StreamSource:
    """Where frames come from. ``timeout`` seconds without data end the stream; 0: no limit.

    ``input_format`` is ffmpeg's name of a format that it cannot detect; ``fps`` replaces the times of the source;
    ``report`` gets a line about interruptions.
    """

    name: str
    timeout: float = 30.0
    input_format: str | None = None
    fps: float | None = None
    report: Callable[[str], object] = lambda line: tqdm.write(line, sys.stderr)
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        device = self.input_format is not None and self.name != "-" and not Path(self.name).is_file()
        # A live source sets the pace: frames that are not read in time are lost.
        self.live = is_address(self.name) or device
        self._last_data, self._endless = time.monotonic(), True
        # Seconds of the frames that no chunk has yet; when the next connection's first frame comes.
        self._times, self._next = list[float](), 0.0

    def chunks(self, size: int, on_info: Callable[[VideoInfo], object]) -> Iterator[Chunk]:
        """Yield ``size`` frames at a time; their times go on where the last connection ended."""
        for number, frames in enumerate(batched(map(to_canvas, self.frames(on_info)), size)):
            times, self._times = self._times, []
            yield Chunk(number, frames, times)

    def frames(self, on_info: Callable[[VideoInfo], object]) -> Iterator[np.ndarray]:
        """Yield RGB uint8 (H, W, 3), upright; ``on_info`` is called before the first frame of each connection.

        Damaged frames are left out. Raises ``UserError`` without any frame.
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
        seen, start, infos = False, self._next, list[VideoInfo]()

        def begin(info: VideoInfo) -> None:
            infos.append(info)
            on_info(info)

        def on_time(seconds: float) -> None:
            self._times.append(start + seconds)
            self._next = start + seconds + 1 / infos[0].fps

        with open_video(self.name, file, self.input_format) as (container, stream):
            # A recording has a length; connecting again would replay it.
            self._endless = container.duration is None
            try:
                for frame in decode(self.name, container, stream, begin, on_time, self.fps, live=True):
                    seen = True
                    yield frame
                    if self.stop.is_set():
                        return
            except (av.error.FFmpegError, OSError) as error:
                self.report(f"{self.name} breaks off ({error_reason(error)})")
        if not seen and not self.stop.is_set():
            raise UserError(f"{self.name} holds no frame that can be decoded")


def keep_up(items: Iterable[Item], stop: threading.Event, waiting: int = 8) -> Iterator[Item]:
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


def watch(source: StreamSource, model: DetectionModel, thresholds: Thresholds, folder: Path, every: float) -> None:
    """Score a source until it ends or is stopped, and append the scores to the logs in ``folder``."""
    infos: list[VideoInfo] = []
    length = model.frames_per_snippet
    size = length if length > 1 else CHUNK
    arriving = source.chunks(size, infos.append)
    chunks = keep_up(arriving, source.stop) if source.live else arriving
    first = next(chunks, None)
    if first is None:
        if source.stop.is_set():
            return
        raise UserError(f"{source.name} ended before its first frame")
    count, last = len(first.times), first.times[-1]
    info = infos[0].measured(count, infos[0].end(count, last))
    rows = _rows(chain([first], chunks), model, size, infos[0])
    windows = score_windows(rows, model.score, model.model.sampling.length, every)
    head = {"stream": source.name, "started": _now(), "fps": info.fps, "times": info.times}
    head |= {"frames_per_snippet": length, "video": asdict(info)}
    write_logs(windows, folder, head, model.labels, thresholds)
    print(f"results in {folder}: {SCORES}, {ALERTS}")


def _rows(
    chunks: Iterable[Chunk], model: DetectionModel, size: int, info: VideoInfo
) -> Iterator[tuple[np.ndarray, list[Span]]]:
    """Yield rows (n, D) and spans of the snippets that each chunk completes; chunk i starts with frame i · size."""
    waiting = deque[Span]()

    def frames() -> Iterator[list[np.ndarray]]:
        for number, chunk, times in chunks:
            begin, count, length = number * size, len(chunk), model.frames_per_snippet
            seconds = [*times, info.end(begin + count, times[-1])]
            for start in range(0, count, length):
                end = min(start + length, count)
                waiting.append(Span(begin + start, begin + end, seconds[start], seconds[end]))
            yield chunk

    for rows in model.rows(frames(), live=True):
        yield rows, [waiting.popleft() for _ in rows]


class WindowScores(NamedTuple):
    """Scores of n snippets of the current window, of which the last ``new`` are scored for the first time."""

    spans: list[Span]
    anomaly: np.ndarray
    classes: np.ndarray | None
    new: int
    final: bool


def score_windows(
    batches: Iterable[tuple[np.ndarray, list[Span]]],
    score: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]],
    length: int,
    every: float = 0.0,
) -> Iterator[WindowScores]:
    """Turn rows (n, D) and spans that arrive in batches into scores; only the rows of one window are kept.

    ``score`` scores the rows of one window; a window is ``length`` rows, scored every ``every`` seconds. If the
    sampling spreads over a whole video, each window is scored as its own video.
    """
    rows, spans, scored = list[np.ndarray](), list[Span](), 0

    def scores(count: int, final: bool) -> WindowScores:
        anomaly, classes = score(np.stack(rows[:count]))
        part = slice(0 if final else scored, count)
        classes = None if classes is None else classes[part]
        return WindowScores(spans[part], anomaly[part], classes, count - scored, final)

    for more, theirs in batches:
        if spans and theirs and spans[-1].end_frame == theirs[0].start_frame:
            # Not known when that snippet arrived.
            spans = [*spans[:-1], spans[-1]._replace(end=theirs[0].start)]
        rows, spans = [*rows, *more], [*spans, *theirs]
        while len(rows) >= length:
            yield scores(length, final=True)
            rows, spans, scored = rows[length:], spans[length:], 0
        if len(rows) > scored and spans[-1].end - spans[scored].start >= every:
            yield scores(len(rows), final=False)
            scored = len(rows)
    if rows:
        yield scores(len(rows), final=True)


def write_logs(
    windows: Iterable[WindowScores], folder: Path, head: dict[str, Any], labels: Sequence[str], thresholds: Thresholds
) -> None:
    """Append the scores and the alerts of a session to the logs, and print the alerts; ``head`` is its first line."""
    for name in (SCORES, ALERTS):
        check_writable(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    online, snippets, missed, alarms = OnlineSegments(labels, thresholds), 0, 0.0, 0
    before = Span(0, 0, 0.0, 0.0)
    with (
        open(folder / SCORES, "a", encoding="utf-8") as scores,
        open(folder / ALERTS, "a", encoding="utf-8") as alerts,
        tqdm(desc="snippets", unit="", disable=None, leave=False) as bar,
    ):
        _write(scores, head | {"thresholds": asdict(thresholds)})
        for window in windows:
            found: list[Alert] = []
            for row, span in enumerate(window.spans):
                anomaly = float(window.anomaly[row])
                line: dict[str, Any] = {"start": round(span.start, DIGITS), "end": round(span.end, DIGITS)}
                line |= {"start_frame": span.start_frame, "end_frame": span.end_frame, "anomaly": anomaly}
                classes = None if window.classes is None else window.classes[row]
                if classes is not None:
                    line["classes"] = dict(zip(labels, classes.tolist(), strict=True))
                _write(scores, line | {"final": window.final})
                if row >= len(window.spans) - window.new:
                    if span.start_frame > before.end_frame:
                        if not missed:
                            when = short_clock(before.end)
                            tqdm.write(f"{when}  scoring is slower than the source: snippets are left out")
                        missed += span.start - before.end
                    snippets, before = snippets + 1, span
                    found += online.add(span, anomaly, classes)
            scores.flush()
            alarms += _report(found, alerts)
            bar.update(window.new)
        alarms += _report(online.finish(), alerts)
    left_out = f", {short_clock(missed)} left out" if missed else ""
    print(f"{snippets} snippets, {short_clock(before.end)}{left_out}; {alarms} alerts")


def _report(alerts: Sequence[Alert], log: TextIO) -> int:
    """Write and print alerts; return the number of those that start."""
    for alert in alerts:
        segment = alert.segment
        _write(log, {"alert": alert.kind, "at": _now()} | asdict(segment))
        log.flush()
        start, name = short_clock(segment.start), class_line(segment)
        if alert.kind == "start":
            tqdm.write(f"{start}  start  {name}, anomaly score {segment.confidence:.2f}")
        else:
            mean = f"anomaly score {segment.confidence:.2f}, highest {segment.peak:.2f}"
            tqdm.write(f"{short_clock(segment.end)}  end    {name}, since {start}, {mean}")
    return sum(alert.kind == "start" for alert in alerts)


def _write(file: TextIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(without_nan(line)) + "\n")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")
