"""What a result depends on beside its options: code, packages, machine, and every file that it was made from."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import clipfusionvad
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_csv, write_csv
from clipfusionvad.io.rank import launched

PACKAGE = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "torchvision", "numpy", "pandas", "scikit-learn", "openai-clip", "transformers")
_COLUMNS = ("part", "path", "bytes", "sha256")
#: Hexadecimal digits of a SHA-256 that are kept: enough to tell files apart, and to be compared with ``sha256sum``.
_DIGITS = 16
#: Before the sum that packed features know of themselves.
CRC = "crc32:"


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Code, packages and machine; ``device`` is where the model runs."""
    gpu = torch.cuda.is_available()
    return {
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "folder": os.getcwd(),
        **code(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "processes": launched().size,
        "device": str(device) if device else None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
    }


@cache
def code() -> dict[str, Any]:
    """The version of this package, its git commit where there is one, and a hash of its source files."""
    return {"version": clipfusionvad.__version__, "commit": _commit(), "sources": hash_sources(PACKAGE)}


def hash_sources(folder: Path) -> str:
    """A hash of all Python files below a folder and of their names, wherever the folder is."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        digest.update(f"{path.relative_to(folder).as_posix()} {hash_file(path)}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def hash_file(path: Path) -> str:
    """The first digits of a file's SHA-256."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()[:_DIGITS]


def _processor() -> str:
    """The processor and the instructions that torch uses of it: another one may round otherwise."""
    with contextlib.suppress(OSError):
        if model := re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return f"{model[1]}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, with "-dirty" where tracked files differ from it."""
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=PACKAGE,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None


@dataclass(frozen=True)
class Source:
    """A file that a result was made from: what for (``part``), and what was in it.

    ``sha256`` is empty where nobody read the whole file, and "crc32:…" for packed features, which know their own.
    """

    part: str
    path: str
    bytes: int
    sha256: str


@dataclass
class Sources:
    """The files that a run or a test reads, noted while they are read; may be told by several threads."""

    found: dict[tuple[str, str], Source] = field(default_factory=dict)

    def add(self, part: str, path: str | Path, sha256: str | None = None) -> None:
        """Note a file, with its hash unless that is given; what is no file is left out."""
        path = Path(path)
        if path.is_file():
            known = hash_file(path) if sha256 is None else sha256
            self.found[part, str(path)] = Source(part, str(path), path.stat().st_size, known)

    def reader(self, part: str, read: bool = True) -> Callable[[Path], None]:
        """``add`` for the files of one part; where nobody will ``read`` them, their size has to do."""
        return partial(self.add, part, sha256=None if read else "")

    def add_options(self, options: Mapping[str, Any], keys: tuple[str, ...]) -> None:
        """Note the files that some options name."""
        for key in keys:
            if options.get(key):
                self.add(key, options[key])

    @classmethod
    def read(cls, path: Path) -> Sources:
        """What ``write`` wrote."""
        return cls({(item.part, item.path): item for item in read_sources(path)})

    def write(self, path: Path) -> None:
        """As a CSV file, sorted by part and path."""
        rows = sorted((item.part, item.path, item.bytes, item.sha256) for item in self.found.values())
        write_csv(path, _COLUMNS, rows)


def read_sources(path: Path) -> list[Source]:
    """What ``Sources.write`` wrote; ``UserError`` for anything else."""
    rows = read_csv(path, "record of data", _COLUMNS)
    return [Source(row["part"], row["path"], int(row["bytes"] or 0), row["sha256"]) for _, row in rows]
