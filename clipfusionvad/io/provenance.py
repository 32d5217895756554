"""Record what a result depends on besides its options: code, packages, machine, and every file that was read."""

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
from typing import TYPE_CHECKING, Any, NamedTuple

import clipfusionvad
from clipfusionvad.io.files import hash_file, read_csv, write_csv
from clipfusionvad.io.hub import local_path
from clipfusionvad.io.rank import rank_info

if TYPE_CHECKING:
    import torch

PACKAGE = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "torchvision", "numpy", "pandas", "scikit-learn", "openai-clip", "transformers")
# Hexadecimal digits of a SHA-256 that are recorded: enough to tell files apart and to compare with ``sha256sum``.
_DIGITS = 16
#: Precedes the checksum that packed features store of themselves.
CRC = "crc32:"


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Return code, packages and machine as plain values; ``device`` is where the model runs."""
    import torch  # here, because commands that run no model start without it

    gpu, program = torch.cuda.is_available(), os.path.basename(sys.argv[0])
    return {
        "command": [*(["python", "-m", "clipfusionvad"] if program == "__main__.py" else [program]), *sys.argv[1:]],
        "folder": os.getcwd(),
        **code(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        # Another processor, or another instruction set of the same one, rounds differently.
        "cpu": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "processes": rank_info().world_size,
        "device": str(device) if device else None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
    }


@cache
def code() -> dict[str, Any]:
    """Return this package's version, git commit (None without git, "…-dirty" where files differ) and source hash."""
    command, commit = ["git", "describe", "--always", "--dirty", "--abbrev=12"], None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        commit = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, timeout=10).stdout.strip()
    return {"version": clipfusionvad.__version__, "commit": commit or None, "sources": hash_sources(PACKAGE)}


def hash_sources(folder: Path) -> str:
    """Return a hash of the Python files below a folder and of their names, independent of the folder's place."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    lines = "".join(f"{name} {short_hash(folder / name)}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()[:_DIGITS]


def short_hash(path: Path) -> str:
    """Return the first digits of a file's SHA-256, as records hold it."""
    return hash_file(path)[:_DIGITS]


def _processor() -> str:
    with contextlib.suppress(OSError):
        if model := re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return model[1]
    return platform.processor()


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


class Source(NamedTuple):
    """A file that a result was made from; ``sha256`` is empty where not all was read, "crc32:…" for packed features."""

    part: str
    path: str
    bytes: int
    sha256: str


@dataclass
class Sources:
    """The files that a run or a test reads, recorded while they are read; several threads may add to it."""

    found: dict[tuple[str, str], Source] = field(default_factory=dict)

    def add(self, part: str, path: str | Path, sha256: str | None = None) -> None:
        """Record a file, and hash it unless ``sha256`` is given; ignore a path that is not a file."""
        file = local_path(path)
        if file.is_file():
            digest = short_hash(file) if sha256 is None else sha256
            self.found[part, str(path)] = Source(part, str(path), file.stat().st_size, digest)

    def reader(self, part: str, read: bool = True) -> Callable[[Path], None]:
        """Return ``add`` for the files of one part; with ``read`` False it records their size only."""
        return partial(self.add, part, sha256=None if read else "")

    def add_options(self, options: Mapping[str, Any], keys: tuple[str, ...]) -> None:
        """Record the files that these options name."""
        for key in keys:
            if options.get(key):
                path = Path(options[key])
                # The truth may be a folder.
                for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                    self.add(key, file)

    @classmethod
    def read(cls, path: Path) -> Sources:
        """Return what ``write`` wrote; ``UserError`` for any other file."""
        rows = [row for _, row in read_csv(path, "record of data", Source._fields)]
        found = [Source(row["part"], row["path"], int(row["bytes"] or 0), row["sha256"]) for row in rows]
        return cls({(source.part, source.path): source for source in found})

    def write(self, path: Path) -> None:
        """Write a CSV file, sorted by part and path."""
        write_csv(path, Source._fields, sorted(self.found.values()))
