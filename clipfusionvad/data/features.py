"""Feature files: one .npy array (snippets, dim) per crop of a video and stream; a row is a snippet."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from clipfusionvad.data.lists import Entry, split_crop
from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.io.npy import read_npy_header
from clipfusionvad.io.progress import ProgressBar

# Files of one extraction have norms within a factor of two; a normalised file among others is ten times off.
NORM_RANGE = 5
CONVERT = "'python -m clipfusionvad convert-features'"


class NotOneCrop(UserError):
    """The array is not two-dimensional, so the file is something else than one crop of one video."""


def read_shape(path: str | Path) -> tuple[int, int]:
    """Return snippets and dim of a feature file from its header: no data is read or allocated.

    Raises ``UserError`` unless it is a float16/32/64 array with at least one row and the file is as long as
    its header says (``NotOneCrop`` for an array that is not 2-D).
    """
    return _read_header(path)[0]


def _read_header(path: str | Path) -> tuple[tuple[int, int], bool, np.dtype, int]:
    """Return shape, Fortran order, dtype, and the position of the first data byte."""
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
        advice = f": {CONVERT} writes such files" if len(shape) == 3 else ""
        raise NotOneCrop(f"{path} has shape {shape}; one file holds one crop of one video as (snippets, dim){advice}")
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise UserError(f"{path} holds {dtype}; features must be float16, float32 or float64")
    rows, dim = shape
    if rows < 1 or dim < 1:
        raise UserError(f"{path} has shape {shape}: it holds no features; extract it again or drop it")
    announced = rows * dim * dtype.itemsize
    if present != announced:
        state = "truncated" if present < announced else "damaged"
        raise UserError(f"{path} is {state}: {present} bytes of data, {shape} {dtype} takes {announced}; copy it again")
    return (rows, dim), fortran, dtype, start


def recorded_frames(paths: Iterable[Path]) -> dict[Path, int]:
    """Return how many frames a row covers, for the files that the manifest of an extraction describes.

    The manifest lies in a folder above, at most three levels up.
    """
    asked = {path: Path(os.path.abspath(path.with_name(split_crop(path.stem)[0]))) for path in paths}
    found: dict[Path, tuple[str, int]] = {}
    for folder in {above for parent in {video.parent for video in asked.values()} for above in _above(parent)}:
        for manifest in folder.glob("manifest*.jsonl"):
            with contextlib.suppress(OSError, ValueError):
                for line in manifest.read_text("utf-8").splitlines():
                    with contextlib.suppress(ValueError, RecursionError):
                        match content := json.loads(line):
                            case {
                                "video": str(name),
                                "state": "done",
                                "time": str(time),
                                "options": {"stride": int(stride), "reduce": str(reduce)},
                            }:
                                # Of pictures, every ``step``-th frame may be there.
                                step = content.get("step", 1)
                                record = time, (1 if reduce == "none" else stride) * step
                                found[folder / name] = max(found.get(folder / name, record), record)
    return {path: found[video][1] for path, video in asked.items() if video in found}


def _above(folder: Path) -> tuple[Path, ...]:
    return (folder, *folder.parents)[:4]


def check_frames(paths: Iterable[Path], used: int, recorded: Mapping[Path, int]) -> None:
    """Raise ``UserError`` where rows were recorded to cover another number of frames than the one in use."""
    other = {path: recorded[path] for path in paths if recorded.get(path, used) != used}
    for path, length in other.items():
        advice = f"give --frames-per-snippet {length}"
        if len(set(recorded.values())) > 1:
            advice = "extract all files with the same --stride"
        raise UserError(
            f"{path}: its rows cover {length} frames each (record of its extraction), but --frames-per-snippet is "
            f"{used}: {advice}"
        )


def read_video_shape(paths: Sequence[Path], dim: int | None = None) -> int:
    """Return the snippets of a video by its streams' headers; ``UserError`` where they differ or do not fit."""
    shapes = [read_shape(path) for path in paths]
    for path, (_, found) in zip(paths, shapes, strict=True):
        check_dim(path, found, dim)
    return _same_count(paths, [rows for rows, _ in shapes])


