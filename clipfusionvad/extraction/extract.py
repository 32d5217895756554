"""From videos to feature files: ``extract`` runs the jobs of a command here, in processes or on a Ray cluster.

Decoding, encoding and writing of a video run at the same time and in constant memory.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from clipfusionvad.data.loaders import prefetch
from clipfusionvad.engine.device import count_cores, pick_device
from clipfusionvad.engine.ray_session import import_ray, session
from clipfusionvad.extraction.decode import DEFAULT_FPS, VideoInfo, batched, read_frames
from clipfusionvad.extraction.encoder import ImageEncoder, check_precision
from clipfusionvad.extraction.jobs import EncoderConfig, ExtractConfig, FeatureManifest, Job, check_name, find_videos
from clipfusionvad.extraction.pictures import is_pictures, note_rate, step_of
from clipfusionvad.extraction.snippets import SnippetEncoder, to_canvas
from clipfusionvad.io.errors import UserError, printable, warn
from clipfusionvad.io.files import CannotWrite, atomic_write, check_inside, hash_file, hold, remove_leftovers
from clipfusionvad.io.progress import ProgressBar
from clipfusionvad.io.provenance import code
from clipfusionvad.models.clip import image_tower, load_clip

# Frames that the decoding thread hands over at once.
_PIECE = 32
# How often Ray restarts a video after the loss of its worker or of the worker's machine.
RETRIES = 3
#: Jobs in any order, each with its record in the manifest; that of a video that failed holds the ``error``.
Results = Generator[tuple[Job, dict[str, Any]], None, None]


def extract(config: ExtractConfig) -> int:
    """Extract the features of all videos that are not done yet; return the exit code, 1 if a video failed."""
    if config.ray_address and config.engine != "ray":
        raise UserError("--ray-address is for --engine ray")
    shard, encoder = None, config.encoder
    if config.shard is not None:
        number, _, of = config.shard.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise UserError(f"--shard must be I/N with I from 1 to N, got {config.shard!r}")
        shard = int(number), int(of)
    options = replace(config.options, crops=tuple(config.crop_ids or range(config.crops)))
    if options.stream == "event":
        if config.event_clip is None:
            warn(f"event images are encoded by --clip {encoder.clip}, which was trained on pictures; see --event-clip")
        encoder = replace(encoder, clip=config.event_clip or encoder.clip)
    videos = find_videos(config.videos)
    if config.fps is None:
        note_rate((source for source, _ in videos), DEFAULT_FPS)
    jobs = [Job(source, name, config.output, options, encoder, config.dtype, config.fps) for source, name in videos]
    with contextlib.ExitStack() as locks:
        # Shards share the folder. Each may run once at a time, and not beside a run of all videos.
        locks.enter_context(hold(config.output, shared=shard is not None))
        if shard:
            locks.enter_context(hold(config.output, f".lock-{shard[0]}-of-{shard[1]}"))
            # Every N-th video, so that shards have similar sizes.
            jobs = jobs[shard[0] - 1 :: shard[1]]
        fingerprint = ""
        # A shard may have no videos. Else an encoder that cannot be loaded or run here would fail each of them.
        if jobs:
            image_tower(weights := _weights(encoder.clip, encoder.embed_dim))
            check_precision(pick_device(encoder.device), encoder.precision)
            fingerprint = weights.image_fingerprint
        return _extract_jobs(config, jobs, FeatureManifest(config.output, shard), fingerprint)


def _extract_jobs(config: ExtractConfig, jobs: Sequence[Job], manifest: FeatureManifest, fingerprint: str) -> int:
    pending = jobs if config.overwrite else _pending(jobs, manifest, fingerprint)
    for job in pending:
        manifest.append(job.name, "begun", {"source": job.source})
    started, frames, failed = time.perf_counter(), 0, 0
    size = sum(job.bytes or 0 for job in pending)
    bar = ProgressBar(total=size, desc="extract", unit="B", unit_scale=True, disable=None if pending else True)
    results = ((job, extract_job(job, lambda n: bar.set_postfix_str(f"{n} frames of this video"))) for job in pending)
    if config.engine == "ray" and pending:
        results = run_on_ray(pending, config.workers, config.ray_address)
    elif config.workers > 1 and pending:
        results = run_in_processes(pending, config.workers)
    try:
        # Closing the results stops the work and removes partly written files.
        with bar, contextlib.closing(results):
            for count, (job, record) in enumerate(results, 1):
                if error := record.get("error"):
                    manifest.append(job.name, "failed", record)
                    tqdm.write(f"failed: {printable(error)}", file=sys.stderr)
                    failed += 1
                else:
                    manifest.append(job.name, "done", record | {"code": code()})
                    frames += record["frames"]
                bar.update(job.bytes or 0)
                bar.set_postfix_str(f"{count} of {len(pending)} videos, {frames} frames")
    except KeyboardInterrupt:
        print(f"finished videos are kept in {config.output}; the same command continues from there", file=sys.stderr)
        raise
    seconds, done, existing = time.perf_counter() - started, len(pending) - failed, len(jobs) - len(pending)
    rate = f", {frames / seconds:.0f} frames/s" if frames else ""
    print(f"{done} videos extracted ({frames} frames in {seconds:.0f} s{rate}), {existing} existed already")
    if done + existing:
        # Annotations count the frames of the original video.
        length = (1 if config.options.reduce == "none" else config.options.stride) * step_of(jobs[0].source)
        flag = "" if length == 16 else f" --frames-per-snippet {length}"
        print(f"features in {config.output}, with their options in {config.output}/manifest*.jsonl")
        print(f"next: python -m clipfusionvad lists --dataset NAME --features {config.output} --output list{flag}")
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


def run_in_processes(jobs: Sequence[Job], workers: int) -> Results:
    """Run jobs in ``workers`` processes, which start them in the given order."""
    threads = max(1, count_cores() // workers)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (threads,))
    unfinished = {pool.submit(extract_job, job): job for job in jobs}
    try:
        for future in as_completed(list(unfinished)):
            record = future.result()
            yield unfinished.pop(future), record
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died, {len(unfinished)} videos are left (out of memory?): repeat the command to "
            f"continue, with fewer --workers if necessary"
        ) from error
    finally:
        if unfinished:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
                process.join()
        pool.shutdown()
        _remove_partial(unfinished.values())


def _start_worker(threads: int) -> None:
    """Give a new worker its share of the cores. It ignores Ctrl-C and ends with the main process."""
    import cv2
    import torch

    def end_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()


def run_on_ray(jobs: Sequence[Job], workers: int, address: str | None = None) -> Results:
    """Run jobs as Ray tasks, ``workers`` at a time, in their order and with few of them waiting.

    ``address`` is that of a running cluster ("auto" finds the one that this machine belongs to); without it and
    without RAY_ADDRESS, Ray starts on this machine. Every machine of a cluster needs this package and the same paths
    to videos, weights and output. Ray starts a lost worker's video again. ``UserError`` without Ray or a cluster.
    """
    ray = import_ray()
    waiting, running = iter(jobs), dict[Any, Job]()
    try:
        with session(ray, workers, address):
            on_gpu = any(job.encoder.device != "cpu" for job in jobs)
            gpus = ray.cluster_resources().get("GPU", 0) if on_gpu else 0
            # A bad video is a result: only a lost worker is a reason to retry.
            needs = {"num_cpus": 1, "num_gpus": min(1, gpus / workers)}
            task = ray.remote(extract_job).options(**needs, max_retries=RETRIES, retry_exceptions=False)
            while True:
                # Two wait for each that runs: enough to keep workers busy, few enough to hold in memory.
                running |= {task.remote(job): job for job in islice(waiting, 3 * workers - len(running))}
                if not running:
                    return
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                try:
                    record = ray.get(done)
                except ray.exceptions.RayTaskError:
                    # A bug in this package, with the worker's traceback.
                    raise
                except ray.exceptions.RayError as error:
                    lost = f"its worker was lost {RETRIES + 1} times ({str(error).splitlines()[0]}); out of memory?"
                    record = {"source": running[done].source, "error": f"{running[done].source}: {lost}"}
                yield running.pop(done), record
    finally:
        _remove_partial(running.values())


def _remove_partial(jobs: Iterable[Job]) -> None:
    """Remove the files that stopped workers were writing."""
    for path in (path for job in jobs for path in job.paths):
        remove_leftovers(path.parent, path.name)


def extract_job(job: Job, on_frames: Callable[[int], object] = lambda count: None) -> dict[str, Any]:
    """Run ``extract_video``; a bad video gives a record too, so that others continue. A full disk stops everything."""
    try:
        return extract_video(job, on_frames)
    except CannotWrite:
        raise
    except UserError as error:
        return {"source": job.source, "error": " ".join(str(error).split())}


def extract_video(job: Job, on_frames: Callable[[int], object] = lambda count: None) -> dict[str, Any]:
    """Write the feature files of a video, either all or none, and return its record.

    The record holds encoder, fps, frames (every ``step``-th of the original), rows and files, the video's size, SHA-256
    (none of pictures) and duration, where its ``times`` come from, and the seconds taken.
    ``on_frames`` gets the number of frames so far. The encoder is built once in a process.

    Raises ``UserError`` for a video that cannot be read to its end (``BrokenVideo``) or that gives no row.
    """
    started = time.perf_counter()
    check_name(job.source, job.name)
    encoder, model = _load(job.encoder)
    snippets = SnippetEncoder(encoder, job.options)
    for path in job.paths:
        check_inside(job.output, path.parent)
        remove_leftovers(path.parent, path.name)
    infos: list[VideoInfo] = []
    last = deque[float](maxlen=1)
    frames = rows = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open_features(path, encoder.dim, job.dtype)) for path in job.paths]
        decoded = stack.enter_context(contextlib.closing(read_frames(job.source, infos.append, last.append, job.fps)))
        canvases = (to_canvas(frame, job.options.resize, snippets.size) for frame in decoded)
        for piece in stack.enter_context(contextlib.closing(prefetch(batched(canvases, _PIECE)))):
            rows += _write_rows(files, snippets.add(piece), job)
            frames += len(piece)
            on_frames(frames)
        rows += _write_rows(files, snippets.finish(), job)
        if rows == 0:
            raise UserError(
                f"{job.source} has {frames} frames, too few for a row of {job.options.stride} "
                f"(with --tail ceil a shorter chunk becomes a row)"
            )
    duration = infos[0].end(frames, last[0])
    return {
        "source": job.source,
        "bytes": job.bytes,
        "sha256": None if job.bytes is None or is_pictures(job.source) else hash_file(job.source),
        "model": model,
        "options": job.recorded_options(),
        "fps": infos[0].measured(frames, duration).fps,
        "times": infos[0].times,
        "duration": round(duration, 6),
        "frames": frames,
        "step": step_of(job.source),
        "rows": rows,
        "files": job.files,
        "seconds": round(time.perf_counter() - started, 3),
    }


# A check of an encoder is mostly followed by its use.
_weights = functools.lru_cache(maxsize=1)(load_clip)


@functools.lru_cache(maxsize=1)
def _load(config: EncoderConfig) -> tuple[ImageEncoder, dict[str, Any]]:
    """Return the encoder and its entry in the record."""
    weights = _weights(config.clip, config.embed_dim)
    encoder = ImageEncoder(weights, pick_device(config.device), config.precision, config.batch_size)
    return encoder, {"clip": weights.source, "fingerprint": weights.image_fingerprint, "dim": encoder.dim}


def _write_rows(files: list[BinaryIO], rows: np.ndarray, job: Job) -> int:
    """Append rows (crops, rows, D) to the files of the crops; return the number of rows."""
    with np.errstate(over="ignore"):
        stored = rows.astype(job.dtype)
    if job.options.event_empty != "nan" and not np.isfinite(stored).all():
        raise UserError(f"{job.source}: features exceed {job.encoder.precision} or {job.dtype}; use a wider type")
    for file, crop in zip(files, stored, strict=True):
        file.write(crop.tobytes())
    return rows.shape[1]


@contextlib.contextmanager
def _open_features(path: Path, dim: int, dtype: str) -> Iterator[BinaryIO]:
    """Open a .npy file to append rows to; it appears under its name when it is complete."""
    head = {"descr": np.dtype(dtype).str, "fortran_order": False}
    with atomic_write(path) as file:
        # numpy leaves room in the header for the number of rows to grow.
        np.lib.format.write_array_header_1_0(file, head | {"shape": (0, dim)})
        start = file.tell()
        yield file
        rows = (file.tell() - start) // (dim * np.dtype(dtype).itemsize)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, head | {"shape": (rows, dim)})
