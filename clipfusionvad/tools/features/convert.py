"""Convert features that other programs wrote into ``.npy`` files of one video, or one crop of a video, each.

Features come as arrays of many shapes: (T, D), (T, crops, D), (crops, T, D), with axes of length 1 around them, in
``.npy``, ``.npz``, ``.pt``, ``.safetensors`` and ``.h5`` files of one or of many videos. Which axis is which follows
from all files together, is printed, and is asked for where the shapes allow two readings.
"""

import contextlib
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import permutations
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from clipfusionvad.io.errors import UserError, is_text, printable, warn
from clipfusionvad.io.files import check_inside, check_writable, walk_files, write_array
from clipfusionvad.io.foreign_checkpoints import is_plain_tensor, read_checkpoint
from clipfusionvad.io.hub import local_path
from clipfusionvad.io.npy import read_array, read_npy_header
from clipfusionvad.io.option import Option

# Widths of the features in use: CLIP 512, 640, 768, 1024; I3D 400, 1024, 2048; C3D and VGGish 4096, 128; VideoMAE 1408.
_WIDTHS = (128, 400, 512, 640, 768, 1024, 1280, 1408, 2048, 4096)
_USUAL_CROPS, _MOST_CROPS = (5, 10), 10
_VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".npy")


@dataclass(frozen=True)
class FoundArray:
    """An array of one video in a file: ``name`` is its path below the target folder, without suffix and crop."""

    name: str
    path: Path
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Axes:
    """The axes of an array; those that are left have length 1."""

    time: int
    feature: int
    crop: int | None


def convert_features(
    source: Path,
    target: Path,
    *,
    dtype: Annotated[
        str | None,
        Option("dtype to store; the default keeps float16 and makes float32 of others", choices=("float16", "float32")),
    ] = None,
    time_axis: Annotated[
        int | None, Option("the axis of the array that is time, if the shapes do not show it", minimum=0)
    ] = None,
    crop_axis: Annotated[
        int | None, Option("the axis that is the crops, if the shapes do not show it", minimum=0)
    ] = None,
    overwrite: Annotated[bool, Option("replace files that are there already")] = False,
) -> None:
    """Write ``NAME.npy``, or ``NAME__k.npy`` for each crop, below ``target`` for all arrays below ``source``.

    Raises ``UserError``, before anything is written, for shapes that allow two readings and files that exist already.
    """
    found = find_arrays(source, target)
    axes = {}
    for ndim in sorted({len(array.shape) for array in found}):
        same = [array for array in found if len(array.shape) == ndim]
        try:
            axes[ndim] = find_axes([array.shape for array in same], time_axis, crop_axis)
        except UserError as error:
            raise UserError(f"{same[0].path}: {error}") from error
    outputs: dict[Path, FoundArray] = {}
    for array in found:
        crop = axes[len(array.shape)].crop
        names = [array.name] if crop is None else [f"{array.name}__{k}" for k in range(array.shape[crop])]
        for name in names:
            path = target / f"{name}.npy"
            check_inside(target, path)
            if path in outputs:
                raise UserError(
                    f"{array.path} and {outputs[path].path} both hold {name}: convert them into two folders"
                )
            if path.exists() and not overwrite:
                raise UserError(f"{path} exists already: give --overwrite, or another folder")
            outputs[path] = array
    check_writable(next(iter(outputs)))
    for array in tqdm(found, "converting", unit="video", disable=None):
        _write(array, axes[len(array.shape)], target, dtype)
    for ndim, one in axes.items():
        same = [array for array in found if len(array.shape) == ndim]
        print(f"{len(same)} videos of shapes like {same[0].shape}: {_describe(one, same[0].shape)}")
        if len(same) > 1 and len({array.shape[one.time] for array in same}) == 1:
            print("  all have one length: if their snippets are equal parts of the videos, use --segments equal")
    next_command = f"python -m clipfusionvad lists --dataset NAME --features {target} --output list"
    print(f"{len(outputs)} feature files in {target}; next: {next_command}")


