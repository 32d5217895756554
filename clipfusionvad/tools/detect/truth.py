"""Annotated intervals of the videos, to be shown beside the segments that are found."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from clipfusionvad.data.annotations import WHAT, join_pieces, match_names, read_annotations, video_key
from clipfusionvad.datasets import Dataset
from clipfusionvad.io.errors import UserError, warn

#: An interval as a list, as it comes back from JSON: frames [start, end) and its class.
Interval = list[Any]


@dataclass(frozen=True)
class Truth:
    """An annotated interval: frames start_frame … end_frame - 1, these bounds in seconds, its class."""

    start: float
    end: float
    start_frame: int
    end_frame: int
    label: str


def read_intervals(
    path: str, names: Collection[str], dataset: Dataset, labels: Sequence[str]
) -> dict[str, list[Interval]]:
    """Return the annotated intervals by the names of results; a normal video has none, an unknown one no entry.

    ``labels`` are shown for the classes of ``dataset``. ``UserError`` if the file annotates none of the videos.
    """
    by_key: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_key[video_key(name)].append(name)
    annotations = join_pieces(read_annotations(path, dataset, by_key), dataset)
    matched, shown = match_names(annotations, by_key), dict(zip(dataset.labels, labels, strict=True))
    if not matched:
        ours, theirs = ("".join(f"{one}, " for one in islice(known, 3)) + "…" for known in (by_key, annotations))
        raise UserError(f"{WHAT} {path} annotates none of the videos: they are called {ours}; it names {theirs}")
    if missing := [name for key in by_key.keys() - matched.values() for name in by_key[key]]:
        warn(f"{path} does not annotate {len(missing)} of {len(names)} videos, such as {min(missing)}")
    intervals: dict[str, list[Interval]] = {}
    for theirs, key in matched.items():
        item = annotations[theirs]
        found: dict[tuple[int, int], list[str]] = {span: [] for span in item.segments}
        # A file may name no classes; an interval of several classes is listed once for each.
        for span, label in zip(item.segments, item.labels, strict=False):
            found[span].append(shown[label])
        intervals |= {name: [[*span, ", ".join(of)] for span, of in sorted(found.items())] for name in by_key[key]}
    return intervals


def place_intervals(name: str, intervals: Sequence[Interval], times: np.ndarray, step: int) -> list[Truth]:
    """Return the intervals of a video whose frames (and end) have these ``times``; every ``step``-th frame is there."""
    placed, frames = [], len(times) - 1
    for start, end, label in intervals:
        if start >= frames * step:
            warn(f"{name} has {frames * step} frames, but is annotated from frame {start} to {end}: another video?")
            continue
        first, last = start // step, min(-(-end // step), frames)
        placed.append(Truth(float(times[first]), float(times[last]), first, last, label))
    return placed
