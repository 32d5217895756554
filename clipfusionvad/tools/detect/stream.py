"""Score a live stream snippet by snippet, in bounded time and memory, and log scores and alerts.

A stream is scored in the consecutive windows of a test. The last window is scored again as snippets arrive, so its
scores are provisional; those of a complete window are final. T snippets of a window, D width of a row.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from clipfusionvad.engine.evaluator import VideoScores
from clipfusionvad.extraction.decode import VideoInfo
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_writable, without_nan
from clipfusionvad.metrics.segments import Alert, OnlineSegments, Thresholds
from clipfusionvad.tools.detect.detect import CHUNK, Chunk, read_chunks
from clipfusionvad.tools.detect.model import DetectionModel, FrameFeatures
from clipfusionvad.tools.detect.page import DIGITS, clock, name_of
from clipfusionvad.tools.detect.sources import StreamSource, keep_up

SCORES, ALERTS = "scores.jsonl", "alerts.jsonl"


def watch(
    source: StreamSource,
    model: DetectionModel,
    thresholds: Thresholds,
    folder: Path,
    every: float = 0.0,
    fps: float | None = None,
) -> None:
    """Score a source until it ends or is stopped, and append the scores to the logs in ``folder``."""
    infos: list[VideoInfo] = []
    length, method = model.frames_per_snippet, model.scorer.model
    chunks: Iterator[Chunk] = read_chunks(source.frames(infos.append), length if length > 1 else CHUNK)
    chunks = keep_up(chunks, source.stop) if source.live else chunks
    first = next(chunks, None)
    if first is None:
        if source.stop.is_set():
            return
        raise UserError(f"{source.name} ended before its first frame")
    fps = fps or infos[0].fps
    rows = max(1, round(every * fps / length))
    windows = StreamScorer(model.scorer, method.sampling.length, len(method.streams) * method.visual_width, rows)
    with ExitStack() as stack:
        log = StreamLog(folder, stack, fps, model.labels, thresholds)
        log.begin(source.name, infos[0], length)
        bar = stack.enter_context(tqdm(desc="snippets", unit="", disable=None, leave=False))
        for scores in _score_stream(chain([first], chunks), FrameFeatures(model, live=True), windows, length):
            log.add(scores)
            bar.update(scores.new)
        log.finish()
    print(f"results in {folder}: {SCORES}, {ALERTS}")


@dataclass(frozen=True)
class WindowScores:
    """Scores of snippets of the current window.

    ``spans`` (n, 2) frames [first, last) of each snippet, ``anomaly`` (n,), ``classes`` (n, C) or None. The last
    ``new`` of them are scored for the first time.
    """

    spans: np.ndarray
    anomaly: np.ndarray
    classes: np.ndarray | None
    new: int
    final: bool


class StreamScorer:
    """Turn rows that arrive one after another into scores; only the rows of one window are kept.

    If the sampling spreads over a whole video, each window is scored as its own video.
    """

    def __init__(self, score: Callable[[np.ndarray], VideoScores], length: int, width: int, every: int = 1):
        """``score`` scores the rows (n, D) of one window; a window is ``length`` rows, scored every ``every`` rows."""
        self.score, self.length, self.every = score, length, every
        self.rows = np.zeros((length, width), np.float32)
        self.spans = np.zeros((length, 2), np.int64)
        self.count = self.scored = 0

    def add(self, rows: np.ndarray, spans: np.ndarray) -> Iterator[WindowScores]:
        """Take rows (n, D) and their frames (n, 2); yield scores of complete windows and of the current one."""
        start = 0
        while start < len(rows):
            taken = min(self.length - self.count, len(rows) - start)
            here, there = slice(self.count, self.count + taken), slice(start, start + taken)
            self.rows[here], self.spans[here] = rows[there], spans[there]
            self.count += taken
            start += taken
            if self.count == self.length:
                yield self._scores(final=True)
            elif self.count - self.scored >= self.every:
                yield self._scores(final=False)

    def finish(self) -> Iterator[WindowScores]:
        """Yield the final scores of the last window at the end of the stream."""
        if self.count:
            yield self._scores(final=True)

    def _scores(self, final: bool) -> WindowScores:
        found = self.score(self.rows[: self.count])
        new = self.count - self.scored
        part = slice(0 if final else self.scored, self.count)
        classes = None if found.classes is None else found.classes[part]
        scores = WindowScores(self.spans[part].copy(), found.anomaly[0][part], classes, new, final)
        self.scored = self.count
        if final:
            self.count = self.scored = 0
        return scores


def _score_stream(
    chunks: Iterable[Chunk], features: FrameFeatures, scorer: StreamScorer, frames_per_snippet: int
) -> Iterator[WindowScores]:
    """Score chunks (whole snippets, except for the last) as they arrive."""
    waiting: deque[tuple[int, int]] = deque()

    def score(rows: np.ndarray) -> Iterator[WindowScores]:
        spans = [waiting.popleft() for _ in rows]
        return scorer.add(rows, np.array(spans, np.int64).reshape(-1, 2))

    for chunk in chunks:
        waiting.extend(chunk_spans(chunk, frames_per_snippet))
        yield from score(features.add(chunk.frames))
    yield from score(features.finish())
    yield from scorer.finish()


def chunk_spans(chunk: Chunk, frames_per_snippet: int) -> list[tuple[int, int]]:
    """Return the frames [first, last) of each snippet in a chunk."""
    end = chunk.first + len(chunk.frames)
    starts = range(chunk.first, end, frames_per_snippet)
    return [(start, min(start + frames_per_snippet, end)) for start in starts]


class StreamLog:
    """Write and print scores and alerts; only the current segment is kept."""

    def __init__(self, folder: Path, stack: ExitStack, fps: float, labels: Sequence[str], thresholds: Thresholds):
        self.fps, self.labels, self.thresholds = fps, labels, thresholds
        self.online = OnlineSegments(fps, labels, thresholds)
        self.scores, self.alerts = (_append(folder / name, stack) for name in (SCORES, ALERTS))
        self.snippets = self.segments = self.end = self.missed = 0

    def begin(self, source: str, info: VideoInfo, frames_per_snippet: int) -> None:
        """Write the first line of a session, which describes its source."""
        head = {"stream": source, "started": _now(), "fps": self.fps, "frames_per_snippet": frames_per_snippet}
        _write(self.scores, head | {"video": asdict(info), "thresholds": asdict(self.thresholds)})

    def add(self, scores: WindowScores) -> None:
        """Write a line per snippet, and alerts for new snippets."""
        for row, (start, end) in enumerate(scores.spans.tolist()):
            anomaly, classes = float(scores.anomaly[row]), None if scores.classes is None else scores.classes[row]
            line = {"start": round(start / self.fps, DIGITS), "end": round(end / self.fps, DIGITS)}
            line |= {"start_frame": start, "end_frame": end, "anomaly": anomaly}
            if classes is not None:
                line["classes"] = dict(zip(self.labels, classes.tolist(), strict=True))
            _write(self.scores, line | {"final": scores.final})
            if row >= len(scores.spans) - scores.new:
                self._judge(start, end, anomaly, classes)
        self.scores.flush()

    def _judge(self, start: int, end: int, anomaly: float, classes: np.ndarray | None) -> None:
        if start > self.end and not self.missed:
            tqdm.write(f"{clock(self.end / self.fps)}  scoring is slower than the source: snippets are left out")
        self.missed += start - self.end
        self.snippets, self.end = self.snippets + 1, end
        self._report(self.online.add(start, end, anomaly, classes))

    def _report(self, alerts: Sequence[Alert]) -> None:
        for alert in alerts:
            segment = alert.segment
            self.segments += alert.kind == "start"
            _write(self.alerts, {"alert": alert.kind, "at": _now()} | asdict(segment))
            self.alerts.flush()
            if alert.kind == "start":
                words = f"{clock(segment.start)}  start  {name_of(segment)}, score {segment.confidence:.2f}"
            else:
                words = f"{clock(segment.end)}  end    {name_of(segment)}, since {clock(segment.start)}, "
                words += f"mean {segment.confidence:.2f}, highest {segment.peak:.2f}"
            tqdm.write(words)

    def finish(self) -> None:
        self._report(self.online.finish())
        missed = f", {clock(self.missed / self.fps)} left out" if self.missed else ""
        print(f"{self.snippets} snippets, {clock(self.end / self.fps)}{missed}; {self.segments} alerts")


def _append(path: Path, stack: ExitStack) -> TextIO:
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return stack.enter_context(open(path, "a", encoding="utf-8"))


def _write(file: TextIO, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(without_nan(dict(line))) + "\n")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")
