"""Reading untrusted files without running their code, and writing files whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pickle
import shutil
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import yaml

from clipfusionvad.errors import UserError

# Characters; a list of a thousand seeds takes a hundredth of it.
_LONGEST_YAML = 2**19
# Settings are a list within a mapping at most.
_DEEPEST_YAML = 20


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` and rename it to ``path`` once the body has ended without error."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; results are for everyone the umask allows.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Make a temporary folder beside ``path`` that replaces ``path`` once the body has ended without error."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    before = temporary.with_suffix(".old.tmp")
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            os.rename(path, before)
        os.rename(temporary, path)
        shutil.rmtree(before, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Drop temporary folders of runs that were killed: nothing has been written into them for an hour."""
    for folder in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            newest = max(file.stat().st_mtime for file in (folder, *folder.iterdir()))
            if time.time() - newest > 3600:
                shutil.rmtree(folder, ignore_errors=True)


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
    with atomic_write(path) as file:
        torch.save(value, file)


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` another name of ``source``, or a copy where the file system has no hard links."""
    try:
        if target.resolve() == source.resolve():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
        # Renaming one of two names of a file to the other leaves both.
        temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


class ForeignObjects(UserError):
    """The file pickles objects of classes that only its author's code has."""


def read_torch(path: str | Path, what: str) -> Any:
    """Load a torch file on the CPU without running pickled code; ``what`` names it in messages."""
    must_exist(path, what)
    damaged = f"{what} {path} is not a readable torch file: it may be damaged or incomplete"
    try:
        with open(path, "rb") as file:
            if file.read(2) not in (b"PK", b"\x80\x02"):
                raise UserError(damaged)
        refuse_bomb(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ForeignObjects(
            f"{what} {path} holds more than tensors and plain values, so loading it could run foreign code; refused"
        ) from error
    except UserError:
        raise
    # A pickle is a program, so a damaged one can fail in every way that a program has.
    except Exception as error:
        raise UserError(damaged) from error


def refuse_bomb(path: str | Path, share: float = 10) -> None:
    """Raise ``ValueError`` for a zip archive that would grow to more than ``share`` times its size.

    Of the members of torch's archives only program text is compressed.
    """
    path = Path(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > share * path.stat().st_size:
            raise ValueError(f"{path} would grow to {size} bytes")


def is_plain_tensor(value: Any) -> bool:
    """Whether it is a tensor of real numbers, each with its place in memory: no sparse, quantised or endless one."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return not value.is_complex() and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


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
            raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not taken")
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
