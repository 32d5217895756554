"""Folders of numbered pictures as videos: ShanghaiTech's test set, UCF-Crime as Kaggle has it.

Such a video is named as ffmpeg names it, FOLDER/NAME_%d.png: %d stands for the number of the picture.
"""

import functools
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from clipfusionvad.io.errors import UserError, warn

#: Suffixes of the files that are pictures, and the only formats that are opened.
PICTURES = ".bmp .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
NUMBER = "%d"
#: Numbers and file names of a video's pictures, sorted.
Group = list[tuple[int, str]]


def is_pictures(source: str | Path) -> bool:
    """Return whether a source is numbered pictures rather than a file or an address."""
    path = Path(source)
    return path.stem.endswith(NUMBER) and path.suffix.lower() in PICTURES and "://" not in str(source)


def files_of(source: str | Path) -> list[Path]:
    """Return the pictures of a video, by number, or its one file; nothing if they are not there."""
    path = Path(source)
    if not is_pictures(source):
        return [path] if path.is_file() else []
    return [path.parent / name for _, name in _pictures(path)]


def step_of(source: str | Path) -> int:
    """Return the frames from one picture to the next by their numbers: 10 where every tenth is there. 1 of a file."""
    numbers = [number for number, _ in _pictures(Path(source))] if is_pictures(source) else []
    return min(map(operator.sub, numbers[1:], numbers), default=1)


def read_picture(file: Path) -> np.ndarray:
    """Return a picture as RGB uint8 (H, W, 3), upright. ``OSError`` if it cannot be read."""
    try:
        with Image.open(file, formats=_FORMATS) as picture:
            if picture.mode[0] in "IF":
                raise ValueError("Pillow would cut 16 bits and floats off at 255")
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{file.name} is not a picture of 8 bits that can be read") from error


def note_rate(sources: Iterable[str], fps: float) -> None:
    """Say which frame rate is taken if any of the sources is pictures, which hold no times."""
    if any(map(is_pictures, sources)):
        warn(f"pictures have no times: {fps:g} a second are assumed; give --fps (3 for every tenth of 30 a second)")


def find_pictures(folder: Path, files: Mapping[Path, list[str]]) -> Iterator[tuple[str, str]]:
    """Yield (source, name) of the videos that are pictures: ``files`` maps folders below ``folder`` to file names.

    Pictures whose names differ only in the last number are a video. It is named after the pictures if their names hold
    another number (Abuse001_x264_0.png) or the folder holds several videos, else after its folder (01_0014/000.jpg).

    Raises ``UserError`` where it is not clear which pictures are a video; a line tells of numbers that are missing.
    """
    found = {parent: groups for parent, names in files.items() if (groups := group_pictures(names))}
    for outer, inner in ((outer, parent) for parent in found for outer in parent.parents if outer in found):
        raise UserError(f"{outer} holds numbered pictures, and so does {inner}: move those that are not of the video")
    incomplete = []
    for parent, groups in found.items():
        _check(parent, groups)
        for prefix, group in groups.items():
            source = parent / f"{prefix}{NUMBER}{Path(group[0][1]).suffix}"
            if (gap := _gap(group)) is not None:
                incomplete.append(f"{source} lacks number {gap}")
            own = prefix.rstrip("_-. ")
            alone = len(groups) == 1 and (own == parent.name or not re.search(r"\d", own))
            name = parent.relative_to(folder) / ("" if alone else own)
            yield str(source), name.as_posix() if name.name else parent.resolve().name
    if incomplete:
        more = f" (and {len(incomplete) - 1} more videos like it)" if len(incomplete) > 1 else ""
        warn(f"{incomplete[0]}{more}: the other pictures are read one after the other")


def group_pictures(names: Iterable[str]) -> dict[str, Group]:
    """Return the videos of a folder by what stands before the number in their pictures' names."""
    groups: dict[str, Group] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        prefix = stem.rstrip("0123456789")
        if prefix != stem and suffix.lower() in PICTURES and not name.startswith("."):
            groups.setdefault(prefix, []).append((int(stem[len(prefix) :]), name))
    # One picture is a cover or a figure.
    return {prefix: sorted(group) for prefix, group in groups.items() if len(group) > 1}


def _pictures(source: Path) -> Group:
    folder = source.parent
    groups = _groups(folder, folder.stat().st_mtime_ns) if folder.is_dir() else {}
    return groups.get(source.stem.removesuffix(NUMBER), [])


@functools.lru_cache(maxsize=1)
def _groups(folder: Path, modified: int) -> dict[str, Group]:
    """Return ``group_pictures`` of a folder as it was at a time: it may hold a million pictures of many videos."""
    return group_pictures(os.listdir(folder))


def _check(folder: Path, groups: Mapping[str, Group]) -> None:
    suffixes = Counter(Path(name).suffix.lower() for group in groups.values() for _, name in group)
    if len(suffixes) > 1:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
        raise UserError(f"{folder} holds pictures of several kinds ({kinds}): keep those of the video only")
    for (number, name), (after, other) in (pair for group in groups.values() for pair in pairwise(group)):
        if number == after:
            raise UserError(f"{folder}: {name} and {other} have the same number: keep one of them")


def _gap(group: Group) -> int | None:
    """Return the first number that is missing; every tenth picture of a video is whole too."""
    numbers = np.array([number for number, _ in group])
    steps = np.diff(numbers)
    missing = np.flatnonzero(steps != steps.min())
    return int(numbers[missing[0]] + steps.min()) if len(missing) else None
