"""How programs show that they work: a bar on a terminal, else lines now and then."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

#: Seconds between two lines.
EVERY = 60.0
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed} so far, {remaining} left{postfix}"


class ProgressBar(tqdm):  # type: ignore[misc]
    """The bar of tqdm on a terminal; elsewhere, as in a log file, a line for each minute or so that work takes."""

    def __init__(self, iterable: Iterable[Any] | None = None, desc: str = "", total: int | None = None, **options: Any):
        super().__init__(iterable, desc, total, **{"disable": None} | options)
        if self.disable:
            own = ("unit", "unit_scale", "initial")
            self._shown = {"prefix": desc, "bar_format": _LINE} | {key: options[key] for key in own if key in options}
            self.postfix = ""
            self._start = self._last = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        if not self.disable:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: float | None = 1) -> bool | None:
        if not self.disable:
            return super().update(n)
        self.n += n or 0
        return self.refresh()

    def refresh(self, *args: Any, **options: Any) -> bool | None:
        if not self.disable:
            return super().refresh(*args, **options)
        now = time.monotonic()
        if due := now - self._last >= EVERY:
            self._last = now
            line = self.format_meter(self.n, self.total, now - self._start, postfix=self.postfix, **self._shown)
            print(line, file=sys.stderr, flush=True)
        return due
