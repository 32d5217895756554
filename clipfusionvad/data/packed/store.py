"""Packed features: those of a whole list in one memory-mapped file, with a record of what they were made from.

A store is a folder:

- ``features.npy``, one of two layouts. *Samples*: the training inputs themselves, (N, T, S·D), for a sampling that
  always makes the same input of a video. *Whole*: the rows of all N videos one after the other, (ΣL, S·D), for tests
  and for random sampling.
- ``videos.npy`` (N, 2) int64: valid snippets of each input, or snippets L of each video; bytes of a value in its files.
- ``sources.npy`` (N, S, 2) int64: bytes and time of change (ns) of every feature file, S streams.
- ``manifest.json``: the rest, see ``Manifest``.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clipfusionvad.data.lists import Entry
from clipfusionvad.data.sampling import Sampling
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import hash_file, must_exist, read_text
from clipfusionvad.io.npy import read_array, read_npy_header

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
    of a value relative to the largest of its snippet, 0 for an exact store. ``crc32`` is the checksum of the data,
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

    def signed(self) -> Manifest:
        """Return the same manifest with its own checksum."""
        plain = json.dumps(asdict(replace(self, own_crc32=0)), sort_keys=True)
        return replace(self, own_crc32=zlib.crc32(plain.encode()))


_KINDS = {
    "list": str,
    "list_sha256": str,
    "width": int,
    "sampling": str | None,
    "dtype": str,
    "videos": int,
    "rounding": int | float,
    "crc32": int,
}


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
        made = self.manifest
        if made.list_sha256 != hash_list(list_path):
            raise stale(self.folder, f"{list_path} has changed since")
        if made.streams != tuple(streams):
            raise stale(self.folder, f"it holds the streams {' '.join(made.streams)}, not {' '.join(streams)}")
        if made.width != width:
            raise stale(self.folder, f"its features have dim {made.width}, not {width}")
        self.check_sampling(sampling)

    def check_sampling(self, sampling: Sampling | None) -> None:
        """Raise ``UserError`` unless the store holds whole videos or the inputs of this sampling."""
        if not self.whole and self.manifest.sampling != repr(sampling):
            wanted = "whole videos" if sampling is None or sampling.is_random else f"those of {sampling!r}"
            raise stale(self.folder, f"it holds the inputs of {self.manifest.sampling}, not {wanted}")

    def check_sources(self, entries: Sequence[Entry]) -> None:
        """Raise ``UserError`` for the first feature file that has changed; missing files are ignored."""
        if len(entries) != self.manifest.videos:
            raise damaged(self.folder, f"it holds {self.manifest.videos} videos, the list {len(entries)}")
        for entry, known in zip(entries, self.sources.tolist(), strict=True):
            for path, source in zip(entry.paths, known, strict=False):
                found = source_of(path)
                if found is not None and found != source:
                    raise stale(self.folder, f"{path} has changed since")

    def check_data(self) -> None:
        """Read all data and raise ``UserError`` if it has changed."""
        total, size = 0, self.features.nbytes
        # disable=None: no bar where stderr is not a terminal.
        with tqdm(desc="checking", total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            for piece in _pieces(self.folder / FEATURES):
                total = zlib.crc32(piece, total)
                bar.update(len(piece))
        if total != self.manifest.crc32:
            raise damaged(self.folder, f"{FEATURES} is not what was written")


def store_folder(list_path: str | Path, folder: str | Path | None = None) -> Path:
    """Return the folder of a list's store: beside the list, or in another folder."""
    path = Path(list_path)
    return (path.parent if folder is None else Path(folder)) / f"{path.stem}.pack"


