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

# Videos that a message names.
SHOWN = 10


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


def misfit(
    dataset: Dataset, convention: Convention, videos: Sequence[str], frames: Sequence[int], rows: Sequence[int]
) -> str:
    """Say which videos of known frames have features (rows of 16 frames) that a convention does not judge.

    Empty where all fit: a video judged on J frames has floor(J / 16) to ceil(J / 16) rows. The message names the
    convention that fits all videos, if one does.
    """
    size, own = FRAMES_PER_SNIPPET, np.asarray(rows)

    def off(one: Convention) -> np.ndarray:
        judged = judged_frames(one, videos, frames)
        return np.flatnonzero((own < judged // size) | (own > -(-judged // size)))

    wrong = off(convention)
    if not len(wrong):
        return ""
    first = ", ".join(f"{videos[one]} ({frames[one]} frames, {own[one]} rows)" for one in wrong[:SHOWN])
    fitting = next((one.name for one in dataset.conventions if not len(off(one))), None)
    advice = f"give --convention {fitting}, which fits all" if fitting else "no other convention fits all"
    more = ", …" * (len(wrong) > SHOWN)
    return f"convention {convention.name} does not fit the features of {len(wrong)} videos: {first}{more}; {advice}"


def convention_of(dataset: Dataset, videos: int, frames: int) -> Convention | None:
    """Return the convention whose whole test set has so many videos and frames; ``videos`` 0: any number."""
    known = (one for one in dataset.conventions if one.frames == frames and videos in (0, one.videos))
    return next(known, None)
