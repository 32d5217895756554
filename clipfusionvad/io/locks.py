"""Let only one process use a folder at a time; the system frees the lock when the process ends.

Locks are advisory and belong to a process: forked children do not inherit them. Where the system or the file system
has no such locks (Windows, some network drives), nothing is refused.
"""

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
    """Hold the lock ``name`` of a folder, which is created if missing.

    ``shared`` holders exclude only exclusive ones. At the end the lock file is removed, and so are folders created
    here that are still empty. Raises ``UserError`` if another process holds the lock.
    """
    folder = Path(folder)
    path, created = folder / name, [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path, shared)
    except BlockingIOError as error:
        holder = ""
        with contextlib.suppress(OSError):
            holder = path.read_text(encoding="utf-8", errors="replace")
        holder = f" (process {holder})" if holder else ""
        raise UserError(
            f"another run{holder} is using {folder}: wait for it, stop it, or name another folder"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with file, contextlib.suppress(OSError):
            # Fails while others share the lock. ``_open_locked`` notices that the file is gone.
            _lock(file, shared=False)
            path.unlink(missing_ok=True)
        for place in created:
            with contextlib.suppress(OSError):
                place.rmdir()


def _open_locked(path: Path, shared: bool) -> IO[bytes]:
    """Return the open and locked lock file; ``BlockingIOError`` if another process holds it."""
    while True:
        file = open(path, "a+b")
        with contextlib.ExitStack() as closing:
            closing.enter_context(file)
            _lock(file, shared)
            # The previous holder may have removed the file between our opening and our locking it.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                if not shared:
                    file.truncate(0)
                    file.write(f"{os.getpid()} on {socket.gethostname()}".encode())
                    file.flush()
                closing.pop_all()
                return file


def _lock(file: IO[bytes], shared: bool) -> None:
    if sys.platform == "win32":
        return
    try:
        # Not ``flock``: loader processes that outlive their parent for seconds would keep the lock.
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        # These two codes mean that another process holds it; all others, that the file system has no locks.
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(*error.args) from error
