"""Annotated intervals of the videos, to be shown beside the segments that are found."""

from collections.abc import Collection, Sequence
from itertools import islice, zip_longest
from typing import Any

import numpy as np

from clipfusionvad.data.annotations import WHAT, join_pieces, match_names, read_annotations, video_key
from clipfusionvad.datasets import Dataset
from clipfusionvad.io.errors import UserError, warn

#: As it comes back from JSON: frames [start, end) and the class.
Interval = list[Any]


def read_intervals(
    path: str, names: Collection[str], dataset: Dataset, labels: Sequence[str]
) -> dict[str, list[Interval]]:
    """Return the annotated intervals by the names of results; a normal video has none, an unknown one no entry.

    ``labels`` are shown for the classes of ``dataset``. ``UserError`` if the file annotates none of the videos.
    """
    keys = {name: video_key(name) for name in names}
    annotations = join_pieces(read_annotations(path, dataset, keys.values()), dataset)
    matched, shown = match_names(keys.values(), annotations), dict(zip(dataset.labels, labels, strict=True))
    if not matched:
        ours, theirs = ("".join(f"{one}, " for one in islice(known, 3)) + "…" for known in (keys.values(), annotations))
        raise UserError(f"{WHAT} {path} annotates none of the videos: they are called {ours}; it names {theirs}")
    found = {name: annotations[matched[key]] for name, key in keys.items() if key in matched}
    if missing := keys.keys() - found.keys():
        warn(f"{path} does not annotate {len(missing)} of {len(names)} videos, such as {min(missing)}")
    # A file may name no classes.
    pairs = {name: zip_longest(item.segments, item.labels) for name, item in found.items()}
    return {name: [[*span, shown.get(label, "anomaly")] for span, label in of] for name, of in pairs.items()}


def place_intervals(name: str, intervals: Sequence[Interval], times: np.ndarray, step: int) -> list[dict[str, Any]]:
    """Return the intervals of a video with frames (and end) at ``times``, as JSON; every ``step``-th frame is there."""
    placed, frames = [], len(times) - 1
    for start, end, label in intervals:
        first, last = start // step, min(-(-end // step), frames)
        if first >= frames:
            warn(f"{name} has {frames * step} frames, but is annotated from frame {start} to {end}: another video?")
            continue
        bounds = {"start": float(times[first]), "end": float(times[last]), "start_frame": first, "end_frame": last}
        placed.append({**bounds, "label": label})
    return placed
