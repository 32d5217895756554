"""Extraction on Ray: on this machine, or on every machine of a cluster.

A task is a video. A worker that dies takes its videos with it and nothing else: Ray gives them to another one, which
begins them anew, and since files appear whole or not at all the result is that of any other run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from clipfusionvad.engine.ray_session import import_ray, session
from clipfusionvad.extraction.extract import Outcome, attempt, remove_leftovers
from clipfusionvad.extraction.jobs import Job

# How often a video is begun anew because its worker or the worker's machine was lost.
RETRIES = 3
# Tasks that wait for each one that runs: enough to keep workers busy, few enough to hold in memory.
_WAITING = 2


def run(
    jobs: Sequence[Job],
    workers: int = 1,
    on_frames: Callable[[int], object] = lambda count: None,
    address: str | None = None,
) -> Iterator[Outcome]:
    """The outcome of each job as it comes; ``workers`` videos at a time are worked on.

    ``address`` is that of a running cluster ("auto" finds the one this machine is part of); without one here or in
    RAY_ADDRESS, Ray is started on this machine alone.
    On a cluster every machine needs this package and sees videos, weights and output under the same paths.
    ``on_frames`` is told about the frames of whole videos. Leaving the iteration stops the work; what it had
    half-written is removed. Raises ``UserError`` without Ray and where no cluster answers.
    """
    ray = import_ray()
    left = {index: job for index, job in enumerate(jobs)}
    try:
        with session(ray, workers, address):
            for index, outcome in _outcomes(ray, left, workers):
                del left[index]
                if outcome.record:
                    on_frames(outcome.record["frames"])
                yield outcome
    finally:
        for job in left.values():
            remove_leftovers(job)


def _outcomes(ray: ModuleType, jobs: dict[int, Job], workers: int) -> Iterator[tuple[int, Outcome]]:
    """Start jobs in their order, never more than a few that wait, and give what they come to as it comes."""
    wanting_gpu = any(job.model.device != "cpu" for job in jobs.values())
    gpus = ray.cluster_resources().get("GPU", 0) if wanting_gpu else 0
    # Bad videos come back as outcomes: only a lost worker is a reason to try again.
    task = ray.remote(attempt).options(
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
        yield index, _outcome(ray, done, jobs[index])


def _outcome(ray: ModuleType, done: Any, job: Job) -> Outcome:
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError:
        # A bug of ours that the worker ran into, with its traceback.
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).splitlines()[0]
        return Outcome(job, error=f"{job.source}: its worker was lost {RETRIES + 1} times ({reason}); out of memory?")