def find_axes(shapes: Sequence[tuple[int, ...]], time_axis: int | None = None, crop_axis: int | None = None) -> Axes:
    """Return which axis is which in arrays of these shapes, which have one number of axes.

    The width and the number of crops are the same in all arrays. Raises ``UserError`` if no reading or several fit.
    """
    sizes = np.array(shapes)
    same = (sizes == sizes[0]).all(axis=0)
    readings: dict[tuple[bool, ...], list[Axes]] = {}
    for time, feature in permutations(range(sizes.shape[1]), 2):
        rest = [axis for axis in range(sizes.shape[1]) if axis not in (time, feature)]
        crops = [axis for axis in rest if axis == crop_axis or sizes[:, axis].max() > 1]
        if len(crops) > 1 or not same[feature] or time_axis not in (None, time) or crop_axis not in (None, *crops):
            continue
        crop = crops[0] if crops else None
        if crop is not None and not (same[crop] and sizes[0, crop] <= _MOST_CROPS):
            continue
        usual = crop is None or sizes[0, crop] in _USUAL_CROPS
        fit = (sizes[0, feature] in _WIDTHS, feature == sizes.shape[1] - 1, usual)
        readings.setdefault(fit, []).append(Axes(time, feature, crop))
    options = "--time-axis and --crop-axis, counted from 0"
    if not readings:
        other = next((f" and {shape}" for shape in shapes if shape != shapes[0]), "")
        raise UserError(
            f"arrays of shape {shapes[0]}{other} are not (snippets, dim) of one dim with up to {_MOST_CROPS} crops: "
            f"check {options}, or convert features of one kind at a time"
        )
    best = readings[max(readings)]
    # A dim that nobody uses, although another axis has one that is used.
    doubtful = not max(readings)[0] and np.isin(sizes, _WIDTHS).any() and time_axis is None
    if len(best) > 1 or doubtful:
        texts = " or ".join(_describe(one, shapes[0]) for one in best)
        raise UserError(f"arrays of shape {shapes[0]} can be read as {texts}: give {options}")
    return best[0]


def find_arrays(source: Path, target: Path) -> list[FoundArray]:
    """Return the arrays of all videos in a file, or in the files below a folder; ``UserError`` if there are none.

    What lies below ``target`` was converted before and is left out, unless that is the folder itself.
    """
    source = local_path(source)
    if not source.exists():
        raise UserError(f"not found: {source}")
    root = source.parent if source.is_file() else source
    if source.is_file() and source.suffix.lower() not in READERS:
        raise UserError(f"{source} is not a file of features: {', '.join(READERS)} are read")
    paths = [source] if source.is_file() else list(walk_files(source, ""))
    if target.resolve() != source.resolve():
        paths = [path for path in paths if target.resolve() not in path.resolve().parents]
    for cached in (_archive, _member, _content):
        cached.cache_clear()
    found, skipped = [], []
    for path in paths:
        if path.suffix.lower() not in READERS:
            continue
        with _reading(path):
            stored = dict(READERS[path.suffix.lower()](path))
        usable = {key: array for key, array in stored.items() if array.may_be_features}
        skipped += [f"{path}: {key or 'array'} of {stored[key]}" for key in stored.keys() - usable.keys()]
        skipped += [] if stored else [f"{path}: neither an array of numbers nor arrays by name"]
        place, keys = PurePosixPath(path.relative_to(root).as_posix()).with_suffix(""), {key: key for key in usable}
        if len({key.rpartition("/")[2] for key in keys}) == 1 < len(keys):
            # VIDEO/features: the last word is the same for all videos.
            keys = {key: key.rpartition("/")[0] for key in keys}
        for key, array in usable.items():
            inside = place if len(usable) == 1 or not keys[key].strip("/.") else place.parent / keys[key].strip("/")
            while inside.suffix.lower() in _VIDEO_SUFFIXES:
                inside = inside.with_suffix("")
            name = inside.as_posix()
            if not is_text(name):
                skipped.append(f"{path}: {printable(name)!r} has control characters or bytes that are not UTF-8")
                continue
            found.append(FoundArray(name, path, array.shape, array.read))
    if not found:
        first = skipped[0] if skipped else next(map(str, walk_files(source, "")), "an empty folder")
        raise UserError(f"no arrays of features ({', '.join(READERS)}) in {source}; the first item there is {first}")
    if skipped:
        warn(f"{len(skipped)} arrays are not features of a video, the first is {skipped[0]}")
    return found


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of a reader, each of which fails in many ways, into one line."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(f"{path} is not a readable {path.suffix} file: {error}") from error


