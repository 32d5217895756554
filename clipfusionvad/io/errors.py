"""Report bad input as one line on stderr with exit code 2."""

import contextlib
import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterable

from clipfusionvad.io.rank import is_main, rank_info
from clipfusionvad.io.signals import handling

EXIT_BAD_INPUT = 2
#: Another process of a training was lost (EX_TEMPFAIL of sysexits.h: try again).
EXIT_LOST = 75
EXIT_INTERRUPTED = 130
# Errors of a disk that accepts no more data, raised by a library that writes.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


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
    return f"error: {plain}" if len(plain) <= 2000 else f"error: {plain[:2000]} …"


def run_main(body: Callable[[], int | None]) -> int:
    """Run a program's body and return its exit code.

    ``UserError``, lack of memory and errors of the file system give one line and code 2, Ctrl-C and SIGTERM one line
    and code 130. Any other error is a bug of ours and keeps its traceback. Of several processes that torchrun started,
    only rank 0 prints, and SIGTERM keeps its default action, because a rank that waits for another cannot handle it.
    """
    with contextlib.ExitStack() as stack:
        if rank_info().world_size == 1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            stack.enter_context(handling([signal.SIGTERM], signal.default_int_handler))
        if not is_main():
            nothing = stack.enter_context(open(os.devnull, "w"))
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
