"""CSV lists of feature files and labels."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from clipfusionvad.datasets import Dataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_csv, walk_files, write_csv


@dataclass(frozen=True)
class Entry:
    """One row of a list: one crop of one video.

    ``path`` is the feature file that the list names, ``further`` those of the method's other streams (see
    ``add_streams``); ``row`` is the line number in the CSV file, of which the header is line 1. ``packed`` returns
    the features (snippets, streams · dim) of a list that is packed with whole videos.
    """

    path: Path
    label: str
    row: int
    further: tuple[Path, ...] = ()
    packed: Callable[[], np.ndarray] | None = field(default=None, compare=False, repr=False)

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path, *self.further)

    @property
    def video(self) -> str:
        return split_crop(self.path.stem)[0]

    @property
    def crop(self) -> int | None:
        return split_crop(self.path.stem)[1]


def split_crop(stem: str) -> tuple[str, int | None]:
    """Return the video name and the crop number of a feature file's stem ``NAME__k``, None without ``__k``.

    Only the last ``__k`` is removed: names of XD-Violence contain ``__``.
    """
    found = re.fullmatch(r"(.+)__(\d+)", stem, re.DOTALL)
    return (found.group(1), int(found.group(2))) if found else (stem, None)


def read_list(
    path: str | Path,
    feature_root: str | Path | None = None,
    dataset: Dataset | None = None,
    may_lack_files: bool = False,
) -> list[Entry]:
    """Read a list with the header ``path,label``.

    A path is used as it is if that file exists; else relative to the folder of the list, then to the folder above
    it; else it is searched below ``feature_root`` by its longest matching tail, so that lists written on another
    machine work unedited. With ``dataset`` every label must be one of its labels. With ``may_lack_files`` a file
    that is not found keeps the path in the list.

    Raises ``UserError`` for a list that is unreadable or empty, lacks a column or a cell, has an unknown
    label or names files that are not found (all of them in one message).
    """
    if not Path(path).is_file():
        raise UserError(f"list not found: {path}; 'python -m clipfusionvad lists' makes lists from features")
    rows = read_csv(path, "list", ("path", "label"))
    if not rows:
        raise UserError(f"list {path} holds no videos")
    if may_lack_files and feature_root is not None and not os.path.isdir(feature_root):
        feature_root = None
    finder = _Finder(Path(path).parent, feature_root)
    known: set[str] = set()
    entries, missing = [], []
    for row, cells in rows:
        listed, label = cells["path"], cells["label"]
        place = f"list {path}, row {row}"
        for column in ("path", "label"):
            if not cells[column]:
                raise UserError(f"{place}: the {column} is empty")
        if dataset and label not in known:
            try:
                dataset.encode(label)
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
            known.add(label)
        found = finder.find(listed, place)
        if found is None and may_lack_files:
            entries.append(Entry(Path(listed.replace("\\", "/")), label, row))
        elif found is None:
            missing.append(f"row {row}: {listed}")
        else:
            entries.append(Entry(Path(found), label, row))
    if missing:
        where = f"nor below {feature_root}, see" if feature_root else "name the folder that holds them with"
        raise UserError(
            f"list {path}: {len(missing)} of {len(rows)} feature files not found, the first in {missing[0]} "
            f"({where} --feature-root)"
        )
    return entries


def add_streams(
    entries: Sequence[Entry], folders: Sequence[str], list_name: str, may_lack_files: bool = False
) -> list[Entry]:
    """Find the files of further feature streams beside those that a list names.

    ``folders`` holds a word for each stream: a file's further streams lie where the first word, in the name of a
    folder on its path, is replaced by another one. The innermost such folder is tried first, then all at once (as
    the released code of IEF-VAD does). Raises ``UserError`` for the first file that is missing; with
    ``may_lack_files`` its entry is left as it is.
    """
    first, *others = folders
    found = []
    for entry in entries:
        try:
            further = tuple(_beside(entry, first, other, list_name) for other in others)
        except UserError:
            if not may_lack_files:
                raise
            further = ()
        found.append(replace(entry, further=further))
    return found


def _beside(entry: Entry, first: str, other: str, list_name: str) -> Path:
    folders, name = entry.path.parts[:-1], entry.path.name
    holding = [index for index, folder in enumerate(folders) if first in folder]
    if not holding:
        raise UserError(
            f"list {list_name}, row {entry.row}: no folder on the path {entry.path} has {first!r} in its name, so the "
            f"features in {other!r} cannot be found beside it; set both with --stream-folders"
        )
    for chosen in ({holding[-1]}, set(holding)):
        moved = [part.replace(first, other) if index in chosen else part for index, part in enumerate(folders)]
        path = Path(*moved, name)
        if path.is_file():
            return path
    raise UserError(
        f"list {list_name}, row {entry.row}: {path} not found beside {entry.path}; "
        f"--stream-folders sets the folders of the streams (now {first} {other})"
    )


def write_list(path: str | Path, entries: Iterable[Entry]) -> None:
    write_csv(path, ("path", "label"), ((entry.path.as_posix(), entry.label) for entry in entries))


class _Finder:
    """Finds listed files on this machine; see ``read_list`` for the order in which places are tried."""

    def __init__(self, folder: Path, feature_root: str | Path | None) -> None:
        if feature_root is not None and not os.path.isdir(feature_root):
            raise UserError(f"feature root not found: {feature_root}")
        self.bases = (str(folder), os.path.join(folder, os.pardir))
        self.root = feature_root
        self.index: dict[str, list[Path]] | None = None

    def find(self, listed: str, place: str) -> str | Path | None:
        if os.path.isfile(listed):
            return listed
        if not os.path.isabs(listed):
            for base in self.bases:
                if os.path.isfile(joined := os.path.join(base, listed)):
                    return joined
        if self.root is None:
            return None
        # Lists come from Windows machines too; ".." must not lead out of the root.
        parts = [part for part in re.split(r"[\\/]", listed) if part not in ("", ".", "..")]
        for start in range(len(parts)):
            if os.path.isfile(joined := os.path.join(self.root, *parts[start:])):
                return joined
        return self._search(self.root, parts, place) if parts else None

    def _search(self, root: str | Path, parts: list[str], place: str) -> Path | None:
        """The file of that name anywhere below the root whose folders agree best with the listed ones."""
        if self.index is None:
            self.index = {}
            for file in walk_files(root, ".npy"):
                self.index.setdefault(file.name, []).append(file)
        candidates = self.index.get(parts[-1], [])
        if len(candidates) > 1:
            tails = [_common_tail(file.parts, parts) for file in candidates]
            candidates = [file for file, tail in zip(candidates, tails, strict=True) if tail == max(tails)]
        for other in candidates[1:]:
            if not os.path.samefile(candidates[0], other):
                raise UserError(f"{place}: {'/'.join(parts)} may be {candidates[0]} or {other}; remove one")
        return candidates[0] if candidates else None


def _common_tail(one: Iterable[str], other: Iterable[str]) -> int:
    length = 0
    for a, b in zip(reversed(list(one)), reversed(list(other)), strict=False):
        if a != b:
            break
        length += 1
    return length
