"""Conventions of frame-level truth: on which frames of each test video a benchmark is judged.

Several are in use for each benchmark (``datasets``), and numbers under different ones are not comparable.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from clipfusionvad.data.annotations import Annotation
from clipfusionvad.data.config import FRAMES_PER_SNIPPET
from clipfusionvad.datasets import Convention, Dataset
from clipfusionvad.io.errors import UserError, nearest


def find_convention(dataset: Dataset, name: str) -> Convention:
    """Return a dataset's convention by its name; ``UserError`` for an unknown one."""
    known = {one.name: one for one in dataset.conventions}
    if name not in known:
        hint = f"{nearest(name, known)}; those of {dataset.title}: {', '.join(known)}"
        raise UserError(f"unknown convention {name!r}{hint}")
    return known[name]


def judged_frames(convention: Convention, videos: Sequence[str], frames: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return on how many frames each video is judged, (V,) int64, from the numbers of its frames."""
    lengths, size = np.asarray(frames, dtype=np.int64), FRAMES_PER_SNIPPET
    if convention.rule == "all":
        return lengths
    whole = lengths // size if convention.rule == "floor" else -(-lengths // size)
    return size * (whole - np.array([video in convention.short for video in videos], dtype=np.int64))


def read_bounds(item: Annotation, convention: Convention) -> Annotation:
    """Return an annotation with the bounds of a text file read as the convention does; other files are exact."""
    if not item.text:
        return item
    start, end = convention.start, convention.end
    return replace(item, segments=[(max(0, first + start), last + end) for first, last in item.segments])


def convention_of(dataset: Dataset, videos: int, frames: int) -> Convention | None:
    """Return the convention whose whole test set has so many videos and frames; ``videos`` 0: any number."""
    known = (one for one in dataset.conventions if one.frames == frames and videos in (0, one.videos))
    return next(known, None)
