"""Read text, JSON, YAML and CSV files with clear errors, write files whole or not at all, and lock folders."""

import codecs
import contextlib
import csv
import errno
import hashlib
import importlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from glob import escape
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import yaml

from clipfusionvad.io.errors import UserError, nearest
from clipfusionvad.io.hub import HUB

try:
    fcntl: Any = importlib.import_module("fcntl")
except ImportError:
    # Windows has no such locks.
    fcntl = None


class CannotWrite(UserError):
    """The system refuses to write; the next write would fail as well."""


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` and rename it to ``path`` once the body has ended without error."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder that replaces ``path`` at the end without error; ``UserError`` where another process makes it."""
    path = Path(path)
    with hold(path.parent, f".{path.name}.lock"), writing(path):
        # The lock is held, so anything found here was left by a run that was killed.
        for leftover in path.parent.glob(f".{escape(path.name)}.*.tmp"):
            if leftover.name.endswith(".old.tmp") and not path.exists():
                os.rename(leftover, path)
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = _temporary(path)
        temporary.mkdir()
        before = temporary.with_suffix(".old.tmp")
        try:
            yield temporary
            if path.exists():
                os.rename(path, before)
            os.rename(temporary, path)
            shutil.rmtree(before, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an ``OSError`` of the body (disk full, no permission) into ``CannotWrite``."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}") from error


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove unfinished files that killed runs left in a folder; with ``name``, those of that file only."""
    for leftover in folder.glob(f".{escape(name)}.*.tmp" if name else ".*.tmp"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise ``UserError`` if a file cannot be written; create nothing."""
    if str(path).startswith(HUB):
        raise UserError(f"cannot write {path}: files of the Hub are only read")
    folder = next(folder for folder in Path(path).parents if folder.exists())
    if Path(path).is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: no permission to write into {folder}")


def check_inside(folder: str | Path, path: str | Path) -> None:
    """Raise ``UserError`` unless a path lies below the folder, links in both followed."""
    if not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"{path} is outside {folder}: refused")


def check_text(path: str | Path) -> None:
    """Raise ``UserError`` for a file that text is not to replace: a model, features, a video."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if b"\0" in file.read(4096):
            raise UserError(f"{path} is not a text file and is not replaced: delete it, or name another file")


def check_page(path: str | Path) -> None:
    """Raise ``UserError`` for a file that a page is not to replace: one that is not HTML."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if (start := file.read(15)) and not start.lower().startswith(b"<!doctype html"):
            raise UserError(f"{path} is not a page and is not replaced: delete it, or name another file")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file. Raises ``UserError`` if it would replace a binary file or the text is not valid Unicode."""
    check_text(path)
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        line = text[: error.start].rpartition("\n")[2] + text[error.start :].partition("\n")[0]
        raise UserError(
            f"cannot write {path}: bytes that are not UTF-8 are in {line[:200]!r}; rename that file"
        ) from error
    with atomic_write(path) as file:
        file.write(content)


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON (NaN becomes null)."""
    write_text(path, json.dumps(without_nan(value), indent=2) + "\n")


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    write_text(path, buffer.getvalue())


def write_array(path: str | Path, array: np.ndarray) -> None:
    with atomic_write(path) as file:
        np.save(file, array)


def write_torch(path: str | Path, value: Any) -> None:
    import torch  # here, because commands that write no checkpoint start without it

    with atomic_write(path) as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            # torch reports that writing stopped; the system's reason is the error before it.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a copy where the file system has no hard links."""
    if target.resolve() == source.resolve():
        return
    temporary = _temporary(target)
    with writing(target), contextlib.ExitStack() as stack:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renaming one of two links to the same file to the other leaves both.
        stack.callback(temporary.unlink, missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def check_unpacked_size(path: str | Path, growth: float) -> None:
    """Raise ``ValueError`` for a zip archive whose entries would take more than ``growth`` times its size."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > growth * os.path.getsize(path):
        raise ValueError(f"{path} would unpack to {size} bytes")


def read_text(path: str | Path, what: str) -> str:
    """Return the text of a UTF-8 file, or of a UTF-16 file with its mark (Excel); ``UserError`` for any other file."""
    must_exist(path, what)
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}") from error
    if "\0" in text:
        # Every other byte of UTF-16 without its mark is zero.
        coded = b"\0" not in content or 0 < content[:200].count(0) == len(content[:200]) // 2
        advice = " in UTF-8: save it as UTF-8 (in Excel, 'CSV UTF-8')" if coded else ""
        raise UserError(f"{what} {path} is not a text file{advice}")
    # Excel's first line that names the separator.
    return re.sub(r"\Asep=.\s*\n", "\n", text)


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Return the object of a JSON file; ``UserError`` for anything else."""
    try:
        content = json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} {path} must hold names and values")
    return content


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that appears twice in a mapping, of which YAML would drop one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key in (key for key, times in keys.items() if times > 1):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {key!r} appears twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, what: str) -> Any:
    """Return the one document of a YAML file, plain values only; ``UserError`` for anything else."""
    text = read_text(path, what)
    try:
        return yaml.load(text, _UniqueKeyLoader)
    # Malformed dates and numbers raise errors of their own.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{what} {path} is not readable YAML: {error}") from error


def read_csv(path: str | Path, what: str, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Return a CSV file's rows as (line number, cells by column name); ``UserError`` for missing columns or long rows.

    Cells are separated by commas, semicolons, tabs or bars. They are stripped (released lists have stray spaces), blank
    lines skipped, cells missing at a row's end empty. The names of columns are in lower case.
    """
    text = read_text(path, what)
    mark = delimiter(next(filter(str.strip, text.splitlines()), ""), columns) or ","
    # newline=None: files from every platform.
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=mark, strict=True, skipinitialspace=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise UserError(f"{what} {path}, row {reader.line_num}: not readable as CSV: {error}") from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if not lines:
        raise UserError(f"{what} {path} is empty")
    header, rows = [cell.lower() for cell in lines[0][1]], lines[1:]
    for column in columns:
        if column not in header:
            raise UserError(f"{what} {path} has no column {column!r}; its header is {','.join(header)[:100]!r}")
    for number, cells in rows:
        if any(cells[len(header) :]):
            raise UserError(f"{what} {path}, row {number}: {len(cells)} cells, the header has {len(header)}")
    return [(number, dict(zip_longest(header, cells[: len(header)], fillvalue=""))) for number, cells in rows]


def delimiter(header: str, columns: Iterable[str]) -> str | None:
    """Return what separates the cells of a header that names all the columns; None for any other line."""
    cells = {mark: {cell.strip(' "') for cell in header.lower().split(mark)} for mark in ",;\t|"}
    return next((mark for mark, names in cells.items() if names.issuperset(columns)), None)


def walk_files(folder: str | Path, suffix: str) -> Iterator[Path]:
    """Yield every file below ``folder`` whose name ends in ``suffix``, sorted; enter linked folders once.

    The files ``._NAME`` that macOS leaves beside files on other systems' disks are not among them.
    """
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(suffix) and name[:2] != "._")


def must_exist(path: str | Path, what: str) -> None:
    """Raise ``UserError`` unless ``path`` is a file; it names the nearest one in that folder."""
    path = Path(path)
    if not path.is_file():
        others = [other.name for other in path.parent.iterdir() if other.is_file()] if path.parent.is_dir() else []
        raise UserError(f"{what} not found: {path}{nearest(path.name, others)}")


def without_nan(value: Any) -> Any:
    """Return nested plain values with None for NaN and infinity, which strict JSON cannot hold."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


# Locks are advisory and belong to a process: forked children do not inherit them, and the system frees them when the
# process ends. Where the system or the file system has none (Windows, some network drives), nothing is refused.
@contextlib.contextmanager
def hold(folder: str | Path, name: str = ".lock", shared: bool = False) -> Iterator[None]:
    """Hold the lock ``name`` of a folder, made if missing; ``UserError`` if another process holds it.

    ``shared`` holders exclude only exclusive ones. The end removes the lock file, and folders made here and empty.
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
        what = f"another run{holder and f' (process {holder})'} is using {folder}"
        raise UserError(f"{what}: wait for it, stop it, or name another folder") from error
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with file, contextlib.suppress(OSError):
            # Fails while others share the lock. ``_open_locked`` notices that the file is gone.
            _lock(file, shared=False)
            if fcntl is None:
                # Windows does not remove an open file.
                file.close()
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
    if fcntl is None:
        return
    try:
        # Not ``flock``: loader processes that outlive their parent for seconds would keep the lock.
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        # These two codes mean that another process holds it; all others, that the file system has no locks.
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(*error.args) from error
