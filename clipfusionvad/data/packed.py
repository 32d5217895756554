"""Packed features: those of a whole list in one memory-mapped file, with a record of what they were made from.

A store is a folder:

- ``features.npy``: the training inputs, (N, T, S·D), for a sampling that always makes the same input of a video; or,
  for tests and random sampling, the rows of all N videos one after the other, (ΣL, S·D) (*whole*).
- ``videos.npy`` (N, 2) int64: valid snippets of each input, or snippets L of each video; bytes of a value in its files.
- ``sources.npy`` (N, S, 2) int64: bytes and time of change (ns) of every feature file, S streams.
- ``manifest.json``: the rest, see ``Manifest``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import get_type_hints

import numpy as np

from clipfusionvad.data.features import check_features, compare_norms, load_video, median_norm, recorded_frames
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.sampling import Sampling
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import atomic_folder, hash_file, read_json, write_array, write_json
from clipfusionvad.io.npy import read_array, read_npy_header
from clipfusionvad.io.progress import ProgressBar

FORMAT = "clipfusionvad-pack-2"
MANIFEST, FEATURES, VIDEOS, SOURCES = "manifest.json", "features.npy", "videos.npy", "sources.npy"
DTYPES = ("float16", "float32")
# Bytes that are read at a time when a store is checked.
_PIECE = 2**24


@dataclass(frozen=True)
class Manifest:
    """The record of a store.

    ``list`` and ``list_sha256`` are the list's path and content, ``width`` the features' dim in one stream,
    ``sampling`` the sampling whose inputs they are, as text (None: whole videos). ``rounding`` is the largest error
    of a value relative to the largest of its snippet, 0 for an exact store. ``frames_per_snippet`` is that of the
    extraction, where its manifest is beside the features. ``crc32`` is the checksum of the data,
    ``index_crc32`` of the other arrays and ``own_crc32`` of the rest of the manifest.
    """

    list: str
    list_sha256: str
    streams: tuple[str, ...]
    width: int
    sampling: str | None
    dtype: str
    videos: int
    rounding: float
    crc32: int
    index_crc32: int
    own_crc32: int = 0
    format: str = FORMAT
    frames_per_snippet: int | None = None

    def signed(self) -> Manifest:
        """Return the same manifest with its own checksum."""
        content = asdict(replace(self, own_crc32=0))
        # Older stores have no such line.
        if self.frames_per_snippet is None:
            del content["frames_per_snippet"]
        plain = json.dumps(content, sort_keys=True)
        return replace(self, own_crc32=zlib.crc32(plain.encode()))


@dataclass(frozen=True)
class Store:
    """An open store; ``features`` is memory-mapped, so it is only read where it is used."""

    folder: Path
    manifest: Manifest
    features: np.ndarray
    videos: np.ndarray
    sources: np.ndarray

    @property
    def whole(self) -> bool:
        """Whether it holds whole videos, not samples of them."""
        return self.manifest.sampling is None

    @property
    def lengths(self) -> np.ndarray:
        """Valid snippets of each input, or snippets of each video, (N,)."""
        return self.videos[:, 0]

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each video's rows begin, (N,)."""
        return np.cumsum(self.lengths) - self.lengths

    def video(self, row: int) -> np.ndarray:
        """Return a whole video, (L, S·D), in the dtype of its files, if the store is ``whole``."""
        start, (length, size) = self.starts[row], self.videos[row]
        return self.features[start : start + length].astype(f"f{size}", copy=False)

    def attach(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return entries that read their features from this store, if it holds whole videos."""
        if not self.whole:
            return list(entries)
        return [replace(entry, packed=partial(self.video, row)) for row, entry in enumerate(entries)]

    def check_fit(self, list_path: str | Path, streams: Sequence[str], width: int, sampling: Sampling | None) -> None:
        """Raise ``UserError`` unless the store was packed from this list, for this use.

        ``sampling`` is the one to train with, None where whole videos are needed; whole videos serve any.
        """
        made, held = self.manifest, f"inputs of {self.features.shape[1]} snippets"
        wanted = "whole videos" if sampling is None or sampling.is_random else f"inputs of {sampling.length} snippets"
        for fits, reason in (
            (made.list_sha256 == hash_file(list_path), f"{list_path} has changed since"),
            (made.streams == tuple(streams), f"it holds the streams {' '.join(made.streams)}, not {' '.join(streams)}"),
            (made.width == width, f"its features have dim {made.width}, not {width}"),
            (self.whole or made.sampling == repr(sampling), f"it holds {held}, not {wanted}"),
        ):
            if not fits:
                raise _unusable(self.folder, f"does not fit: {reason}")

    def check_sources(self, entries: Sequence[Entry]) -> None:
        """Raise ``UserError`` for the first feature file that has changed; missing files are ignored."""
        if len(entries) != self.manifest.videos:
            raise _damaged(self.folder, f"it holds {self.manifest.videos} videos, the list {len(entries)}")
        for entry, known in zip(entries, self.sources.tolist(), strict=True):
            for path, source in zip(entry.paths, known, strict=False):
                if _source_of(path) not in (None, source):
                    raise _unusable(self.folder, f"does not fit: {path} has changed since")

    def check_data(self) -> None:
        """Read all data and raise ``UserError`` if it has changed."""
        total, content = 0, self.features.data.cast("B")
        for start in ProgressBar(range(0, len(content), _PIECE), "checking", leave=False):
            total = zlib.crc32(content[start : start + _PIECE], total)
        if total != self.manifest.crc32:
            raise _damaged(self.folder, f"{FEATURES} is not what was written")


def store_folder(list_path: str | Path, folder: str | Path | None = None) -> Path:
    """Return the folder of a list's store: beside the list, or in another folder."""
    path = Path(list_path)
    return (path.parent if folder is None else Path(folder)) / f"{path.stem}.pack"


def open_store(folder: Path) -> Store:
    """Open a store; raise ``UserError`` for one that is incomplete, truncated or inconsistent.

    Compares everything but the data with its checksum; ``Store.check_data`` reads the data.
    """
    manifest = _read_manifest(folder)
    count, streams = manifest.videos, len(manifest.streams)
    try:
        videos, sources = (read_array(folder / name, "store") for name in (VIDEOS, SOURCES))
    except UserError as error:
        raise _damaged(folder, f"{VIDEOS} or {SOURCES} is missing or not readable") from error
    same = _index_crc32(videos, sources) == manifest.index_crc32 and videos.dtype == sources.dtype == np.int64
    if not same or videos.shape != (count, 2) or sources.shape != (count, streams, 2):
        raise _damaged(folder, f"{VIDEOS} or {SOURCES} is not what was written")
    store = Store(folder, manifest, _map_features(folder / FEATURES, manifest.dtype), videos, sources)
    shape, dim = store.features.shape, manifest.width * streams
    if shape != (store.lengths.sum(), dim) if store.whole else len(shape) != 3 or shape[::2] != (count, dim):
        raise _damaged(folder, f"{FEATURES} has shape {shape}, which does not fit the rest")
    return store


def _read_manifest(folder: Path) -> Manifest:
    try:
        content = read_json(folder / MANIFEST, "manifest")
        manifest = Manifest(**content | {"streams": tuple(content.get("streams", ()))})
        kinds = get_type_hints(Manifest) | {"streams": tuple}
        if not all(isinstance(getattr(manifest, name), kind) for name, kind in kinds.items()):
            raise ValueError("values of another kind")
        if manifest != manifest.signed() or manifest.format != FORMAT or manifest.dtype not in DTYPES:
            raise ValueError(f"not what was written in the form {FORMAT}")
    except (UserError, ValueError, TypeError) as error:
        raise _damaged(folder, f"{MANIFEST} is missing or not readable ({error})") from error
    return manifest


def _map_features(path: Path, dtype: str) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            shape, fortran, found = read_npy_header(file)
            start = file.tell()
            present = os.fstat(file.fileno()).st_size - start
        if found != np.dtype(dtype) or fortran or present != found.itemsize * math.prod(shape):
            raise ValueError(f"{present} bytes of data for shape {shape} {found}")
        # Slices of a plain array are cheaper than those of np.memmap.
        return np.asarray(np.memmap(path, found, mode="r", offset=start, shape=shape))
    except (OSError, ValueError) as error:
        raise _damaged(path.parent, f"{FEATURES} is missing, truncated or not readable ({error})") from error


def _index_crc32(videos: np.ndarray, sources: np.ndarray) -> int:
    return zlib.crc32(sources.tobytes(), zlib.crc32(videos.tobytes()))


def _source_of(path: Path) -> list[int] | None:
    """Return the bytes and the time of change of a file; None if it is missing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _unusable(folder: Path, what: str) -> UserError:
    return UserError(f"{folder} {what}; pack again, or read the single files with --no-packed")


def _damaged(folder: Path, what: str) -> UserError:
    return _unusable(folder, f"is damaged: {what}")


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
        raise UserError(f"{folder} exists, but does not hold packed features: move it away")
    name, list_sha256 = str(list_path), hash_file(list_path)
    fixed = sampling if sampling is not None and not sampling.is_random else None
    counts = check_features(entries, width, name, read=False)
    sources = np.array([[_source_of(path) for path in entry.paths] for entry in entries], dtype=np.int64)
    rows = (len(entries), fixed.length) if fixed else (sum(counts),)
    header = {"shape": (*rows, width * len(streams)), "fortran_order": False, "descr": np.dtype(dtype).str}

    def read(entry: Entry) -> tuple[np.ndarray, tuple[int, int], float, float]:
        """Return the rows of a video, its line of ``videos.npy``, the rounding and the norm."""
        try:
            features = values = load_video(entry.paths, width)
            length = len(features)
            if fixed:
                # A fixed sampling uses no random numbers. Models take float32.
                values, length = fixed.sample(features, np.random.default_rng(0))
                values = values.astype(np.float32)
            stored, rounding = _convert(values, dtype, entry.path)
        except UserError as error:
            raise UserError(f"{name}, row {entry.row}: {error}") from error
        return stored, (length, features.itemsize), rounding, median_norm(features)

    with atomic_folder(folder) as temporary:
        needed, free = math.prod(header["shape"]) * np.dtype(dtype).itemsize, shutil.disk_usage(temporary).free
        if needed > free:
            raise UserError(
                f"{folder} takes {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there: "
                f"name another folder with --output"
            )
        crc32, known, roundings, norms = 0, [], [], []
        with open(temporary / FEATURES, "wb") as file, ThreadPoolExecutor(workers) as pool:
            np.lib.format.write_array_header_1_0(file, header)
            jobs = (pool.submit(read, entry) for entry in entries)
            # Threads read the next few videos while one is written.
            waiting = deque(islice(jobs, workers + 1))
            for _ in ProgressBar(range(len(entries)), f"packing {Path(list_path).name}", unit="video"):
                stored, video, rounding, norm = waiting.popleft().result()
                waiting.extend(islice(jobs, 1))
                content = np.ascontiguousarray(stored).data.cast("B")
                file.write(content)
                crc32 = zlib.crc32(content, crc32)
                known.append(video)
                roundings.append(rounding)
                norms.append(norm)
            file.flush()
            os.fsync(file.fileno())
        videos = np.array(known, dtype=np.int64)
        write_array(temporary / VIDEOS, videos)
        write_array(temporary / SOURCES, sources)
        made, text = (name, list_sha256, tuple(streams), width), repr(fixed) if fixed else None
        sums = crc32, _index_crc32(videos, sources)
        recorded = set(recorded_frames(entry.path for entry in entries).values())
        stride = recorded.pop() if len(recorded) == 1 else None
        about = Manifest(*made, text, dtype, len(entries), max(roundings), *sums, frames_per_snippet=stride)
        manifest = about.signed()
        write_json(temporary / MANIFEST, asdict(manifest))
    compare_norms(entries, np.array(norms), name)
    return manifest


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
