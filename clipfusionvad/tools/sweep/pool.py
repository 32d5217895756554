"""Run trials: one after another in this process, or several at a time in worker processes."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from clipfusionvad.engine.device import count_cores
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.signals import stop_on_signals
from clipfusionvad.tools.sweep.trials import Trial, TrialEnd

#: Returns the next trial, or None where there is none at present.
NextTrial = Callable[[], Trial | None]
Work = Callable[[Trial], TrialEnd]
#: Seconds between two looks for a signal.
PATIENCE = 0.2


def run_trials(next_trial: NextTrial, work: Work, jobs: int) -> Iterator[tuple[Trial, TrialEnd]]:
    """Yield each trial with its end as it comes, ``jobs`` at a time, until no trial is running or left.

    On SIGINT or SIGTERM the running trials save their state; they end as stopped, and no other one starts.
    """
    if jobs == 1:
        while trial := next_trial():
            end = work(trial)
            yield trial, end
            if end.stopped:
                return
        return
    stop, asked = threading.Event(), False
    executor, running = _start_workers(jobs), dict[Future[TrialEnd], Trial]()
    try:
        with stop_on_signals(stop):
            while True:
                while not stop.is_set() and len(running) < jobs and (trial := next_trial()):
                    running[executor.submit(_interruptible, work, trial)] = trial
                if not running:
                    return
                if stop.is_set() and not asked:
                    asked = True
                    for process in multiprocessing.active_children():
                        process.terminate()
                for future in wait(running, PATIENCE, FIRST_COMPLETED).done:
                    yield running.pop(future), _end_of(future, asked)
    finally:
        if running:
            for process in multiprocessing.active_children():
                process.kill()
        executor.shutdown(cancel_futures=True)


def _start_workers(jobs: int) -> ProcessPoolExecutor:
    """Start worker processes, each with its share of the cores and, in turn, one GPU."""
    context = multiprocessing.get_context("spawn")
    gpus, count = context.SimpleQueue(), torch.cuda.device_count()
    for index in range(jobs):
        gpus.put(index % count if count else None)
    return ProcessPoolExecutor(jobs, context, _init_worker, (max(1, count_cores() // jobs), gpus))


def _end_of(future: Future[TrialEnd], asked: bool) -> TrialEnd:
    try:
        return future.result()
    except BrokenProcessPool as error:
        if asked:
            # Stopped before the training had started.
            return TrialEnd(stopped=True)
        raise UserError(
            "a process that trains died (out of memory?): the same command continues from here, with fewer --jobs if "
            "necessary"
        ) from error


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

    def interrupt(kind: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        return work(trial)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
