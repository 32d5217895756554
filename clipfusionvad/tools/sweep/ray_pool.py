"""Trials on Ray: on this machine, or on every machine of a cluster that shares its files.

A task is a trial. One whose worker is lost is begun again elsewhere, and goes on from what it had saved.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from clipfusionvad.engine.device import count_cores
from clipfusionvad.engine.ray_session import import_ray, session
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.signals import stop_on_signals
from clipfusionvad.tools.sweep.pool import Next, Work
from clipfusionvad.tools.sweep.trials import Outcome, Trial

# How often a trial is begun again because its worker or the worker's machine was lost.
RETRIES = 3
# Seconds between two looks for a signal.
_PATIENCE = 0.2


def run_trials(following: Next, work: Work, jobs: int, address: str | None = None) -> Iterator[tuple[Trial, Outcome]]:
    """Each trial with its outcome as it comes, ``jobs`` at a time, as ``pool.run_trials`` does.

    Every machine needs this package, and sees data and output under the same paths. A trial has its share of the
    CPUs and, where there are GPUs, at most one of them. SIGINT and SIGTERM let the trials under way save their state.
    Raises ``UserError`` without Ray and where no cluster answers.
    """
    ray = import_ray()
    stop = threading.Event()
    # Within the session, which has handlers of its own at first.
    with session(ray, max(jobs, count_cores()), address), stop_on_signals(stop):
        task = _task(ray, jobs)
        running: dict[Any, Trial] = {}
        asked = False
        while True:
            while not stop.is_set() and len(running) < jobs and (trial := following()):
                running[task.remote(work, trial, os.getcwd())] = trial
            if not running:
                return
            if stop.is_set() and not asked:
                asked = True
                for reference in running:
                    ray.cancel(reference, force=False)
            done, _ = ray.wait(list(running), num_returns=1, timeout=_PATIENCE)
            for reference in done:
                trial = running.pop(reference)
                yield trial, _outcome(ray, reference, trial)


def _task(ray: ModuleType, jobs: int) -> Any:
    """What Ray runs: a trial with its share of the CPUs, which no single machine has more of, and of the GPUs."""
    machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    cpus = max(1, int(min(sum(machines) / jobs, max(machines))))
    gpus = min(1, ray.cluster_resources().get("GPU", 0) / jobs)

    def train_trial(work: Work, trial: Trial, folder: str) -> Outcome:
        os.chdir(folder)
        return work(trial)

    # Ray gives a worker as many threads as CPUs, unless OMP_NUM_THREADS says otherwise.
    # What cannot be trained comes back as an outcome: only a lost worker is a reason to try again.
    return ray.remote(train_trial).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, retry_exceptions=False)


def _outcome(ray: ModuleType, done: Any, trial: Trial) -> Outcome:
    try:
        return ray.get(done)
    except ray.exceptions.TaskCancelledError:
        return Outcome(stopped=True)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, KeyboardInterrupt):
            return Outcome(stopped=True)
        # A bug of ours that the worker ran into, with its traceback.
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{trial.cell}, seed {trial.seed}: its worker was lost {RETRIES + 1} times ({reason}); out of memory? The "
            f"same command goes on from here, with fewer --jobs if need be"
        ) from error
