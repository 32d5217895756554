"""Produce items in a thread while the caller works on earlier ones."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Generator[Item, None, None], size: int = 4) -> Generator[Item, None, None]:
    """Yield items that a thread produces, at most ``size`` in advance; an exception of the thread is raised here."""
    # An item, or its absence and the exception that ended the thread, if any.
    waiting: queue.Queue[tuple[list[Item], BaseException | None]] = queue.Queue(size)
    stopped = threading.Event()

    def put(item: list[Item], error: BaseException | None = None) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put((item, error), timeout=0.1)
                return True
        return False

    def produce() -> None:
        error = None
        try:
            with contextlib.closing(items):
                for item in items:
                    if not put([item]):
                        return
        except BaseException as raised:
            error = raised
        put([], error)

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while (found := waiting.get())[0]:
            yield from found[0]
        if found[1]:
            raise found[1]
    finally:
        stopped.set()
        thread.join()
