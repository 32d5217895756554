"""Extraction on this machine: in this process, or in several that take one video after another."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import cv2
import torch

from clipfusionvad.extraction.extract import Outcome, attempt, remove_leftovers
from clipfusionvad.extraction.jobs import Job
from clipfusionvad.io.errors import UserError


def run(
    jobs: Sequence[Job], workers: int = 1, on_frames: Callable[[int], object] = lambda count: None
) -> Iterator[Outcome]:
    """The outcome of each job as it comes; jobs are started in the given order.

    ``on_frames`` is told about frames of the video under way where there is one worker, which is this process.
    Leaving the iteration stops the workers; what they had half-written is removed.
    """
    if workers == 1:
        for job in jobs:
            yield attempt(job, on_frames)
        return
    # Cores that this process may use, not those of the machine.
    threads = max(1, len(os.sched_getaffinity(0)) // workers) if hasattr(os, "sched_getaffinity") else 1
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (threads,))
    open_jobs = {pool.submit(attempt, job): job for job in jobs}
    try:
        for future in as_completed(list(open_jobs)):
            outcome = future.result()
            del open_jobs[future]
            yield outcome
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died with {len(open_jobs)} videos to go (out of memory?): the same command goes on from "
            f"here, with fewer --workers if need be"
        ) from error
    finally:
        _stop(pool, list(open_jobs.values()))


def _stop(pool: ProcessPoolExecutor, left: Sequence[Job]) -> None:
    if left:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()
    pool.shutdown()
    for job in left:
        remove_leftovers(job)


def _start(threads: int) -> None:
    """In a new worker: its share of the cores; Ctrl-C is for the first process, without which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
