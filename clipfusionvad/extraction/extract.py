"""From videos to feature files: ``extract`` runs all jobs of a command, ``extract_video`` runs one of them.

Decoding, encoding and writing of a video run at the same time and in constant memory.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from clipfusionvad.data.prefetch import prefetch
from clipfusionvad.engine.device import pick_device
from clipfusionvad.extraction import engines
from clipfusionvad.extraction.crops import to_canvas
from clipfusionvad.extraction.decode import VideoInfo, probe, read_frames
from clipfusionvad.extraction.encoder import ImageEncoder, check_precision
from clipfusionvad.extraction.jobs import (
    MANIFEST,
    EncoderConfig,
    ExtractConfig,
    ExtractResult,
    FeatureManifest,
    Job,
    find_videos,
    take_shard,
)
from clipfusionvad.extraction.snippets import SnippetEncoder
from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.io.files import CannotWrite, atomic_write, check_inside, check_writable, hash_file, remove_leftovers
from clipfusionvad.io.locks import hold
from clipfusionvad.io.provenance import code
from clipfusionvad.models.clip import image_tower, load_clip

# Frames that the decoding thread hands over at once.
_PIECE = 32


def extract(config: ExtractConfig) -> int:
    """Extract the features of all videos that are not done yet; return the exit code, 1 if a video failed."""
    shard = _read_shard(config.shard)
    jobs = make_jobs(config, shard)
    check_writable(Path(config.output, MANIFEST))
    # Shards share the folder. Each may run once at a time, and not beside a run of all videos.
    with hold(config.output, shared=shard is not None):
        with hold(config.output, f".lock-{shard[0]}-of-{shard[1]}") if shard else contextlib.nullcontext():
            return _extract_jobs(config, jobs, FeatureManifest(config.output, shard))


def make_jobs(config: ExtractConfig, shard: tuple[int, int] | None = None) -> list[Job]:
    """Return the jobs of a command, or of one of its shards; ``UserError`` for options that contradict each other."""
    if config.ray_address and config.engine != "ray":
        raise UserError("--ray-address is for --engine ray")
    encoder, crops = config.encoder, tuple(config.crop_ids or range(config.crops))
    options = replace(config.options, crops=crops)
    if options.stream == "event":
        if config.event_clip is None:
            warn(f"event images are encoded by --clip {encoder.clip}, which was trained on pictures; see --event-clip")
        encoder = replace(encoder, clip=config.event_clip or encoder.clip)
    videos = find_videos(config.videos)
    jobs = [Job(source, name, config.output, options, encoder, config.dtype) for source, name in videos]
    return take_shard(jobs, *shard) if shard else jobs


def _read_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise UserError(f"--shard must be I/N with I from 1 to N, got {text!r}")
    return int(number), int(of)


def _extract_jobs(config: ExtractConfig, jobs: Sequence[Job], manifest: FeatureManifest) -> int:
    # A shard may have no videos. Otherwise, an encoder that cannot be loaded would fail every video.
    fingerprint = check_encoder(jobs[0].encoder) if jobs else ""
    pending = list(jobs) if config.overwrite else _pending(jobs, manifest, fingerprint)
    for job in pending:
        manifest.append(job.name, "begun", {"source": job.source})
    started, frames, failed = time.perf_counter(), 0, 0
    try:
        for result in _run(config, pending):
            if result.record:
                manifest.append(result.job.name, "done", result.record | {"code": code()})
                frames += result.record["frames"]
            else:
                manifest.append(result.job.name, "failed", {"source": result.job.source, "error": result.error})
                tqdm.write(f"failed: {result.error}", file=sys.stderr)
                failed += 1
    except KeyboardInterrupt:
        print(f"finished videos are kept in {config.output}; the same command continues from there", file=sys.stderr)
        raise
    seconds = time.perf_counter() - started
    _print_summary(config, len(pending) - failed, len(jobs) - len(pending), frames, seconds)
    if failed:
        print(f"{failed} of {len(jobs)} videos failed", file=sys.stderr)
    return 1 if failed else 0


def _pending(jobs: Sequence[Job], manifest: FeatureManifest, fingerprint: str) -> list[Job]:
    """Return the jobs that are not done; raise ``UserError`` if features exist that were made with other options."""
    pending, errors = [], []
    for job in jobs:
        try:
            if not manifest.is_done(job, fingerprint):
                pending.append(job)
        except UserError as error:
            errors.append(error)
    if errors:
        more = f" (and {len(errors) - 1} more videos like it)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}: name another --output, or replace them with --overwrite")
    return pending


def _run(config: ExtractConfig, jobs: Sequence[Job]) -> Iterator[ExtractResult]:
    """Yield the results of jobs under a progress bar; closing the iterator stops the work."""
    if not jobs:
        return
    with _Progress(jobs) as progress:
        if config.engine == "ray":
            results = engines.run_on_ray(extract_job, jobs, config.workers, config.ray_address)
        elif config.workers > 1:
            results = engines.run_in_processes(extract_job, jobs, config.workers)
        else:
            results = (extract_job(job, progress.add) for job in jobs)
        with contextlib.closing(results):
            for result in results:
                progress.finish(result)
                yield result


def _print_summary(config: ExtractConfig, done: int, existing: int, frames: int, seconds: float) -> None:
    rate = f", {frames / seconds:.0f} frames/s" if frames else ""
    print(f"{done} videos extracted ({frames} frames in {seconds:.0f} s{rate}), {existing} existed already")
    if done + existing:
        length = 1 if config.options.reduce == "none" else config.options.stride
        flag = "" if length == 16 else f" --frames-per-snippet {length}"
        print(f"features in {config.output}, with their options in {config.output}/manifest*.jsonl")
        print(f"next: python -m clipfusionvad lists --dataset NAME --features {config.output} --output list{flag}")


class _Progress:
    """A progress bar in frames; their total is estimated from the first video, then from the frames per byte."""

    def __init__(self, jobs: Sequence[Job]):
        self.sizes = {job.name: job.bytes or 1 for job in jobs}
        self.all, self.bytes, self.finished, self.partial = sum(self.sizes.values()), 0, 0, 0
        self.bar = tqdm(desc="extract", unit="frame", disable=None)
        with contextlib.suppress(UserError):
            self._estimate(probe(jobs[0].source).frames or 0, self.sizes[jobs[0].name])

    def add(self, frames: int) -> None:
        """Add frames of the current video."""
        self.partial += frames
        self.bar.update(frames)

    def finish(self, result: ExtractResult) -> None:
        self.bar.update(max(0, (result.record or {}).get("frames", 0) - self.partial))
        self.partial = 0
        self.finished += 1
        size = self.sizes[result.job.name]
        if result.record:
            self.bytes += size
        else:
            self.all -= size
        self._estimate(self.bar.n, self.bytes)
        self.bar.set_postfix_str(f"{self.finished} of {len(self.sizes)} videos")

    def _estimate(self, frames: int, size: int) -> None:
        if frames and size:
            self.bar.total = round(frames * self.all / size)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()


def extract_job(job: Job, on_frames: Callable[[int], object] = lambda count: None) -> ExtractResult:
    """Run ``extract_video``; a bad video is a result, so that other videos continue. A full disk stops everything."""
    try:
        return ExtractResult(job, extract_video(job, on_frames))
    except CannotWrite:
        raise
    except UserError as error:
        return ExtractResult(job, error=" ".join(str(error).split()))


def extract_video(job: Job, on_frames: Callable[[int], object] = lambda count: None) -> dict[str, Any]:
    """Write the feature files of a video, either all or none, and return its record.

    The record holds encoder, fps, frames, rows and files, size and SHA-256 of the video, and the seconds taken.
    ``on_frames`` gets the number of frames after each piece. The encoder is built once in a process.

    Raises ``UserError`` for a video that cannot be read to its end (``BrokenVideo``) or that gives no row.
    """
    started = time.perf_counter()
    encoder, model = _load(job.encoder)
    snippets = SnippetEncoder(encoder, job.options)
    for path in job.paths:
        check_inside(job.output, path.parent)
        remove_leftovers(path.parent, path.name)
    infos: list[VideoInfo] = []
    frames = rows = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open_features(path, encoder.dim, job.dtype)) for path in job.paths]
        pieces = stack.enter_context(contextlib.closing(prefetch(_read_pieces(job, snippets.size, infos.append))))
        for piece in pieces:
            rows += _write_rows(files, snippets.add(piece), job)
            frames += len(piece)
            on_frames(len(piece))
        rows += _write_rows(files, snippets.finish(), job)
        if rows == 0:
            raise UserError(
                f"{job.source} has {frames} frames, too few for a row of {job.options.stride} "
                f"(--tail ceil gives shorter chunks a row too)"
            )
    return {
        "source": job.source,
        "bytes": job.bytes,
        "sha256": None if job.bytes is None else hash_file(job.source),
        "model": model,
        "options": job.recorded_options(),
        "fps": infos[0].fps,
        "frames": frames,
        "rows": rows,
        "files": job.files,
        "seconds": round(time.perf_counter() - started, 3),
    }


def check_encoder(encoder: EncoderConfig) -> str:
    """Return the fingerprint of the image encoder; ``UserError`` if it does not exist or cannot run here."""
    weights = _weights(encoder.clip, encoder.embed_dim)
    image_tower(weights)
    check_precision(pick_device(encoder.device), encoder.precision)
    return weights.image_fingerprint


# A check of an encoder is mostly followed by its use.
_weights = functools.lru_cache(maxsize=1)(load_clip)


@functools.lru_cache(maxsize=1)
def _load(config: EncoderConfig) -> tuple[ImageEncoder, dict[str, Any]]:
    """Return the encoder and its entry in the record."""
    weights = _weights(config.clip, config.embed_dim)
    encoder = ImageEncoder(weights, pick_device(config.device), config.precision, config.batch_size)
    return encoder, {"clip": config.clip, "fingerprint": weights.image_fingerprint, "dim": encoder.dim}


def _read_pieces(
    job: Job, size: int, on_info: Callable[[VideoInfo], object]
) -> Generator[list[np.ndarray], None, None]:
    """Yield the video's frames, resized to the canvas of the crops, in pieces."""
    piece: list[np.ndarray] = []
    with contextlib.closing(read_frames(job.source, on_info)) as frames:
        for frame in frames:
            piece.append(to_canvas(frame, job.options.resize, size))
            if len(piece) == _PIECE:
                yield piece
                piece = []
    yield piece


