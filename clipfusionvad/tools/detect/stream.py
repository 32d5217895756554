"""Scoring what goes on, snippet by snippet, in bounded time and memory.

A stream is scored in the consecutive windows of a test. The window that is not complete yet is scored again as
snippets arrive, so that its scores are provisional; those of a complete one are final. T snippets of a window,
D width of a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from clipfusionvad.engine.evaluator import VideoScores
from clipfusionvad.tools.detect.detect import FrameFeatures
from clipfusionvad.tools.detect.sources import Chunk


@dataclass(frozen=True)
class WindowScores:
    """Scores of snippets of the window at hand.

    ``spans`` (n, 2) frames [first, last) of each snippet, ``anomaly`` (n,), ``classes`` (n, C) or None. Of these
    the last ``new`` were never scored before.
    """

    spans: np.ndarray
    anomaly: np.ndarray
    classes: np.ndarray | None
    new: int
    final: bool


class StreamScorer:
    """Rows one after another → scores; keeps the rows of one window and nothing else.

    A window of a sampling that spreads over the whole video is scored as a video of its own.
    """

    def __init__(self, score: Callable[[np.ndarray], VideoScores], length: int, width: int, every: int = 1):
        """``score`` scores the rows (n, D) of one window; a window is ``length`` rows, scored every ``every`` rows."""
        self.score, self.length, self.every = score, length, every
        self.rows = np.zeros((length, width), np.float32)
        self.spans = np.zeros((length, 2), np.int64)
        self.count = self.scored = 0

    def add(self, rows: np.ndarray, spans: np.ndarray) -> Iterator[WindowScores]:
        """Take rows (n, D) and their frames (n, 2); yield scores of windows completed, and of the one at hand."""
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
        """The stream has ended: what the last window holds is final. The object may be used anew."""
        if self.count:
            yield self._scores(final=True)

    def _scores(self, final: bool) -> WindowScores:
        found = self.score(self.rows[: self.count])
        new = self.count - self.scored
        known = slice(0 if final else self.scored, self.count)
        classes = None if found.classes is None else found.classes[known]
        scores = WindowScores(self.spans[known].copy(), found.anomaly[0][known], classes, new, final)
        self.scored = self.count
        if final:
            self.count = self.scored = 0
        return scores


def score_stream(
    chunks: Iterable[Chunk], features: FrameFeatures, scorer: StreamScorer, frames_per_snippet: int
) -> Iterator[WindowScores]:
    """Score a stream's chunks (of whole snippets, but for the last) as they come."""
    waiting: deque[tuple[int, int]] = deque()

    def spans_of(rows: np.ndarray) -> np.ndarray:
        return np.array([waiting.popleft() for _ in rows], np.int64).reshape(-1, 2)

    for chunk in chunks:
        waiting.extend(chunk_spans(chunk, frames_per_snippet))
        rows = features.add(chunk.frames)
        yield from scorer.add(rows, spans_of(rows))
    rows = features.finish()
    yield from scorer.add(rows, spans_of(rows))
    yield from scorer.finish()


def chunk_spans(chunk: Chunk, frames_per_snippet: int) -> Sequence[tuple[int, int]]:
    """Frames [first, last) of each snippet in a chunk."""
    end = chunk.first + len(chunk.frames)
    starts = range(chunk.first, end, frames_per_snippet)
    return [(start, min(start + frames_per_snippet, end)) for start in starts]
