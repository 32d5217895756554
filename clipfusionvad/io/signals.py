"""The one way to stop on signals: finish the work in progress, save, then end."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def handling(kinds: Sequence[int], handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Handle signals in the main thread, the only one where Python can; then restore the previous handlers."""
    main = threading.current_thread() is threading.main_thread()
    previous = {kind: signal.signal(kind, handler) for kind in kinds if main}
    try:
        yield
    finally:
        for kind, before in previous.items():
            signal.signal(kind, before)


def stop_on_signals(stop: threading.Event, second_interrupts: bool = True) -> contextlib.AbstractContextManager[None]:
    """Set ``stop`` on the first SIGINT or SIGTERM; a second one then acts as it did before.

    Without ``second_interrupts`` all signals only set ``stop``: a launcher may pass on a signal that this process has
    received already.
    """
    previous: dict[int, Any] = {kind: signal.getsignal(kind) for kind in STOP_SIGNALS}

    def handle(kind: int, frame: Any) -> None:
        stop.set()
        if second_interrupts:
            signal.signal(kind, previous[kind])

    return handling(STOP_SIGNALS, handle)


def ignore_stop_signals(worker: int = 0) -> None:
    """Ignore both signals, for a process that only works for another one, which stops it (a ``worker_init_fn``)."""
    for kind in STOP_SIGNALS:
        signal.signal(kind, signal.SIG_IGN)
