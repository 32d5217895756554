"""Files and folders that one process at a time may write; the system frees them when it ends, however it ends.

Locks are advisory and belong to a process: what it forks does not inherit them, so that none outlives it. Where the
system or the file system has no such locks (Windows; some network drives), nothing is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from clipfusionvad.io.errors import UserError

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"


@contextlib.contextmanager
def hold(folder: str | Path, name: str = LOCK, shared: bool = False) -> Iterator[None]:
    """Hold a folder, which is made if need be, against other processes that hold it by the same ``name``.

    ``shared`` holders only keep out those that want it for themselves. At the end the lock file goes, and so do
    folders made for it that are still empty. Raises ``UserError`` where another process is there already.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _take(folder / name, shared)
    except BlockingIOError as error:
        raise UserError(
            f"another run{_holder(folder / name)} is at work in {folder}: wait for it, stop it, or name another folder"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            # Not while others share it. Whoever has opened it meanwhile finds out that it is gone (``_take``).
            _lock(file)
            (folder / name).unlink(missing_ok=True)
        file.close()
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def claim(file: IO[bytes]) -> None:
    """Let ``in_use`` know that this process works on an open file."""
    with contextlib.suppress(OSError):
        _lock(file, shared=True)


def in_use(path: Path) -> bool:
    """Whether another process may be at work on a file."""
    if sys.platform == "win32":
        return True
    try:
        with open(path, "r+b") as file:
            _lock(file)
    except OSError:
        return True
    return False


def _take(path: Path, shared: bool) -> IO[bytes]:
    """The open lock file at ``path``, locked; ``BlockingIOError`` where another process has it."""
    while True:
        file = open(path, "a+b")
        try:
            _lock(file, shared)
            if sys.platform == "win32" or _is_at(path, file):
                if not shared:
                    _sign(file)
                return file
        except BaseException:
            file.close()
            raise
        # Its last holder has removed it between our opening and our locking it.
        file.close()


def _lock(file: IO[bytes], shared: bool = False) -> None:
    """Lock an open file if that can be done here; ``BlockingIOError`` where another process has it."""
    if sys.platform == "win32":
        return
    try:
        # Not ``flock``: a loading process that outlives its parent for seconds would keep the lock.
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        # Two codes say the same; the others, that the file system has no locks.
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(*error.args) from error


def _sign(file: IO[bytes]) -> None:
    """Say in the lock file who holds it."""
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}".encode())
        file.flush()


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(file.fileno()))


def _holder(path: Path) -> str:
    """Who holds a lock, as far as its file says."""
    try:
        said = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return f" (process {said})" if said else ""