def open_store(folder: Path) -> Store:
    """Open a store; raise ``UserError`` for one that is incomplete, truncated or inconsistent.

    Compares everything but the data with its checksum; ``Store.check_data`` reads the data.
    """
    manifest = _read_manifest(folder)
    videos, sources = (_read_counts(folder, name) for name in (VIDEOS, SOURCES))
    if index_crc32(videos, sources) != manifest.index_crc32:
        raise damaged(folder, f"{VIDEOS} or {SOURCES} is not what was written")
    if videos.shape != (manifest.videos, 2) or sources.shape != (manifest.videos, len(manifest.streams), 2):
        raise damaged(folder, f"{VIDEOS} or {SOURCES} is not of {manifest.videos} videos")
    if not np.isin(videos[:, 1], (2, 4, 8)).all():
        raise damaged(folder, f"{VIDEOS} names sizes that no value has")
    features, lengths = _map_features(folder, manifest), videos[:, 0]
    shortest, longest = int(lengths.min(initial=1)), int(lengths.max(initial=1))
    whole = manifest.sampling is None
    if whole:
        agree = features.ndim == 2 and longest <= len(features) and lengths.sum() == len(features)
    else:
        agree = features.ndim == 3 and len(features) == manifest.videos and longest <= features.shape[1]
    if not agree or shortest < 1 or features.shape[-1] != manifest.width * len(manifest.streams):
        raise damaged(folder, f"{FEATURES} has shape {features.shape}, which does not fit the rest")
    return Store(folder, manifest, features, videos, sources)


def index_crc32(videos: np.ndarray, sources: np.ndarray) -> int:
    return zlib.crc32(sources.tobytes(), zlib.crc32(videos.tobytes()))


def hash_list(path: str | Path) -> str:
    must_exist(path, "list")
    return hash_file(path)


def source_of(path: Path) -> list[int] | None:
    """Return the bytes and the time of change of a file; None if it is missing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def stale(folder: Path, what: str) -> UserError:
    return UserError(f"{folder} does not fit: {what}; pack again, or read the single files with --no-packed")


def damaged(folder: Path, what: str) -> UserError:
    return UserError(f"{folder} is damaged: {what}; pack again, or read the single files with --no-packed")


def _read_manifest(folder: Path) -> Manifest:
    if not (folder / MANIFEST).is_file():
        raise damaged(folder, f"it has no {MANIFEST}")
    try:
        content = json.loads(read_text(folder / MANIFEST, "manifest"))
        known = {field.name for field in fields(Manifest)}
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.keys() != known:
            raise ValueError(f"not of the form {FORMAT}")
        manifest = Manifest(**content | {"streams": tuple(content["streams"])})
        if manifest.dtype not in DTYPES or manifest.videos < 1 or manifest.width < 1 or not manifest.streams:
            raise ValueError("impossible values")
        if not all(isinstance(getattr(manifest, name), kind) for name, kind in _KINDS.items()):
            raise ValueError("values of another kind")
        if not all(isinstance(stream, str) for stream in content["streams"]):
            raise ValueError("streams without names")
        if manifest != manifest.signed():
            raise ValueError("not what was written")
        return manifest
    except (UserError, ValueError, TypeError, RecursionError) as error:
        raise damaged(folder, f"{MANIFEST} is not readable ({error})") from error


def _read_counts(folder: Path, name: str) -> np.ndarray:
    try:
        counts = read_array(folder / name, "store")
    except UserError as error:
        raise damaged(folder, f"{name} is missing or not readable") from error
    if counts.dtype != np.int64:
        raise damaged(folder, f"{name} holds {counts.dtype}")
    return counts


def _map_features(folder: Path, manifest: Manifest) -> np.ndarray:
    path = folder / FEATURES
    try:
        with open(path, "rb") as file:
            shape, fortran, dtype = read_npy_header(file)
            start = file.tell()
            present = os.fstat(file.fileno()).st_size - start
        if dtype != np.dtype(manifest.dtype) or fortran or present != dtype.itemsize * math.prod(shape):
            raise ValueError(f"{present} bytes of data for shape {shape} {dtype}")
        # Slices of a plain array are cheaper than those of np.memmap.
        if min(shape, default=0) < 1:
            raise ValueError(f"no features: shape {shape}")
        return np.asarray(np.memmap(path, dtype, mode="r", offset=start, shape=shape))
    except (OSError, ValueError) as error:
        raise damaged(folder, f"{FEATURES} is missing, truncated or not readable ({error})") from error


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield the data of an array file, without its header, in pieces."""
    with open(path, "rb") as file:
        read_npy_header(file)
        while piece := file.read(_PIECE):
            yield piece
