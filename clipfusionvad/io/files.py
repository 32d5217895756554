"""Reading untrusted files without running their code, and writing files whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.locks import claim, hold, in_use

# How names end of what is being written, and of a folder whose successor is being put in its place.
_LEFTOVER, _REPLACED = ".tmp", ".old.tmp"


class CannotWrite(UserError):
    """The system refuses to write; what comes next would fare no better."""


# Characters; a list of a thousand seeds takes a hundredth of it.
_LONGEST_YAML = 2**19
# Settings are a list within a mapping at most.
_DEEPEST_YAML = 20


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` and rename it to ``path`` once the body has ended without error."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_LEFTOVER)
    try:
        with writing(path):
            with os.fdopen(handle, "wb") as file:
                claim(file)
                yield file
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes private files; results are for everyone the umask allows.
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Make a temporary folder beside ``path`` that replaces ``path`` once the body has ended without error.

    Raises ``UserError`` where another process is making the same folder.
    """
    path = Path(path)
    with hold(path.parent, f".{path.name}.lock"), writing(path):
        # Nobody else makes this folder, so what is there was left by a run that was killed.
        for leftover in path.parent.glob(f".{escape(path.name)}.*{_LEFTOVER}"):
            if leftover.name.endswith(_REPLACED) and not path.exists():
                os.rename(leftover, path)
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_LEFTOVER))
        before = temporary.with_suffix(_REPLACED)
        try:
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
            if path.exists():
                os.rename(path, before)
            os.rename(temporary, path)
            shutil.rmtree(before, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the system says of a write that failed (disk full, no permission) into ``CannotWrite``."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}") from error


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what writers of files in a folder, or of that one, have left there when they were killed.

    What somebody is writing still is left alone.
    """
    for leftover in folder.glob(f".{escape(name)}.*{_LEFTOVER}" if name else f".*{_LEFTOVER}"):
        if leftover.is_file() and not in_use(leftover):
            leftover.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(path: str | Path) -> None:
    """Raise ``UserError`` where a file could not be written; nothing is created."""
    path = Path(path)
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: no permission to write into {folder}")


def open_own(path: str, flags: int) -> int:
    """An opener for files that are appended to: not through a link, which would lead out of their folder."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def check_inside(folder: str | Path, path: str | Path) -> None:
    """Raise ``UserError`` unless a path, its links followed, lies below the folder, its links followed too."""
    if not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"{path} leads out of {folder}; refused")


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON (NaN becomes null)."""
    write_text(path, json.dumps(without_nan(value), indent=2) + "\n")


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def write_array(path: str | Path, array: np.ndarray) -> None:
    with atomic_write(path) as file:
        np.save(file, array)


def write_torch(path: str | Path, value: Any) -> None:
    import torch

    with atomic_write(path) as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            # torch says that it stopped somewhere; what the system said comes before.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` another name of ``source``, or a copy where the file system has no hard links."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}{_LEFTOVER}")
    with writing(target):
        if target.resolve() == source.resolve():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(source, "rb") as file:
                claim(file)
                try:
                    os.link(source, temporary)
                except OSError:
                    shutil.copyfile(source, temporary)
                os.replace(temporary, target)
        finally:
            # Renaming one of two names of a file to the other leaves both.
            temporary.unlink(missing_ok=True)


def read_text(path: str | Path, what: str) -> str:
    """The text of a UTF-8 file (a byte-order mark is dropped); a file that is no text is a ``UserError``."""
    must_exist(path, what)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not a text file") from error
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}") from error
    if "\0" in text:
        raise UserError(f"{what} {path} is not a text file")
    return text


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """A JSON file of names and values; anything else is a ``UserError``."""
    try:
        content = json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} {path} must hold names and values")
    return content


class _PlainLoader(yaml.SafeLoader):
    """Takes no aliases, of which a few lines can make gigabytes, and no key twice, of which one would be lost."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not taken")
        self.depth += 1
        if self.depth > _DEEPEST_YAML:
            raise yaml.YAMLError("lists within lists are too many")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a key stands there twice")
        return mapping


def read_yaml(path: str | Path, what: str) -> Any:
    """The one document of a YAML file, of plain values only; anything else is a ``UserError``."""
    text = read_text(path, what)
    if len(text) > _LONGEST_YAML:
        raise UserError(f"{what} {path} is not readable YAML: {len(text)} characters are too many for settings")
    try:
        return yaml.load(text, _PlainLoader)
    # Values such as dates and numbers that are none fail in ways of their own.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{what} {path} is not readable YAML: {error}") from error


def read_csv(path: str | Path, what: str, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Rows of a CSV file as (line number in the file, cells by column name); the header is line 1.

    Cells are stripped (released lists have stray spaces) and blank lines skipped. A missing column or a row
    that is longer than the header is a ``UserError``; cells missing at a row's end are empty.
    """
    rows: list[tuple[int, dict[str, str]]] = []
    header: list[str] = []
    try:
        # newline=None: files from every platform.
        text = io.StringIO(read_text(path, what), newline=None)
        reader = csv.reader(text, strict=True, skipinitialspace=True)
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if not header:
                header = cells
                continue
            if any(cells[len(header) :]):
                place = f"{what} {path}, row {reader.line_num}"
                raise UserError(f"{place}: {len(cells)} cells, the header has {len(header)}")
            cells += [""] * (len(header) - len(cells))
            rows.append((reader.line_num, dict(zip(header, cells, strict=False))))
    except csv.Error as error:
        raise UserError(f"{what} {path}, row {reader.line_num}: not readable as CSV: {error}") from error
    if not header:
        raise UserError(f"{what} {path} is empty")
    for column in columns:
        if column not in header:
            raise UserError(f"{what} {path} has no column {column!r}; its header is {','.join(header)[:100]!r}")
    return rows


def walk_files(folder: str | Path, suffix: str) -> Iterator[Path]:
    """Every file below ``folder`` whose name ends in ``suffix``, sorted; linked folders are entered once."""
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(suffix))


def must_exist(path: str | Path, what: str) -> None:
    """Raise ``UserError`` unless ``path`` is a file."""
    if not Path(path).is_file():
        raise UserError(f"{what} not found: {path}")


def without_nan(value: Any) -> Any:
    """A copy of nested plain values with None for what strict JSON cannot say: NaN and infinity."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