def load_video(paths: Sequence[Path], dim: int | None = None) -> np.ndarray:
    """Load a video's features, the streams side by side: (snippets, streams · dim).

    In further streams a snippet may be missing, its row all NaN (released event features have such rows where
    nothing moves); it becomes zeros. Errors as of ``load_features``, and streams of different length or width.
    """
    first = load_features(paths[0], dim)
    streams = [first, *(load_features(path, first.shape[1], may_miss=True) for path in paths[1:])]
    _same_count(paths, [len(stream) for stream in streams])
    return np.concatenate(streams, axis=1) if len(streams) > 1 else first


def load_entry(entry: Entry, dim: int | None = None) -> np.ndarray:
    """Return the features of a list's video, from its store if they are packed, else from its files."""
    return load_video(entry.paths, dim) if entry.packed is None else entry.packed()


def _same_count(paths: Sequence[Path], counts: Sequence[int]) -> int:
    for path, count in zip(paths, counts, strict=True):
        if count != counts[0]:
            raise UserError(f"{path} has {count} snippets, but {paths[0]} has {counts[0]}: extract both from one video")
    return counts[0]


def load_features(path: str | Path, dim: int | None = None, may_miss: bool = False) -> np.ndarray:
    """Load a feature file as an array (snippets, dim) in the dtype it is stored in.

    Raises ``UserError`` where ``read_shape`` does, where the file's dim is not ``dim``, and for NaN or
    infinite values (naming the first snippet that has one). With ``may_miss`` a row that is all NaN is zeros.
    """
    shape, fortran, dtype, start = _read_header(path)
    check_dim(path, shape[1], dim)
    try:
        values = np.fromfile(path, dtype, shape[0] * shape[1], offset=start)
        stored = values.reshape(shape, order="F" if fortran else "C")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    features = np.ascontiguousarray(stored, dtype=dtype.newbyteorder("="))
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
            f"{path} has features of dim {found}, but {wanted} are expected: train with --feature-dim {found}, or with "
            f"--visual-width {found} a method that reads no texts, or use features of the CLIP in use (--clip)"
        )


def check_features(
    entries: Sequence[Entry], dim: int | None, path: str, read: bool = True, note: Callable[[Path], None] | None = None
) -> list[int]:
    """Verify every feature file of a list, so that a bad one does not end a run after hours; return their snippets.

    Checks shape, dtype, dim and completeness, and with ``read`` that all values are finite. Raises one
    ``UserError`` that names the list, the row and the file of the first bad entry and counts the others.
    With ``read`` also warns where some files have far larger features. Threads call ``note`` with each file after.
    """

    def check(entry: Entry) -> tuple[int, float] | UserError:
        try:
            if read:
                features = load_video(entry.paths, dim)
                found = len(features), median_norm(features)
            else:
                found = read_video_shape(entry.paths, dim), 1.0
            if note:
                for file in entry.paths:
                    note(file)
            return found
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        progress = ProgressBar(pool.map(check, entries), "checking features", len(entries), leave=False)
        results = list(zip(entries, progress, strict=True))
    bad = [f"{path}, row {entry.row}: {error}" for entry, error in results if isinstance(error, UserError)]
    if bad:
        raise UserError(bad[0] + (f" ({len(bad) - 1} other files of the list are bad too)" if len(bad) > 1 else ""))
    found = [result for _, result in results if not isinstance(result, UserError)]
    compare_norms(entries, np.array([norm for _, norm in found]), path)
    return [rows for rows, _ in found]


def median_norm(features: np.ndarray) -> float:
    """Return the median norm of the snippets of a video (L, D)."""
    return float(np.median(np.linalg.norm(features.astype(np.float32), axis=1)))


def compare_norms(entries: Sequence[Entry], norms: np.ndarray, list_name: str) -> None:
    """Warn where the norms (N,) of a list's videos lie far apart."""
    low, high = int(norms.argmin()), int(norms.argmax())
    if norms[high] > NORM_RANGE * norms[low]:
        warn(
            f"{list_name}: features differ in scale, with norms from {norms[low]:.3g} ({entries[low].path.name}) to "
            f"{norms[high]:.3g} ({entries[high].path.name}): are some normalised, or from another model?"
        )
