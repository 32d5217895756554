"""Run trials on Ray: on this machine, or on a cluster whose machines share their files.

A task is a trial. If its worker is lost, another one restarts it from its last saved state.
"""

import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from clipfusionvad.engine.device import count_cores
from clipfusionvad.engine.ray_session import import_ray, session
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.signals import stop_on_signals
from clipfusionvad.tools.sweep.pool import PATIENCE, NextTrial, Work
from clipfusionvad.tools.sweep.trials import Trial, TrialEnd

# How often a trial is restarted because its worker or the worker's machine was lost.
RETRIES = 3


def run_trials(
    next_trial: NextTrial, work: Work, jobs: int, address: str | None = None
) -> Iterator[tuple[Trial, TrialEnd]]:
    """Yield each trial with its end as it comes, ``jobs`` at a time, as ``pool.run_trials`` does.

    Every machine needs this package, and data and output under the same paths. A trial gets its share of the CPUs and
    at most one GPU. On SIGINT or SIGTERM the running trials save their state. Raises ``UserError`` without Ray and
    where no cluster answers.
    """
    ray = import_ray()
    stop = threading.Event()
    # Inside the session, which sets its own handlers first.
    with session(ray, max(jobs, count_cores()), address), stop_on_signals(stop):
        task = _task(ray, jobs)
        running: dict[Any, Trial] = {}
        asked = False
        while True:
            while not stop.is_set() and len(running) < jobs and (trial := next_trial()):
                running[task.remote(work, trial, os.getcwd())] = trial
            if not running:
                return
            if stop.is_set() and not asked:
                asked = True
                for reference in running:
                    ray.cancel(reference, force=False)
            done, _ = ray.wait(list(running), num_returns=1, timeout=PATIENCE)
            for reference in done:
                trial = running.pop(reference)
                yield trial, _end_of(ray, reference, trial)


def _task(ray: ModuleType, jobs: int) -> Any:
    """Return the remote function of a trial, with its share of the CPUs (at most one machine's) and GPUs."""
    machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    cpus = max(1, int(min(sum(machines) / jobs, max(machines))))
    gpus = min(1, ray.cluster_resources().get("GPU", 0) / jobs)

    def train_trial(work: Work, trial: Trial, folder: str) -> TrialEnd:
        os.chdir(folder)
        return work(trial)

    # Ray gives a worker as many threads as CPUs, unless OMP_NUM_THREADS says otherwise.
    # A failed training is returned as a result: only a lost worker is a reason to retry.
    return ray.remote(train_trial).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, retry_exceptions=False)


def _end_of(ray: ModuleType, done: Any, trial: Trial) -> TrialEnd:
    try:
        return ray.get(done)
    except ray.exceptions.TaskCancelledError:
        return TrialEnd(stopped=True)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, KeyboardInterrupt):
            return TrialEnd(stopped=True)
        # A bug in the worker, with its traceback.
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{trial.cell}, seed {trial.seed}: its worker was lost {RETRIES + 1} times ({reason}); out of memory? The "
            f"same command continues from here, with fewer --jobs if necessary"
        ) from error