class _Stored(NamedTuple):
    """An array in a file, not yet read."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __str__(self) -> str:
        return f"shape {self.shape}, {self.dtype}"

    @property
    def may_be_features(self) -> bool:
        return self.dtype.kind in "fiu" and len(self.shape) > 1 and min(self.shape) > 0


#: The arrays in a file with their keys; the key of a file of one array is empty.
Arrays = Iterator[tuple[str, _Stored]]


def _npy(path: Path) -> Arrays:
    """The array of a file, mapped into memory; or the arrays of the dictionary that ``np.save`` has pickled."""
    with open(path, "rb") as file:
        shape, _, dtype = read_npy_header(file)
        present = os.fstat(file.fileno()).st_size - file.tell()
    if dtype.hasobject:
        yield from _pickled(path)
        return
    if dtype.itemsize * math.prod(shape) > present:
        raise ValueError(f"shape {shape} {dtype} does not fit {present} bytes of data")
    yield "", _Stored(dtype, shape, partial(np.load, path, mmap_mode="r", allow_pickle=False))


def _npz(path: Path) -> Arrays:
    """Every array of an archive, or every row of an array NAME for which an array NAME_names holds the videos."""
    stored: dict[str, _Stored] = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as file:
                shape, _, dtype = read_npy_header(file)  # type: ignore[arg-type]
            if dtype.itemsize * math.prod(shape) > entry.file_size:
                raise ValueError(f"{entry.filename}: shape {shape} {dtype} does not fit {entry.file_size} bytes")
            key = entry.filename.removesuffix(".npy")
            stored[key] = _Stored(dtype, shape, partial(_member, path, key))
    for key, array in stored.items():
        names = next((name for name in (f"{key}_names", "names") if name in stored and name != key), None)
        if names and stored[names].shape == array.shape[:1] and len(array.shape) > 1:
            for row, video in enumerate(_member(path, names).astype(str)):
                yield f"{key}/{video}", _Stored(array.dtype, array.shape[1:], partial(_row, path, key, row))
        elif key != "names" and not key.endswith("_names"):
            yield key, array


@lru_cache(maxsize=1)
def _archive(path: Path) -> Mapping[str, np.ndarray]:
    return np.load(path, allow_pickle=False)


@lru_cache(maxsize=2)
def _member(path: Path, key: str) -> np.ndarray:
    return _archive(path)[key]


def _row(path: Path, key: str, row: int) -> np.ndarray:
    return _member(path, key)[row]


def _pickled(path: Path) -> Arrays:
    """The tensors and arrays of a dictionary, or the one that is the whole file."""
    for key, array in _content(path).items():
        yield key, _Stored(array.dtype, array.shape, partial(_value, path, key))


def _value(path: Path, key: str) -> np.ndarray:
    return _content(path)[key]


@lru_cache(maxsize=1)
def _content(path: Path) -> dict[str, np.ndarray]:
    import torch

    if path.suffix.lower() == ".npy":
        objects = read_array(path, "feature file")
        content = objects.item() if objects.size == 1 else None
    else:
        content = read_checkpoint(path, "feature file")
    arrays: dict[str, np.ndarray] = {}
    for key, value in (content if isinstance(content, Mapping) else {"": content}).items():
        if is_plain_tensor(value):
            arrays[str(key)] = (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        elif isinstance(value, np.ndarray):
            arrays[str(key)] = np.asarray(value)
    return arrays


def _hdf5(path: Path) -> Arrays:
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path}: HDF5 files need a package that is not installed: pip install h5py") from error

    def read(key: str) -> np.ndarray:
        with h5py.File(path) as file:
            return file[key][()]

    stored: dict[str, _Stored] = {}

    def visit(key: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            stored[key] = _Stored(item.dtype, item.shape, partial(read, key))

    with h5py.File(path) as file:
        file.visititems(visit)
    yield from stored.items()


READERS: dict[str, Callable[[Path], Arrays]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".pt": _pickled,
    ".pth": _pickled,
    ".safetensors": _pickled,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
}


def _write(array: FoundArray, axes: Axes, target: Path, dtype: str | None) -> None:
    with _reading(array.path):
        values = array.read()
    order = [axis for axis in (axes.crop, axes.time, axes.feature) if axis is not None]
    crops = values.transpose(order + [axis for axis in range(values.ndim) if axis not in order])
    crops = crops.reshape(-1, array.shape[axes.time], array.shape[axes.feature])
    kept = dtype or ("float16" if values.dtype == np.float16 else "float32")
    missing = 0
    for number, crop in enumerate(crops):
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(crop, dtype=kept)
        lost = ~np.isfinite(stored).all(axis=1)
        if np.isfinite(crop[lost]).all(axis=1).any():
            raise UserError(f"{array.path}: {array.name} has values beyond those of {kept}: choose another --dtype")
        missing += int(lost.sum())
        write_array(target / (f"{array.name}.npy" if axes.crop is None else f"{array.name}__{number}.npy"), stored)
    if missing:
        warn(f"{array.path}: {array.name} has {missing} rows with NaN or infinity")


def _describe(axes: Axes, shape: tuple[int, ...]) -> str:
    crops = "" if axes.crop is None else f", {shape[axes.crop]} crops on axis {axes.crop}"
    return f"time on axis {axes.time}, dim {shape[axes.feature]} on axis {axes.feature}{crops}"
