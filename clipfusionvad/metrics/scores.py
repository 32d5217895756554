"""The scores of one video with their times, as a table and by frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Scores:
    """What ``model.score_video`` returns: ``anomaly`` (n,) and ``classes`` (n, C) or None, as which it unpacks.

    Row i covers the frames ``edges[i]`` to ``edges[i + 1]`` - 1; NaN where the length of a snippet is not known.
    """

    anomaly: np.ndarray
    classes: np.ndarray | None = None
    edges: np.ndarray = field(default_factory=lambda: np.empty(0))
    fps: float | None = None
    labels: Sequence[str] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.anomaly, self.classes))

    def __getitem__(self, index: int) -> Any:
        return (self.anomaly, self.classes)[index]

    @property
    def times(self) -> np.ndarray:
        """The edges of the rows, (n + 1,): in seconds where ``fps`` is known, else in frames."""
        return self.edges / self.fps if self.fps else self.edges

    def per_frame(self) -> Scores:
        """Return the same scores with a row for each frame, by the rule of the metrics of a test."""
        counts = np.diff(self.edges)
        classes = None if self.classes is None else np.repeat(self.classes, counts, axis=0)
        return Scores(np.repeat(self.anomaly, counts), classes, np.arange(sum(counts) + 1), self.fps, self.labels)

    def to_pandas(self) -> pd.DataFrame:
        """Return a table of ``start`` and ``end`` (see ``times``), ``anomaly``, and the probability of each class."""
        import pandas as pd

        table = pd.DataFrame({"start": self.times[:-1], "end": self.times[1:], "anomaly": self.anomaly})
        # A class may be named as one of these columns.
        classes = [] if self.classes is None else [pd.DataFrame(self.classes, columns=list(self.labels))]
        return pd.concat([table, *classes], axis=1)
