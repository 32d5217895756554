"""Report bad input as one line on stderr with exit code 2."""

import contextlib
import difflib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator

from clipfusionvad.io.rank import rank_info

EXIT_BAD_INPUT = 2
#: Another process of a training was lost (EX_TEMPFAIL of sysexits.h: try again).
EXIT_LOST = 75
EXIT_INTERRUPTED = 130
# Errors of a disk that accepts no more data, raised by a library that writes.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# Words of torch's errors when memory runs out, on a CPU and on a GPU.
_NO_MEMORY = ("allocate memory", "out of memory")
_LONGEST_LINE = 2000


class UserError(Exception):
    """Bad input that the user can fix: the message says what is wrong, in which file and row, and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word closest to ``word`` as a hint to append to a message; empty if none is close."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lowered, n=1)
    return f" (did you mean {lowered[close[0]]!r}?)" if close else ""


def check_choice(flag: str, value: str, choices: Collection[str]) -> None:
    """Raise ``UserError`` unless an option's value is one of its choices."""
    if value not in choices:
        raise UserError(f"{flag} {value!r}{nearest(value, choices)}: choose from {', '.join(choices)}")


def warn(message: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def error_line(error: Exception | str) -> str:
    """Return the report of bad input: one line of limited length, without control characters from file names."""
    line = " ".join(str(error).split())
    plain = "".join(letter if letter.isprintable() else "?" for letter in line)
    return "error: " + (plain if len(plain) <= _LONGEST_LINE else f"{plain[:_LONGEST_LINE]} …")


def run_main(body: Callable[[], int | None]) -> int:
    """Run a program's body and return its exit code.

    ``UserError``, lack of memory and errors of the file system give one line and code 2, Ctrl-C and SIGTERM one line
    and code 130. Any other error is a bug of ours and keeps its traceback. Of several processes that torchrun started,
    only rank 0 prints, and SIGTERM keeps its default action, because a rank that waits for another cannot handle it.
    """
    if rank_info().world_size == 1:
        with _interrupting():
            return _run(body)
    if rank_info().rank == 0:
        return _run(body)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        return _run(body)


@contextlib.contextmanager
def _interrupting() -> Iterator[None]:
    """Let SIGTERM raise ``KeyboardInterrupt`` as SIGINT does, unless it has a handler already."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(body: Callable[[], int | None]) -> int:
    try:
        return body() or 0
    except UserError as error:
        return _refuse(error)
    except MemoryError:
        return _refuse("more memory is needed than there is")
    except BrokenPipeError:
        # The reader of the output, such as head, has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # An invalid file name or a failing disk is not a bug of ours.
        file, reason = error.filename or "a file", error.strerror or error
        return _refuse(
            f"cannot write {file}: {reason}" if error.errno in _NO_ROOM else f"{file} cannot be used: {reason}"
        )
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_MEMORY):
            raise
        return _refuse(f"more memory is needed than there is: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _refuse(error: Exception | str) -> int:
    print(error_line(error), file=sys.stderr)
    return EXIT_BAD_INPUT
