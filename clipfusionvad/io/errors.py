"""How programs end: bad input is one line on stderr with exit code 2, and signals stop in one way."""

import contextlib
import difflib
import errno
import io
import os
import re
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from clipfusionvad.io.rank import is_main, rank_info

EXIT_BAD_INPUT = 2
#: Another process of a training was lost (EX_TEMPFAIL of sysexits.h: try again).
EXIT_LOST = 75
EXIT_INTERRUPTED = 130
# Errors of a disk that accepts no more data, raised by a library that writes.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class UserError(Exception):
    """Bad input that the user can fix: the message says what is wrong, in which file and row, and what to do."""


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word closest to ``word``; None if none is close."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lowered, n=1)
    return lowered[close[0]] if close else None


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word closest to ``word`` as a hint to append to a message; empty if none is close."""
    close = closest(word, known)
    return "" if close is None else f" (did you mean {close!r}?)"


def warn(message: str) -> None:
    print(f"warning: {printable(message)}", file=sys.stderr)


def is_text(name: str) -> bool:
    """Return whether a file's name is free of control characters and of bytes that are not text (surrogates)."""
    return not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)


def printable(text: str) -> str:
    """Return a text with ? for control characters and for bytes of a file name that are not text."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def error_line(error: Exception | str) -> str:
    """Return the report of bad input: one line of limited length, without control characters from file names."""
    line = printable(" ".join(str(error).split()))
    return f"error: {line}" if len(line) <= 2000 else f"error: {line[:2000]} …"


def run_main(body: Callable[[], int | None]) -> int:
    """Run a program's body and return its exit code.

    ``UserError``, lack of memory and errors of the file system give one line and code 2, Ctrl-C and SIGTERM one line
    and code 130. Any other error is a bug of ours and keeps its traceback. Of several processes that torchrun started,
    only rank 0 prints, and SIGTERM keeps its default action, because a rank that waits for another cannot handle it.
    What the encoding of a terminal or log file cannot show is printed as ?.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with contextlib.ExitStack() as stack:
        if rank_info().world_size == 1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            stack.enter_context(handling([signal.SIGTERM], signal.default_int_handler))
        if not is_main():
            nothing = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))
            stack.enter_context(contextlib.redirect_stdout(nothing))
            stack.enter_context(contextlib.redirect_stderr(nothing))
        try:
            return body() or 0
        except BrokenPipeError:
            # The reader of the output, such as head, has closed it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except Exception as error:
            if (reason := _reason(error)) is None:
                raise
            print(error_line(reason), file=sys.stderr)
            return EXIT_BAD_INPUT


def _reason(error: Exception) -> str | None:
    """What to report of an error; None for a bug of ours, which an invalid file name or a failing disk is not."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        file, reason = error.filename or "a file", error.strerror or error
        return f"cannot write {file}: {reason}" if error.errno in _NO_ROOM else f"{file} cannot be used: {reason}"
    if isinstance(error, MemoryError):
        return "more memory is needed than there is"
    # torch's errors when memory runs out, on a CPU and on a GPU.
    if isinstance(error, RuntimeError) and re.search("allocate memory|out of memory", str(error)):
        return f"more memory is needed than there is: {error}"
    return None


# To stop on signals: finish the work in progress, save, then end.
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

    Without ``second_interrupts`` all only set ``stop``: a launcher may pass on a signal that has been received already.
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