def _write_rows(files: list[BinaryIO], rows: np.ndarray, job: Job) -> int:
    """Append rows (crops, rows, D) to the files of the crops; return the number of rows."""
    with np.errstate(over="ignore"):
        stored = rows.astype(job.dtype)
    if job.options.event_empty != "nan" and not np.isfinite(stored).all():
        raise UserError(
            f"{job.source}: features exceed the range of {job.encoder.precision} or {job.dtype}; use a wider type"
        )
    for file, crop in zip(files, stored, strict=True):
        file.write(crop.tobytes())
    return rows.shape[1]


@contextlib.contextmanager
def _open_features(path: Path, dim: int, dtype: str) -> Iterator[BinaryIO]:
    """Open a .npy file to append rows to; it appears under its name when it is complete."""
    with atomic_write(path) as file:
        file.write(_npy_header(0, dim, dtype))
        start = file.tell()
        yield file
        rows = (file.tell() - start) // (dim * np.dtype(dtype).itemsize)
        file.seek(0)
        file.write(_npy_header(rows, dim, dtype))


def _npy_header(rows: int, dim: int, dtype: str) -> bytes:
    """Return the header that ``np.save`` writes; numpy leaves room for the number of rows to grow."""
    header = io.BytesIO()
    shape = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, dim)}
    np.lib.format.write_array_header_1_0(header, shape)
    return header.getvalue()
