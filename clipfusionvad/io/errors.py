"""The one way in which bad input is reported: a single line on stderr and exit code 2."""

from __future__ import annotations

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
# What a disk says that takes no more, to whoever writes in a library.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# What torch says that gets no more memory, from a CPU's allocator and from a GPU's.
_NO_MEMORY = ("allocate memory", "out of memory")
_LONGEST_LINE = 2000


class UserError(Exception):
    """Bad input that its author can mend: the message says what, which file, which row, and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word closest to ``word``, as a hint to append to a message; empty where nothing is close."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lowered, n=1)
    return f" (did you mean {lowered[close[0]]!r}?)" if close else ""


def check_choice(flag: str, value: str, choices: Collection[str]) -> None:
    """Raise ``UserError`` for a value of an option that is none of its choices."""
    if value not in choices:
        raise UserError(f"{flag} {value!r}{nearest(value, choices)}: choose from {', '.join(choices)}")


def warn(message: str) -> None:
    """Say something the user should know but that does not stop the run."""
    print(f"warning: {message}", file=sys.stderr)


def error_line(error: Exception | str) -> str:
    """How bad input is reported: in one line, whatever names of files do to a terminal, and no book of it."""
    line = " ".join(str(error).split())
    plain = "".join(letter if letter.isprintable() else "?" for letter in line)
    return "error: " + (plain if len(plain) <= _LONGEST_LINE else f"{plain[:_LONGEST_LINE]} …")


def run_main(body: Callable[[], int | None]) -> int:
    """Run a program's body and turn its outcome into an exit code.

    ``UserError``, a lack of memory and what the file system refuses become one line and code 2, Ctrl-C and SIGTERM
    one line and code 130; anything else is a bug of ours and keeps its traceback. Of several processes that torchrun
    started, only the first speaks, and SIGTERM acts as usual: one that waits for another would not notice.
    """
    with _silence() if rank_info().rank else contextlib.nullcontext():
        with contextlib.nullcontext() if rank_info().world_size > 1 else _interrupting():
            return _run(body)


@contextlib.contextmanager
def _interrupting() -> Iterator[None]:
    """Let SIGTERM, where nobody else takes care of it, raise ``KeyboardInterrupt`` as SIGINT does."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield


def _run(body: Callable[[], int | None]) -> int:
    try:
        return body() or 0
    except UserError as error:
        return _refuse(error)
    except MemoryError:
        return _refuse("more memory is needed than there is")
    except BrokenPipeError:
        # The reader of the output, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in _NO_ROOM:
            return _refuse(f"cannot write {error.filename or 'a file'}: {error.strerror}")
        # What no file system takes for a name, a disk that fails: the one that reads or writes is not at fault.
        return _refuse(f"{error.filename or 'a file'} cannot be used: {error.strerror or error}")
    except RuntimeError as error:
        if not any(said in str(error) for said in _NO_MEMORY):
            raise
        return _refuse(f"more memory is needed than there is: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _refuse(error: Exception | str) -> int:
    print(error_line(error), file=sys.stderr)
    return EXIT_BAD_INPUT
