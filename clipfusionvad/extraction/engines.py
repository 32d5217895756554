"""Run extraction jobs in several processes of this machine, or on a Ray cluster.

Both yield a result per job in any order. Closing the iterator stops the work and removes partly written files.
``work`` is the function that turns a job into its result.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType
from typing import Any

from clipfusionvad.engine.ray_session import import_ray, session
from clipfusionvad.extraction.jobs import ExtractResult, Job
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import remove_leftovers

Work = Callable[[Job], ExtractResult]

# How often Ray restarts a video after the loss of its worker or of the worker's machine.
RETRIES = 3
# Ray tasks that wait for each running one: enough to keep workers busy, few enough to hold in memory.
_WAITING = 2


def run_in_processes(work: Work, jobs: Sequence[Job], workers: int) -> Generator[ExtractResult, None, None]:
    """Run jobs in ``workers`` processes, which start them in the given order."""
    # The cores that this process may use, not those of the machine.
    threads = max(1, len(os.sched_getaffinity(0)) // workers) if hasattr(os, "sched_getaffinity") else 1
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (threads,))
    unfinished = {pool.submit(work, job): job for job in jobs}
    try:
        for future in as_completed(list(unfinished)):
            result = future.result()
            del unfinished[future]
            yield result
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died with {len(unfinished)} videos to go (out of memory?): repeat the command to "
            f"continue, with fewer --workers if necessary"
        ) from error
    finally:
        if unfinished:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
                process.join()
        pool.shutdown()
        _clean(unfinished.values())


def _start_worker(threads: int) -> None:
    """Give a new worker its share of the cores. It ignores Ctrl-C and ends with the main process."""
    import cv2
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def run_on_ray(
    work: Work, jobs: Sequence[Job], workers: int, address: str | None = None
) -> Generator[ExtractResult, None, None]:
    """Run jobs as Ray tasks, ``workers`` at a time.

    ``address`` is that of a running cluster ("auto" finds the one that this machine belongs to); without it and
    without RAY_ADDRESS, Ray starts on this machine. Every machine of a cluster needs this package and the same paths
    to videos, weights and output. If a worker dies, Ray starts its video again on another one. Raises ``UserError``
    without Ray and if no cluster answers.
    """
    ray = import_ray()
    unfinished = dict(enumerate(jobs))
    try:
        with session(ray, workers, address):
            for index, result in _ray_results(ray, work, unfinished, workers):
                del unfinished[index]
                yield result
    finally:
        _clean(unfinished.values())


def _ray_results(
    ray: ModuleType, work: Work, jobs: dict[int, Job], workers: int
) -> Iterator[tuple[int, ExtractResult]]:
    """Start jobs in their order, with few of them waiting, and yield results as they arrive."""
    on_gpu = any(job.encoder.device != "cpu" for job in jobs.values())
    gpus = ray.cluster_resources().get("GPU", 0) if on_gpu else 0
    # A bad video is a result: only a lost worker is a reason to retry.
    task = ray.remote(work).options(
        num_cpus=1, num_gpus=min(1, gpus / workers), max_retries=RETRIES, retry_exceptions=False
    )
    waiting = iter(list(jobs.items()))
    running: dict[Any, int] = {}
    while True:
        while len(running) < (1 + _WAITING) * workers and (following := next(waiting, None)):
            index, job = following
            running[task.remote(job)] = index
        if not running:
            return
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        index = running.pop(done)
        try:
            yield index, ray.get(done)
        except ray.exceptions.RayTaskError:
            # A bug in this package, with the worker's traceback.
            raise
        except ray.exceptions.RayError as error:
            reason = str(error).splitlines()[0]
            line = f"{jobs[index].source}: its worker was lost {RETRIES + 1} times ({reason}); out of memory?"
            yield index, ExtractResult(jobs[index], error=line)


def _clean(jobs: Any) -> None:
    """Remove the files that stopped workers were writing."""
    for job in jobs:
        for path in job.paths:
            remove_leftovers(path.parent, path.name)
