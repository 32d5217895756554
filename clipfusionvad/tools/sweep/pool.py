"""Run trials: one after another in this process, several at a time in worker processes, or on Ray.

On Ray a task is a trial. If its worker is lost, another one restarts it from its last saved state. Every machine of the
cluster needs this package, and data and output under the same paths.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from clipfusionvad.engine.device import count_cores
from clipfusionvad.engine.ray_session import import_ray, session
from clipfusionvad.io.errors import UserError, stop_on_signals
from clipfusionvad.tools.sweep.sweep import Trial, TrialEnd

Work = Callable[[Trial], TrialEnd]
# Seconds between two looks for a signal.
_PATIENCE = 0.2
# How often a trial is restarted because its worker or the worker's machine was lost.
_RETRIES = 3
_CONTINUE = "same command continues from here, with fewer --jobs if necessary"


def run_trials(
    next_trial: Callable[[], Trial | None], work: Work, jobs: int, engine: str, ray_address: str | None
) -> Iterator[tuple[Trial, TrialEnd]]:
    """Yield each trial with its end as it comes, ``jobs`` at a time, until no trial is running or left.

    ``next_trial`` returns None where there is none at present. On SIGINT or SIGTERM the running trials save their state
    and end as stopped. Raises ``UserError`` where a process is lost, and for "ray" without Ray or a cluster.
    """
    if engine == "local" and jobs == 1:
        while trial := next_trial():
            end = work(trial)
            yield trial, end
            if end.stopped:
                return
        return
    stop, asked, running = threading.Event(), False, dict[Any, Trial]()
    workers = _RayWorkers(jobs, ray_address) if engine == "ray" else _Processes(jobs)
    # Ray's session has set its own handlers already.
    with workers, stop_on_signals(stop):
        while True:
            while not stop.is_set() and len(running) < jobs and (trial := next_trial()):
                running[workers.submit(work, trial)] = trial
            if not running:
                return
            if stop.is_set() and not asked:
                asked = True
                workers.stop(running)
            for done in workers.wait(running):
                trial = running.pop(done)
                yield trial, workers.end_of(done, trial)


class _Processes:
    """Worker processes on this machine, each with its share of the cores and, in turn, one GPU."""

    def __init__(self, jobs: int):
        context = multiprocessing.get_context("spawn")
        gpus, count = context.SimpleQueue(), torch.cuda.device_count()
        for index in range(jobs):
            gpus.put(index % count if count else None)
        self.executor = ProcessPoolExecutor(jobs, context, _init_worker, (max(1, count_cores() // jobs), gpus))
        self.running, self.stopped = set[Future[TrialEnd]](), False

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.running:
            for process in multiprocessing.active_children():
                process.kill()
        self.executor.shutdown(cancel_futures=True)

    def submit(self, work: Work, trial: Trial) -> Future[TrialEnd]:
        future = self.executor.submit(_interruptible, work, trial)
        self.running.add(future)
        return future

    def stop(self, running: Iterable[Any]) -> None:
        self.stopped = True
        for process in multiprocessing.active_children():
            process.terminate()

    def wait(self, running: Iterable[Future[TrialEnd]]) -> Iterable[Future[TrialEnd]]:
        return wait(running, _PATIENCE, FIRST_COMPLETED).done

    def end_of(self, future: Future[TrialEnd], trial: Trial) -> TrialEnd:
        self.running.discard(future)
        try:
            return future.result()
        except BrokenProcessPool as error:
            if self.stopped:
                # Before the training had started.
                return TrialEnd(stopped=True)
            raise UserError(f"a process that trains died (out of memory?): the {_CONTINUE}") from error


def _init_worker(threads: int, gpus: multiprocessing.queues.SimpleQueue[int | None]) -> None:
    # Ctrl-C in a terminal is for the first process, which passes it on. Without process groups, it is ignored here.
    if hasattr(os, "setsid"):
        os.setsid()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if (gpu := gpus.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _interruptible(work: Work, trial: Trial) -> TrialEnd:
    """Run a trial that SIGTERM stops, also before and after the training steps, which handle it themselves."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work(trial)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


class _RayWorkers(contextlib.ExitStack):
    """Ray, on this machine or on a cluster: a trial gets its share of the CPUs (of one machine) and at most one GPU."""

    def __init__(self, jobs: int, address: str | None):
        super().__init__()
        self.ray = ray = import_ray()
        self.enter_context(session(ray, max(jobs, count_cores()), address))
        machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        cpus = max(1, int(min(sum(machines) / jobs, max(machines))))
        gpus = min(1, ray.cluster_resources().get("GPU", 0) / jobs)

        def train_trial(work: Work, trial: Trial, folder: str) -> TrialEnd:
            os.chdir(folder)
            return work(trial)

        # Ray gives a worker as many threads as CPUs, unless OMP_NUM_THREADS says otherwise.
        # A failed training is returned as a result: only a lost worker is a reason to retry.
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": _RETRIES, "retry_exceptions": False}
        self.task = ray.remote(train_trial).options(**options)

    def submit(self, work: Work, trial: Trial) -> Any:
        return self.task.remote(work, trial, os.getcwd())

    def stop(self, running: Iterable[Any]) -> None:
        for reference in running:
            self.ray.cancel(reference, force=False)

    def wait(self, running: Iterable[Any]) -> Iterable[Any]:
        done: list[Any] = self.ray.wait(list(running), num_returns=1, timeout=_PATIENCE)[0]
        return done

    def end_of(self, done: Any, trial: Trial) -> TrialEnd:
        errors = self.ray.exceptions
        try:
            end: TrialEnd = self.ray.get(done)
            return end
        except errors.TaskCancelledError:
            return TrialEnd(stopped=True)
        except errors.RayTaskError as error:
            if isinstance(error.cause, KeyboardInterrupt):
                return TrialEnd(stopped=True)
            # A bug in the worker, with its traceback.
            raise
        except errors.RayError as error:
            lost = f"its worker was lost {_RETRIES + 1} times ({str(error).splitlines()[0]}); out of memory?"
            raise UserError(f"{trial.cell}, seed {trial.seed}: {lost} The {_CONTINUE}") from error
