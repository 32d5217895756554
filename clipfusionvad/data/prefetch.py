"""Prefetch: a thread computes the next items of an iterator while the caller uses the current one."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
_END = object()


def prefetch(items: Generator[Item, None, None], size: int = 4) -> Generator[Item, None, None]:
    """Yield the same items, of which a thread makes up to ``size`` in advance; its exception is raised here."""
    pool = ThreadPoolExecutor(1, "prefetch")
    try:
        waiting = deque(pool.submit(next, items, _END) for _ in range(size))
        item: Any
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, items, _END))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()
