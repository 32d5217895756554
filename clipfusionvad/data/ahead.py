"""Doing two things at once: one thread makes what another one uses."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Iterator[Item], room: int = 4) -> Iterator[Item]:
    """The same items, made by a thread that is up to ``room`` of them ahead; its exception is raised here."""
    waiting: queue.Queue[tuple[Item | None, BaseException | None, bool]] = queue.Queue(room)
    stopped = threading.Event()

    def hand_over(item: Item | None, error: BaseException | None, last: bool) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put((item, error, last), timeout=0.1)
                return True
        return False

    def make() -> None:
        error = None
        try:
            with contextlib.closing(items):
                for item in items:
                    if not hand_over(item, None, False):
                        return
        except BaseException as raised:
            error = raised
        hand_over(None, error, True)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error, last = waiting.get()
            if error:
                raise error
            if last:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
