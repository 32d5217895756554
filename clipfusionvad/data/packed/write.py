"""Packing: the features of a whole list, sampled if possible, in one file (format: ``packed.store``)."""

from __future__ import annotations

import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from tqdm import tqdm

from clipfusionvad.data.checks import check_features, compare_norms, median_norm
from clipfusionvad.data.features import load_video
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.packed.store import (
    FEATURES,
    MANIFEST,
    SOURCES,
    VIDEOS,
    Manifest,
    hash_list,
    index_crc32,
    source_of,
)
from clipfusionvad.data.sampling import Sampling
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import atomic_folder, write_array, write_json

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Packed:
    """One video as it goes into a store: ``features`` (T, S·D) or (L, S·D), of which ``length`` are valid.

    ``size`` is the bytes of a value in its files, ``norm`` the median norm of its snippets.
    """

    features: np.ndarray
    length: int
    size: int
    rounding: float
    norm: float


def write_store(
    folder: Path,
    entries: Sequence[Entry],
    list_path: str | Path,
    streams: Sequence[str],
    width: int,
    sampling: Sampling | None,
    dtype: str,
    workers: int,
) -> Manifest:
    """Pack a list into ``folder``, completely or not at all, in place of an older store there.

    ``sampling`` None packs whole videos, and so does a random one. Every file is checked as by ``check_features``.
    The memory depends on the longest video and on ``workers`` threads, not on the length of the list.
    Raises ``UserError`` that names the row and the file of a bad video, or of one beyond the range of ``dtype``.
    """
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} exists and is not a store: move it away")
    fixed = sampling if sampling is not None and not sampling.is_random else None
    made_of = hash_list(list_path)
    counts = check_features(entries, width, str(list_path), read=False)
    sources = np.array([[source_of(path) for path in entry.paths] for entry in entries], dtype=np.int64)
    shape: tuple[int, ...] = (len(entries), fixed.length) if fixed else (sum(counts),)
    shape += (width * len(streams),)
    with atomic_folder(folder) as temporary:
        _check_room(temporary, folder, shape, dtype)
        written = _Writer(temporary / FEATURES, shape, np.dtype(dtype))
        videos, norms, rounding = [], [], 0.0
        with written:
            work = _in_order(lambda entry: _pack_entry(entry, width, fixed, dtype, str(list_path)), entries, workers)
            # disable=None: no bar where stderr is not a terminal.
            for packed in tqdm(work, f"packing {Path(list_path).name}", len(entries), disable=None, unit="video"):
                written.add(packed.features)
                videos.append((packed.length, packed.size))
                norms.append(packed.norm)
                rounding = max(rounding, packed.rounding)
        counted = np.array(videos, dtype=np.int64)
        write_array(temporary / VIDEOS, counted)
        write_array(temporary / SOURCES, sources)
        text, sums = repr(fixed) if fixed else None, (written.crc32, index_crc32(counted, sources))
        manifest = Manifest(
            str(list_path), made_of, tuple(streams), width, text, dtype, len(entries), rounding, *sums
        ).signed()
        write_json(temporary / MANIFEST, asdict(manifest))
    compare_norms(entries, np.array(norms), str(list_path))
    return manifest


def _pack_entry(entry: Entry, width: int, sampling: Sampling | None, dtype: str, list_name: str) -> Packed:
    try:
        features = load_video(entry.paths, width)
        values, length = (features, len(features)) if sampling is None else _sample(features, sampling)
        stored, rounding = _convert(values, dtype, entry.path)
    except UserError as error:
        raise UserError(f"{list_name}, row {entry.row}: {error}") from error
    return Packed(stored, length, features.itemsize, rounding, median_norm(features))


def _sample(features: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, int]:
    # The generator is not used: this sampling is not random. Models take float32.
    visual, length = sampling.sample(features, np.random.default_rng(0))
    return visual.astype(np.float32), length


def _convert(values: np.ndarray, dtype: str, path: Path) -> tuple[np.ndarray, float]:
    """Return values in a store's dtype, and the largest rounding error relative to the largest value of a snippet."""
    with np.errstate(over="ignore"):
        stored = values.astype(dtype, copy=False)
    if stored.dtype.itemsize >= values.dtype.itemsize:
        return stored, 0.0
    if not np.isfinite(stored).all():
        advice = "; pack with --dtype float32" if dtype == "float16" else ""
        raise UserError(f"{path} holds {np.abs(values).max():.6g}, which is beyond the range of {dtype}{advice}")
    error, largest = np.abs(stored - values).max(axis=1), np.abs(values).max(axis=1)
    return stored, float((error / np.where(largest > 0, largest, 1)).max())


class _Writer:
    """A .npy file of known shape, written row by row; ``crc32`` is the checksum of the data."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype):
        self.path, self.header, self.crc32 = path, {"shape": shape, "fortran_order": False, "descr": dtype.str}, 0
        self.file: BinaryIO

    def __enter__(self) -> _Writer:
        self.file = open(self.path, "wb")
        np.lib.format.write_array_header_1_0(self.file, self.header)
        return self

    def __exit__(self, *error: Any) -> None:
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def add(self, rows: np.ndarray) -> None:
        content = np.ascontiguousarray(rows).data.cast("B")
        self.file.write(content)
        self.crc32 = zlib.crc32(content, self.crc32)


def _check_room(temporary: Path, folder: Path, shape: tuple[int, ...], dtype: str) -> None:
    needed, free = int(np.prod(shape)) * np.dtype(dtype).itemsize, shutil.disk_usage(temporary).free
    if needed > free:
        raise UserError(
            f"{folder} takes {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there: "
            f"name another folder with --output"
        )


def _in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield the results in the order of the items; threads work on the next few items in advance."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
