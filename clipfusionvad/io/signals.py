"""The one way to stop on signals: finish the work in progress, save, then end."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stop_on_signals(stop: threading.Event, second_interrupts: bool = True) -> Iterator[None]:
    """Set ``stop`` on the first SIGINT or SIGTERM; a second one then acts as it did before.

    Without ``second_interrupts`` all signals only set ``stop``: a launcher may pass on a signal that this process has
    received already. Does nothing outside the main thread, where Python cannot set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {kind: signal.getsignal(kind) for kind in STOP_SIGNALS}

    def handle(kind: int, frame: Any) -> None:
        stop.set()
        if second_interrupts:
            signal.signal(kind, previous[signal.Signals(kind)])

    for kind in STOP_SIGNALS:
        signal.signal(kind, handle)
    try:
        yield
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


def ignore_stop_signals(worker: int = 0) -> None:
    """Ignore both signals, for a process that only works for another one, which stops it (a ``worker_init_fn``)."""
    for kind in STOP_SIGNALS:
        signal.signal(kind, signal.SIG_IGN)
