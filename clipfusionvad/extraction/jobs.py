"""Which videos are to be extracted, with which model, and where the features go."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from clipfusionvad.extraction.decode import is_address
from clipfusionvad.extraction.encoder import Precision
from clipfusionvad.extraction.snippets import ExtractOptions
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_text, walk_files

#: Names of files that are taken for videos where a folder is given.
SUFFIXES = frozenset(
    ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split()
)
_LISTING, _MANIFEST = ".txt", ".jsonl"


@dataclass(frozen=True)
class Model:
    """The image encoder by its name, as another process or machine can build it; ``width`` is the toy's."""

    clip: str = "ViT-B/16"
    width: int = 512
    device: str = "auto"
    precision: Precision = "fp32"
    batch_size: int = 64


@dataclass(frozen=True)
class Job:
    """One video to extract: ``name`` is the path of its features below ``output``, without ``__k.npy``."""

    source: str
    name: str
    output: str
    options: ExtractOptions
    model: Model
    dtype: Literal["float16", "float32"] = "float16"

    @property
    def files(self) -> list[str]:
        """Feature files relative to ``output``, in the order of the crops."""
        return [f"{self.name}__{crop}.npy" for crop in self.options.crops]

    @property
    def paths(self) -> list[Path]:
        return [Path(self.output, file) for file in self.files]

    @property
    def bytes(self) -> int | None:
        """Size of the video file, None where it is no file."""
        path = Path(self.source)
        return path.stat().st_size if not is_address(self.source) and path.is_file() else None

    def recipe(self) -> dict[str, Any]:
        """The options that the features depend on beside the model's weights, as plain values."""
        options = asdict(self.options) | {"crops": list(self.options.crops)}
        if self.options.stream != "event":
            options = {key: value for key, value in options.items() if not key.startswith("event_")}
        return options | {"dtype": self.dtype, "precision": self.model.precision}


def find_videos(given: Sequence[str | Path]) -> list[tuple[str, str]]:
    """The videos that arguments stand for, as (source, name of its features), sorted by name.

    A folder stands for every file below it with the name of a video, and what lies in a subfolder keeps it. A text
    file (``.txt``) lists videos, one path or address a line, paths relative to the list; each keeps the last folder
    on its way, which is its class in the datasets. A manifest (``.jsonl``) stands for the videos that it is about,
    under the names that they have there. Anything else is a video itself.

    Raises ``UserError`` where nothing is found, and for two videos whose features would be the same files.
    """
    found: dict[str, str] = {}
    for source, name in (pair for item in given for pair in _expand(str(item))):
        if name.startswith("/") or ".." in name.split("/") or not _is_name(name):
            raise UserError(f"{source}: {name!r} cannot be the name of its results")
        other = found.setdefault(name, source)
        if other != source:
            raise UserError(
                f"{other} and {source} would both become {name}: give each a command and an --output of its own"
            )
    if not found:
        raise UserError(f"no videos below {', '.join(map(str, given))} (files are told by their names: .mp4, .mkv, …)")
    return sorted(((source, name) for name, source in found.items()), key=lambda pair: pair[1])


def _expand(item: str) -> Iterator[tuple[str, str]]:
    path = Path(item)
    if is_address(item):
        yield item, _listed_name(item)
    elif path.is_dir():
        for file in walk_files(path, ""):
            if file.suffix.lower() in SUFFIXES:
                yield str(file), file.relative_to(path).with_suffix("").as_posix()
    elif path.suffix.lower() == _LISTING:
        for line in filter(None, map(str.strip, read_text(path, "list of videos").splitlines())):
            yield line if is_address(line) else str(path.parent / line), _listed_name(line)
    elif path.suffix.lower() == _MANIFEST:
        yield from _recorded(path)
    elif path.exists():
        yield item, path.stem
    else:
        raise UserError(f"video not found: {item}")


def _recorded(manifest: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_text(manifest, "manifest").splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            # Cut off where a machine stopped.
            continue
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("video", "source")):
            raise UserError(f"{manifest}, line {number}, names no video and its source: not a manifest of features")
        yield record["source"], record["video"]


def _is_name(name: str) -> bool:
    """Whether files can have it: letters of control would pass for lines of a list, or for commands to a terminal."""
    return bool(name) and not any(unicodedata.category(letter) == "Cc" for letter in name) and len(name) < 1000


def _listed_name(line: str) -> str:
    path = PurePosixPath(unquote(urlsplit(line).path) if is_address(line) else Path(line).as_posix())
    parts = [part for part in path.parent.parts[-1:] if part not in ("/", ".", "..")]
    return PurePosixPath(*parts, path.stem or "video").as_posix()


def take_shard(jobs: Sequence[Job], number: int, of: int) -> list[Job]:
    """Every ``of``-th job from the ``number``-th (counted from 1), so that shards are of like size."""
    return list(jobs[number - 1 :: of])
