"""Doing two things at once: one thread makes what another one uses."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class _End:
    """After the last item: what broke it off, if anything."""

    error: BaseException | None


def ahead(items: Generator[Item, None, None], room: int = 4) -> Generator[Item, None, None]:
    """The same items, made by a thread that is up to ``room`` of them ahead; its exception is raised here."""
    waiting: queue.Queue[Item | _End] = queue.Queue(room)
    stopped = threading.Event()

    def hand_over(item: Item | _End) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(item, timeout=0.1)
                return True
        return False

    def make() -> None:
        error = None
        try:
            with contextlib.closing(items):
                for item in items:
                    if not hand_over(item):
                        return
        except BaseException as raised:
            error = raised
        hand_over(_End(error))

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := waiting.get(), _End):
            yield item
        if item.error:
            raise item.error
    finally:
        stopped.set()
        thread.join()
