"""Convert features that other programs wrote into ``.npy`` files of one video, or one crop of a video, each.

Features come as arrays of many shapes: (T, D), (T, crops, D), (crops, T, D), with axes of length 1 around them, in
``.npy``, ``.npz``, ``.pt`` and ``.h5`` files of one or of many videos. Which axis is which follows from all files
together, is printed, and is asked for where the shapes allow two readings.
"""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import permutations
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from clipfusionvad.io.errors import UserError, is_text, printable, warn
from clipfusionvad.io.files import check_inside, check_writable, walk_files, write_array
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
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
    found = find_arrays(source)
    axes = {
        ndim: find_axes([array.shape for array in found if len(array.shape) == ndim], time_axis, crop_axis)
        for ndim in sorted({len(array.shape) for array in found})
    }
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
    print(f"{len(outputs)} feature files in {target}; next: python -m clipfusionvad lists --features {target}")


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
        raise UserError(
            f"arrays of shape {shapes[0]} are not (snippets, dim) with up to {_MOST_CROPS} crops: check {options}"
        )
    best = readings[max(readings)]
    if len(best) > 1:
        texts = " or ".join(_describe(one, shapes[0]) for one in best)
        raise UserError(f"arrays of shape {shapes[0]} can be read as {texts}: give {options}")
    return best[0]


def find_arrays(source: Path) -> list[FoundArray]:
    """Return the arrays of all videos in a file, or in the files below a folder; ``UserError`` if there are none."""
    if not source.exists():
        raise UserError(f"not found: {source}")
    root = source.parent if source.is_file() else source
    paths = (
        [source] if source.is_file() else [path for path in walk_files(source, "") if path.suffix.lower() in READERS]
    )
    found, skipped = [], []
    for path in paths:
        if path.suffix.lower() not in READERS:
            raise UserError(f"{path} is not a file of features: {', '.join(READERS)} are read")
        place = path.relative_to(root).with_suffix("")
        arrays = dict(READERS[path.suffix.lower()](path))
        alone = len(arrays) == 1
        for key, (shape, read) in arrays.items():
            if len(shape) < 2 or 0 in shape:
                skipped.append(f"{path}: {key or 'array'} of shape {shape}")
                continue
            inside = PurePosixPath(key.strip("/"))
            inside = inside.with_suffix("") if inside.suffix.lower() in _VIDEO_SUFFIXES else inside
            name = place.as_posix() if alone else (place.parent / inside).as_posix()
            if not is_text(name):
                skipped.append(f"{path}: {printable(name)!r} has control characters or bytes that are not UTF-8")
                continue
            found.append(FoundArray(name, path, shape, read))
    if not found:
        first = skipped[0] if skipped else next(map(str, walk_files(source, "")), "an empty folder")
        raise UserError(f"no arrays of features ({', '.join(READERS)}) in {source}; the first thing there is {first}")
    if skipped:
        warn(f"{len(skipped)} arrays are not features of a video, the first is {skipped[0]}")
    return found


Arrays = Iterator[tuple[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]]


def _npy(path: Path) -> Arrays:
    with open(path, "rb") as file:
        try:
            shape = read_npy_header(file)[0]
        except ValueError as error:
            raise UserError(f"{path} is not a readable .npy file: {error}") from error
    yield "", (shape, partial(read_array, path, "feature file"))


def _npz(path: Path) -> Arrays:
    """Every array of an archive, or every row of an array NAME for which an array NAME_names holds the videos."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    shapes[member.removesuffix(".npy")] = read_npy_header(file)[0]  # type: ignore[arg-type]
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable .npz file: {error}") from error
    for key, shape in shapes.items():
        names = next(
            (name for name in (f"{key}_names", "names") if shapes.get(name) == shape[:1] and len(shape) > 1), None
        )
        if names:
            for row, video in enumerate(map(str, _member(path, names))):
                yield f"{key}/{video}", (shape[1:], partial(lambda key, row: _member(path, key)[row], key, row))
        elif key != "names" and not key.endswith("_names"):
            yield key, (shape, partial(_member, path, key))


@lru_cache(maxsize=2)
def _member(path: Path, key: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[key]
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: {key} cannot be read: {error}") from error


def _torch(path: Path) -> Arrays:
    import torch

    content = read_checkpoint(path, "feature file")
    values = content if isinstance(content, Mapping) else {"": content}
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        elif isinstance(value, np.ndarray):
            array = value
        else:
            continue
        yield str(key), (array.shape, partial(np.asarray, array))


def _hdf5(path: Path) -> Arrays:
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path}: HDF5 files need a package that is not installed: pip install h5py") from error

    def read(key: str) -> np.ndarray:
        with h5py.File(path) as file:
            return file[key][()]

    shapes: dict[str, tuple[int, ...]] = {}

    def visit(key: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "fiu":
            shapes[key] = item.shape

    try:
        with h5py.File(path) as file:
            file.visititems(visit)
    except OSError as error:
        raise UserError(f"{path} is not a readable HDF5 file: {error}") from error
    for key, shape in shapes.items():
        yield key, (shape, partial(read, key))


READERS: dict[str, Callable[[Path], Arrays]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".pt": _torch,
    ".pth": _torch,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
}


def _write(array: FoundArray, axes: Axes, target: Path, dtype: str | None) -> None:
    values = array.read()
    if values.dtype.kind not in "fiu":
        raise UserError(f"{array.path} holds {values.dtype}; features are numbers")
    order = [axis for axis in (axes.crop, axes.time, axes.feature) if axis is not None]
    crops = values.transpose(order + [axis for axis in range(values.ndim) if axis not in order])
    crops = crops.reshape(-1, array.shape[axes.time], array.shape[axes.feature])
    kept = "float16" if values.dtype == np.float16 else "float32"
    if missing := int((~np.isfinite(values)).any(axis=axes.feature).sum()):
        warn(f"{array.path}: {array.name} has {missing} rows with NaN or infinity")
    for number, crop in enumerate(crops):
        name = array.name if axes.crop is None else f"{array.name}__{number}"
        write_array(target / f"{name}.npy", np.ascontiguousarray(crop, dtype=dtype or kept))


def _describe(axes: Axes, shape: tuple[int, ...]) -> str:
    crops = "" if axes.crop is None else f", {shape[axes.crop]} crops on axis {axes.crop}"
    return f"time on axis {axes.time}, dim {shape[axes.feature]} on axis {axes.feature}{crops}"
