"""From one video file to its feature files: decoding, encoding and writing at the same time, in constant memory.

``extract_video`` is all that an engine needs: it takes a job that can be sent anywhere and returns a plain record.
An engine is a function ``run(jobs, workers, on_frames)`` that yields an ``Outcome`` for every job, in any order.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipfusionvad.data.prefetch import ahead
from clipfusionvad.engine.device import pick_device
from clipfusionvad.extraction.crops import to_canvas
from clipfusionvad.extraction.decode import VideoInfo, read_frames
from clipfusionvad.extraction.encoder import ImageEncoder, check_precision
from clipfusionvad.extraction.jobs import Job, Model
from clipfusionvad.extraction.snippets import SnippetEncoder
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import CannotWrite, atomic_write, check_inside
from clipfusionvad.models.clip import image_tower, load_clip

# Frames handed over at once.
_PIECE = 32


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its record, or the one line that says why there is none."""

    job: Job
    record: dict[str, Any] | None = None
    error: str | None = None


def attempt(job: Job, on_frames: Callable[[int], object] = lambda count: None) -> Outcome:
    """``extract_video`` with a bad video as a result, so that the others go on; a full disk stops all."""
    try:
        return Outcome(job, extract_video(job, on_frames))
    except CannotWrite:
        raise
    except UserError as error:
        return Outcome(job, error=" ".join(str(error).split()))


def extract_video(job: Job, on_frames: Callable[[int], object] = lambda count: None) -> dict[str, Any]:
    """Write the feature files of a video, all of them whole or none, and return what is to be known about them.

    The record holds model, fps, frames, rows and files, size and SHA-256 of the video, and the seconds it took.
    ``on_frames`` is told how many more frames have been used. The model is built once in a process.

    Raises ``UserError`` for a video that cannot be read to its end (``BrokenVideo``) or gives no row.
    """
    started = time.perf_counter()
    encoder, model = _load(job.model)
    snippets = SnippetEncoder(encoder, job.options)
    for path in job.paths:
        check_inside(job.output, path.parent)
    remove_leftovers(job)
    infos: list[VideoInfo] = []
    frames = rows = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open_features(path, encoder.dim, job.dtype)) for path in job.paths]
        pieces = stack.enter_context(contextlib.closing(ahead(_canvases(job, snippets.size, infos.append))))
        for piece in pieces:
            rows += _write(files, snippets.add(piece), job)
            frames += len(piece)
            on_frames(len(piece))
        rows += _write(files, snippets.finish(), job)
        if rows == 0:
            raise UserError(
                f"{job.source} has {frames} frames, too few for a row of {job.options.stride} "
                f"(--tail ceil gives shorter chunks a row too)"
            )
    return {
        "source": job.source,
        "bytes": job.bytes,
        "sha256": None if job.bytes is None else _sha256(job.source),
        "model": model,
        "options": job.recipe(),
        "fps": infos[0].fps,
        "frames": frames,
        "rows": rows,
        "files": job.files,
        "seconds": round(time.perf_counter() - started, 3),
    }


def remove_leftovers(job: Job) -> None:
    """Remove what an extraction that was killed left half-written; whole files never have such names."""
    for path in job.paths:
        for leftover in path.parent.glob(f".{escape(path.name)}.*.tmp"):
            leftover.unlink(missing_ok=True)


def check_model(model: Model) -> str:
    """The fingerprint of a model's image tower; raises ``UserError`` where it is not there or cannot be used here."""
    weights = _weights(model.clip, model.width)
    image_tower(weights)
    check_precision(pick_device(model.device), model.precision)
    return weights.image_fingerprint


# Whoever asks about a model mostly encodes with it next.
_weights = functools.lru_cache(maxsize=1)(load_clip)


@functools.lru_cache(maxsize=1)
def _load(model: Model) -> tuple[ImageEncoder, dict[str, Any]]:
    """The encoder, and what the record says about it."""
    weights = _weights(model.clip, model.width)
    encoder = ImageEncoder(weights, pick_device(model.device), model.precision, model.batch_size)
    return encoder, {"clip": model.clip, "fingerprint": weights.image_fingerprint, "dim": encoder.dim}


def _canvases(job: Job, size: int, on_info: Callable[[VideoInfo], object]) -> Generator[list[np.ndarray], None, None]:
    """The video's frames as crops are cut from them, in pieces."""
    piece: list[np.ndarray] = []
    with contextlib.closing(read_frames(job.source, on_info)) as frames:
        for frame in frames:
            piece.append(to_canvas(frame, job.options.resize, size))
            if len(piece) == _PIECE:
                yield piece
                piece = []
    yield piece


def _write(files: list[BinaryIO], rows: np.ndarray, job: Job) -> int:
    """Append rows (crops, rows, D) to the crops' files; returns how many."""
    with np.errstate(over="ignore"):
        stored = rows.astype(job.dtype)
    if job.options.event_empty != "nan" and not np.isfinite(stored).all():
        raise UserError(
            f"{job.source}: features beyond the range of {job.model.precision} or {job.dtype}; use wider ones"
        )
    for file, crop in zip(files, stored, strict=True):
        file.write(crop.tobytes())
    return rows.shape[1]


@contextlib.contextmanager
def _open_features(path: Path, dim: int, dtype: str) -> Iterator[BinaryIO]:
    """A .npy file to append rows to, which appears under its name once all is written."""
    with atomic_write(path) as file:
        file.write(_npy_header(0, dim, dtype))
        start = file.tell()
        yield file
        rows = (file.tell() - start) // (dim * np.dtype(dtype).itemsize)
        file.seek(0)
        file.write(_npy_header(rows, dim, dtype))


def _npy_header(rows: int, dim: int, dtype: str) -> bytes:
    """As ``np.save`` writes it; numpy leaves room for the number of rows to grow."""
    header = io.BytesIO()
    shape = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, dim)}
    np.lib.format.write_array_header_1_0(header, shape)
    return header.getvalue()


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
