"""Annotations as frame masks, such as those of ShanghaiTech, and in MATLAB files. Most name no classes.

- A folder with a file for each video: ``NAME.npy``, 0 or 1 for each frame (F,), or a mask of its pixels (F, H, W); or
  ``NAME.mat``.
- ``NAME.mat`` with the structures ``Annotation_file`` of UCF-Crime: ``VideoName``, ``EventName`` and ``Anno`` (k, 2),
  the numbers of its text file, read like those; 0 and -1 are unused.
- ``NAME_label.mat`` with ``volLabel``, as of Avenue: a cell with a mask of pixels for each frame. Avenue's video of
  ``1_label.mat`` is ``01``.
- A file with ``gt``, as of Avenue and ShanghaiTech in the code for future-frame prediction: a cell for each video, in
  the order of their names, of first and last frames (2, k) counted from 1. It holds no names.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import walk_files
from clipfusionvad.io.mat import read_mat
from clipfusionvad.io.npy import read_array

WHAT = "annotation file"
#: Fields of a video's structure: its name and its class.
_NAMES = ("VideoName", "EventName")


class Intervals(NamedTuple):
    """The abnormal intervals of a video in frames [start, end), its length and its class where the file holds them."""

    video: str
    segments: list[tuple[int, int]]
    frames: int | None = None
    label: str | None = None


def is_masks(path: str | Path) -> bool:
    """Whether a path is one of the above."""
    return Path(path).is_dir() or Path(path).suffix.lower() == ".mat"


def read_masks(path: str | Path, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield the place and the ``Intervals`` of each video; ``names`` are the videos of a file without names."""
    files = sorted([*walk_files(path, ".npy"), *walk_files(path, ".mat")]) if Path(path).is_dir() else [Path(path)]
    if not files:
        raise UserError(f"annotation folder {path} holds no masks: NAME.npy or NAME.mat for each video")
    for file in files:
        if file.suffix == ".npy":
            yield file.name, _of_mask(file.stem, _mask(read_array(file, WHAT), file))
            continue
        content = read_mat(file, WHAT)
        masks, structures = content.get("volLabel"), content.get("Annotation_file")
        if "gt" in content:
            yield from _of_cells(content["gt"], file, names)
        elif isinstance(masks, list) and all(isinstance(mask, np.ndarray) for mask in masks):
            frames = [mask.any() for mask in masks]
            number = re.fullmatch(r"(\d+)_label", file.stem)
            name = f"{int(number[1]):02}" if number else file.stem.removesuffix("_label")
            yield file.name, _of_mask(name, np.array(frames, dtype=bool))
        elif isinstance(structures, list) and all(isinstance(row, dict) and "Anno" in row for row in structures):
            for row in structures:
                video, label = (text if isinstance(text := row.get(key), str) else None for key in _NAMES)
                yield file.name, Intervals(video or file.stem, _spans(row["Anno"], file.name), label=label)
        else:
            found = ", ".join(content)
            raise UserError(
                f"{WHAT} {file} has the variables {found or 'none'}; known are gt, volLabel and Annotation_file.Anno: "
                f"write it as CSV with the header video,frames,label,start,end"
            )


def _mask(array: np.ndarray, path: Path) -> np.ndarray:
    """Return whether each frame is abnormal (F,)."""
    if array.ndim == 2 and 1 in array.shape:
        array = array.ravel()
    if (
        array.dtype.kind not in "biuf"
        or array.ndim not in (1, 3)
        or not array.size
        or not np.isin(array, (0, 1, 255)).all()
    ):
        raise UserError(f"{WHAT} {path} has shape {array.shape} {array.dtype}, not a 0 or 1 for each frame")
    return np.any(array.reshape(len(array), -1), axis=1)


def _of_mask(video: str, mask: np.ndarray) -> Intervals:
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return Intervals(video, [(int(start), int(end)) for start, end in edges.reshape(-1, 2)], len(mask))


def _of_cells(cells: Any, path: Path, names: Collection[str]) -> Iterator[tuple[str, Intervals]]:
    # Cells of one shape may have been stored as an array (N, 2, k); a matrix is that of one video.
    if not isinstance(cells, list):
        cells = [*cells] if np.ndim(cells) == 3 else [cells]
    videos = sorted({*names})
    if len(videos) != len(cells):
        many = f"{len(videos)} test videos" if videos else "no --split file names the test videos"
        raise UserError(f"{WHAT} {path} holds {len(cells)} videos without their names, but {many}")
    for number, (video, cell) in enumerate(zip(videos, cells, strict=True), 1):
        place = f"cell {number}"
        bounds = cell.T if np.ndim(cell) == 2 and len(cell) == 2 else cell
        yield place, Intervals(video, [(start - 1, end) for start, end in _spans(bounds, f"{path.name}, {place}")])


def _spans(bounds: Any, where: str) -> list[tuple[int, int]]:
    """Return the rows (k, 2) of whole numbers that are not unused."""
    is_array = isinstance(bounds, np.ndarray)
    if is_array and not bounds.size:
        return []
    if not is_array or bounds.ndim != 2 or bounds.shape[1] != 2 or (bounds != np.rint(bounds)).any():
        raise UserError(f"{where} has intervals of shape {np.shape(bounds)}, not pairs of whole frames")
    return [(int(start), int(end)) for start, end in bounds if start > 0 or end > 0]
