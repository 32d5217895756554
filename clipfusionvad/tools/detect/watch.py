"""Watching a stream: alerts as lines on the screen, scores and alerts as JSON lines in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from clipfusionvad.extraction.decode import VideoInfo
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_writable, without_nan
from clipfusionvad.metrics.segments import Alert, OnlineSegments, Thresholds
from clipfusionvad.tools.detect.detect import CHUNK, FrameFeatures, Scorer
from clipfusionvad.tools.detect.page import DIGITS, clock, name_of
from clipfusionvad.tools.detect.sources import Source, keep_up, read_chunks
from clipfusionvad.tools.detect.stream import StreamScorer, WindowScores, score_stream

SCORES, ALERTS = "scores.jsonl", "alerts.jsonl"


def watch(
    source: Source,
    features: FrameFeatures,
    scorer: Scorer,
    labels: Sequence[str],
    thresholds: Thresholds,
    frames_per_snippet: int,
    folder: Path,
    every: float = 0.0,
    fps: float | None = None,
) -> None:
    """Score a source until it ends, appending to ``folder``; returns when it has ended or was stopped."""
    infos: list[VideoInfo] = []
    frames = source.frames(infos.append)
    chunks = read_chunks(frames, frames_per_snippet if frames_per_snippet > 1 else CHUNK)
    chunks = iter(keep_up(chunks, source.stop) if source.live else chunks)
    first = next(chunks, None)
    if first is None:
        if source.stop.is_set():
            return
        raise UserError(f"{source.name} ended before its first frame")
    fps = fps or infos[0].fps
    rows = max(1, round(every * fps / frames_per_snippet))
    sampling, model = scorer.model.sampling, scorer.model
    windows = StreamScorer(scorer, sampling.length, len(model.streams) * model.visual_width, rows)
    with ExitStack() as stack:
        log = StreamLog(folder, stack, fps, labels, thresholds)
        log.begin(source.name, infos[0], frames_per_snippet)
        bar = stack.enter_context(tqdm(desc="snippets", unit="", disable=None, leave=False))
        for scores in score_stream(chain([first], chunks), features, windows, frames_per_snippet):
            log.add(scores)
            bar.update(scores.new)
        log.finish()
    print(f"results in {folder}: {SCORES}, {ALERTS}")


class StreamLog:
    """Writes and prints what scoring yields; keeps no more than the segment at hand."""

    def __init__(self, folder: Path, stack: ExitStack, fps: float, labels: Sequence[str], thresholds: Thresholds):
        self.fps, self.labels, self.thresholds = fps, labels, thresholds
        self.online = OnlineSegments(fps, labels, thresholds)
        self.scores, self.alerts = (_append(folder / name, stack) for name in (SCORES, ALERTS))
        self.snippets = self.segments = self.end = self.missed = 0

    def begin(self, source: str, info: VideoInfo, frames_per_snippet: int) -> None:
        """A line that says whose lines follow."""
        head = {"stream": source, "started": _now(), "fps": self.fps, "frames_per_snippet": frames_per_snippet}
        _write(self.scores, head | {"video": asdict(info), "thresholds": asdict(self.thresholds)})

    def add(self, scores: WindowScores) -> None:
        """Write a line per snippet; judge those that are new."""
        for row, (start, end) in enumerate(scores.spans.tolist()):
            classes = None if scores.classes is None else scores.classes[row]
            _write(self.scores, self._line(start, end, scores.anomaly[row], classes) | {"final": scores.final})
            if row >= len(scores.spans) - scores.new:
                self._judge(start, end, float(scores.anomaly[row]), classes)
        self.scores.flush()

    def _judge(self, start: int, end: int, anomaly: float, classes: np.ndarray | None) -> None:
        if start > self.end and not self.missed:
            tqdm.write(f"{clock(self.end / self.fps)}  behind the source: snippets are left out")
        self.missed += start - self.end
        self.snippets, self.end = self.snippets + 1, end
        self._tell(self.online.add(start, end, anomaly, classes))

    def _tell(self, alerts: Sequence[Alert]) -> None:
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
        self._tell(self.online.finish())
        missed = f", {clock(self.missed / self.fps)} left out" if self.missed else ""
        print(f"{self.snippets} snippets, {clock(self.end / self.fps)}{missed}; {self.segments} alerts")

    def _line(self, start: int, end: int, anomaly: np.floating, classes: np.ndarray | None) -> dict[str, Any]:
        line: dict[str, Any] = {"start": round(start / self.fps, DIGITS), "end": round(end / self.fps, DIGITS)}
        line |= {"start_frame": start, "end_frame": end, "anomaly": float(anomaly)}
        if classes is not None:
            line["classes"] = dict(zip(self.labels, classes.tolist(), strict=True))
        return line


def _append(path: Path, stack: ExitStack) -> TextIO:
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return stack.enter_context(open(path, "a", encoding="utf-8"))


def _write(file: TextIO, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(without_nan(dict(line))) + "\n")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")
