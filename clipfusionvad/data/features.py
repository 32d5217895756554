"""Feature files: one .npy array (snippets, dim) per crop of a video and stream; a row is a snippet."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipfusionvad.data.lists import Entry
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.npy import read_npy_header


class NotOneCrop(UserError):
    """The array is not two-dimensional, so the file is something else than one crop of one video."""


@dataclass(frozen=True)
class _Header:
    """What a feature file says of itself; ``start`` is the position of its first data byte."""

    rows: int
    dim: int
    dtype: np.dtype
    fortran: bool
    start: int


def read_shape(path: str | Path) -> tuple[int, int]:
    """Snippets and dim of a feature file, from its header: no data is read or allocated.

    Raises ``UserError`` unless it is a float16/32/64 array with at least one row and the file is as long as
    its header says (``NotOneCrop`` for an array that is not 2-D).
    """
    header = _read_header(path)
    return header.rows, header.dim


def _read_header(path: str | Path) -> _Header:
    try:
        with open(path, "rb") as file:
            shape, fortran, dtype = read_npy_header(file)
            start = file.tell()
            present = os.fstat(file.fileno()).st_size - start
    except FileNotFoundError as error:
        raise UserError(f"feature file not found: {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not a readable .npy file: {error}") from error
    if len(shape) != 2:
        advice = ": split the crops" if len(shape) == 3 else ""
        raise NotOneCrop(f"{path} has shape {shape}; one file holds one crop of one video as (snippets, dim){advice}")
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise UserError(f"{path} holds {dtype}; features must be float16, float32 or float64")
    rows, dim = shape
    if rows < 1 or dim < 1:
        raise UserError(f"{path} has shape {shape}: it holds no features; extract it again or drop it")
    announced = rows * dim * dtype.itemsize
    if present != announced:
        state = "truncated" if present < announced else "damaged"
        raise UserError(
            f"{path} is {state}: it has {present} bytes of data, shape {shape} {dtype} takes {announced}; copy it again"
        )
    return _Header(rows, dim, dtype, fortran, start)


def read_video_shape(paths: Sequence[Path], dim: int | None = None) -> int:
    """Snippets of a video by the headers of its streams' files; ``UserError`` where they differ or do not fit."""
    counts = []
    for path in paths:
        rows, found = read_shape(path)
        check_dim(path, found, dim)
        counts.append(rows)
    _check_counts(paths, counts)
    return counts[0]


def load_video(paths: Sequence[Path], dim: int | None = None) -> np.ndarray:
    """Load a video's features, the streams side by side: (snippets, streams · dim).

    In further streams a snippet may be missing, its row all NaN (released event features have such rows where
    nothing moves); it becomes zeros. Errors as of ``load_features``, and streams of different length.
    """
    first, *others = paths
    streams = [load_features(first, dim), *(load_features(path, dim, may_miss=True) for path in others)]
    _check_counts(paths, [len(stream) for stream in streams])
    return streams[0] if not others else np.concatenate(streams, axis=1)


def load_entry(entry: Entry, dim: int | None = None) -> np.ndarray:
    """The features of a list's video, from its store where they are packed, else from its files (``load_video``)."""
    return load_video(entry.paths, dim) if entry.packed is None else entry.packed()


def _check_counts(paths: Sequence[Path], counts: Sequence[int]) -> None:
    for path, count in zip(paths, counts, strict=True):
        if count != counts[0]:
            raise UserError(
                f"{path} has {count} snippets, but {paths[0]} has {counts[0]}: extract both from the same video"
            )


def load_features(path: str | Path, dim: int | None = None, may_miss: bool = False) -> np.ndarray:
    """Load a feature file as an array (snippets, dim) in the dtype it is stored in.

    Raises ``UserError`` where ``read_shape`` does, where the file's dim is not ``dim``, and for NaN or
    infinite values (naming the first snippet that has one). With ``may_miss`` a row that is all NaN is zeros.
    """
    header = _read_header(path)
    check_dim(path, header.dim, dim)
    try:
        values = np.fromfile(path, header.dtype, header.rows * header.dim, offset=header.start)
        stored = values.reshape((header.rows, header.dim), order="F" if header.fortran else "C")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    features = np.ascontiguousarray(stored, dtype=header.dtype.newbyteorder("="))
    if may_miss:
        features[np.isnan(features).all(axis=1)] = 0
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{path}: snippet {int(np.argmin(finite))} (counted from 0) holds NaN or infinity, "
            f"as do {int((~finite).sum()) - 1} others; extract the video again"
        )
    return features


def check_dim(path: str | Path, found: int, wanted: int | None) -> None:
    """Raise ``UserError`` unless a feature file has the wanted dim (None: any)."""
    if wanted is not None and found != wanted:
        raise UserError(
            f"{path} has features of dim {found}, but {wanted} are expected: "
            f"they come from another CLIP model than the one in use (--clip, --visual-width)"
        )
