"""Running trials: one after another in this process, or in several."""

from __future__ import annotations

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
from clipfusionvad.tools.sweep.trials import Outcome, Trial

#: Gives the next trial, or None where there is none at present.
Next = Callable[[], Trial | None]
Work = Callable[[Trial], Outcome]


def run_trials(following: Next, work: Work, jobs: int) -> Iterator[tuple[Trial, Outcome]]:
    """Each trial with its outcome as it comes, ``jobs`` at a time; ends when none runs and none follows.

    SIGINT and SIGTERM let the trials under way save their state; they come out as stopped, and none follows.
    """
    if jobs == 1:
        yield from _run_here(following, work)
        return
    stop = threading.Event()
    with stop_on_signals(stop), _Pool(jobs, work) as pool:
        while True:
            while not stop.is_set() and len(pool.running) < jobs and (trial := following()):
                pool.submit(trial)
            if not pool.running:
                return
            if stop.is_set():
                pool.ask_to_stop()
            yield from pool.finished(patience=0.2)


def _run_here(following: Next, work: Work) -> Iterator[tuple[Trial, Outcome]]:
    while trial := following():
        outcome = work(trial)
        yield trial, outcome
        if outcome.stopped:
            return


class _Pool:
    """Worker processes, each with its share of the cores and, in turn, a GPU of its own."""

    def __init__(self, jobs: int, work: Work):
        self.work, self.running = work, dict[Future[Outcome], Trial]()
        context = multiprocessing.get_context("spawn")
        gpus = context.SimpleQueue()
        count = torch.cuda.device_count()
        for index in range(jobs):
            gpus.put(index % count if count else None)
        threads = max(1, count_cores() // jobs)
        self.executor = ProcessPoolExecutor(jobs, context, _start, (threads, gpus))
        self.asked = False

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.running:
            for process in multiprocessing.active_children():
                process.kill()
        self.executor.shutdown(cancel_futures=True)

    def submit(self, trial: Trial) -> None:
        self.running[self.executor.submit(_interruptible, self.work, trial)] = trial

    def ask_to_stop(self) -> None:
        """Once: what runs saves its state and ends."""
        if not self.asked:
            self.asked = True
            for process in multiprocessing.active_children():
                process.terminate()

    def finished(self, patience: float) -> Iterator[tuple[Trial, Outcome]]:
        done, _ = wait(self.running, patience, FIRST_COMPLETED)
        for future in done:
            trial = self.running.pop(future)
            try:
                yield trial, future.result()
            except BrokenProcessPool as error:
                if self.asked:
                    # Asked to stop before it had begun to train.
                    yield trial, Outcome(stopped=True)
                    continue
                raise UserError(
                    "a process that trains died (out of memory?): the same command goes on from here, with fewer "
                    "--jobs if need be"
                ) from error


def _start(threads: int, gpus: multiprocessing.queues.SimpleQueue[int | None]) -> None:
    """In a new worker. Ctrl-C in a terminal is for the first process, which passes it on; without it this one ends."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if (gpu := gpus.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _interruptible(work: Work, trial: Trial) -> Outcome:
    """A trial that SIGTERM stops, also before and after its steps, in which training itself listens to it."""

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
