"""CSV lists of feature files and labels."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from clipfusionvad.data.annotations import video_key
from clipfusionvad.datasets import Dataset
from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.io.files import delimiter, read_csv, read_text, walk_files, write_csv
from clipfusionvad.io.hub import local_path


@dataclass(frozen=True)
class Entry:
    """One row of a list: one crop of one video.

    ``path`` is the feature file that the list names, ``further`` those of the method's other streams; ``row`` is the
    line number in the CSV file, of which the header is line 1. ``packed`` returns the features (snippets,
    streams · dim) of a list that is packed with whole videos.
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
    path: str | Path, feature_root: str | None = None, dataset: Dataset | None = None, may_lack_files: bool = False
) -> list[Entry]:
    """Read a list with the header ``path,label``.

    A path is used as it is if that file exists; else relative to the folder of the list, then to the folder above
    it; else it is searched below ``feature_root`` by its longest matching tail, so that lists written on another
    machine work unedited. With ``dataset`` every label must be one of its labels. With ``may_lack_files`` a file
    that is not found keeps the path in the list. Raises ``UserError``, for missing files one that counts them.
    """
    if not Path(path).is_file():
        raise UserError(
            f"list not found: {path}; 'python -m clipfusionvad lists' makes lists from features, test lists with its "
            f"--annotations, --split or --no-truth"
        )
    rows = read_csv(path, "list", ("path", "label"))
    if not rows:
        raise UserError(f"list {path} holds no videos")
    feature_root = feature_root and str(local_path(feature_root))
    if feature_root is not None and not os.path.isdir(feature_root):
        if not may_lack_files:
            raise UserError(f"feature root not found: {feature_root}")
        feature_root = None
    finder = _Finder(Path(path).parent, feature_root)
    known: set[str] = set()
    entries, missing = [], []
    for row, cells in rows:
        listed, label = cells["path"], cells["label"]
        try:
            for column in ("path", "label"):
                if not cells[column]:
                    raise UserError(f"the {column} is empty")
            if dataset and label not in known:
                dataset.encode(label)
                known.add(label)
            found = finder.find(listed)
        except UserError as error:
            raise UserError(f"list {path}, row {row}: {error}") from error
        if found is None:
            missing.append(f"row {row}: {listed}")
        entries.append(Entry(Path(listed.replace("\\", "/") if found is None else found), label, row))
    if feature_root and not finder.searched:
        warn(f"--feature-root {feature_root} is not used: all files of {path} are where the list says")
    if missing and not may_lack_files:
        where = f"not below {feature_root} either; see" if feature_root else "name the folder that holds them with"
        count = f"{len(missing)} of {len(rows)} feature files not found"
        raise UserError(f"list {path}: {count}, the first in {missing[0]} ({where} --feature-root)")
    return entries


def add_streams(entries: list[Entry], folders: Sequence[str], name: str, may_lack_files: bool = False) -> list[Entry]:
    """Find the files of further feature streams beside those that a list names.

    ``folders`` holds a word for each stream: a file's further streams lie where the first word, in the name of a folder
    on its path, is replaced by another one: first in the innermost such folder, then in all at once (as released for
    IEF-VAD). Raises ``UserError`` for the first file that is missing, unless ``may_lack_files``.
    """
    found = []
    for entry in entries:
        try:
            further = tuple(_beside(entry.path, folders[0], other) for other in folders[1:])
        except UserError as error:
            if not may_lack_files:
                raise UserError(f"list {name}, row {entry.row}: {error}") from error
            further = ()
        found.append(replace(entry, further=further))
    return found


def _beside(path: Path, first: str, other: str) -> Path:
    holding = [index for index, folder in enumerate(path.parts[:-1]) if first in folder]
    if not holding:
        raise UserError(
            f"no folder on the path {path} has {first!r} in its name, so the features in {other!r} cannot be found "
            f"beside it; set both with --stream-folders"
        )
    for chosen in ({holding[-1]}, set(holding)):
        parts = (part.replace(first, other) if index in chosen else part for index, part in enumerate(path.parts))
        moved = Path(*parts)
        if moved.is_file():
            return moved
    raise UserError(f"{moved} not found beside {path}; --stream-folders sets their folders (now {first} {other})")


def crops_of(entry: Entry) -> list[Entry]:
    """Return an entry for each crop of a video: of the files NAME__k.npy beside the listed one, by their numbers."""
    if entry.packed is not None:
        raise UserError("--test-crops all reads the files of the crops, and the list is packed: add --no-packed")
    if entry.crop is None:
        raise UserError(f"--test-crops all: {entry.path.name} is not named NAME__k.npy, so its crops are not known")
    files = [path for path in entry.path.parent.iterdir() if path.suffix == entry.path.suffix]
    numbers = {path.stem: split_crop(path.stem) for path in files}
    stems = [stem for stem, (video, number) in numbers.items() if video == entry.video and number is not None]
    return [
        replace(
            entry,
            path=entry.path.with_stem(stem),
            further=tuple(path.with_stem(stem) for path in entry.further),
        )
        for stem in sorted(stems, key=numbers.__getitem__)
    ]


def write_list(path: str | Path, entries: Iterable[Entry]) -> None:
    write_csv(path, ("path", "label"), ((entry.path.as_posix(), entry.label) for entry in entries))


def check_repeated(path: str | Path, entries: Sequence[Entry]) -> None:
    """Raise ``UserError`` where a test list names a video twice: keyed truth would judge it twice."""
    first: dict[str, Entry] = {}
    for entry in entries:
        if (other := first.setdefault(entry.video, entry)) is not entry:
            raise UserError(
                f"list {path}, row {entry.row}: {entry.path.name} is of the same video as row {other.row} "
                f"({other.path.name}), which would be judged twice: list one crop of each test video"
            )


def check_overlap(train: Sequence[Entry], test: Sequence[Entry]) -> None:
    """Warn where videos of the test list, by name, are in the training list as well."""
    if shared := sorted({entry.video for entry in test} & {entry.video for entry in train}):
        warn(
            f"{len(shared)} test videos are in the training list as well, the first is {shared[0]}: "
            f"the results will look better than they are"
        )


def split_holdout(entries: list[Entry], normal: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and the rows held out to select checkpoints without the test set, each sorted.

    ``normal`` (N,) marks normal entries. Whole videos are held out, of every label its share (of a label with two or
    more at least one, and never all), and each with one crop only; their other crops are used for neither. Raises
    ``UserError`` where normal or anomalous videos have none to spare.
    """
    first: dict[str, int] = {}
    videos: dict[str, list[str]] = defaultdict(list)
    for row, entry in enumerate(entries):
        if first.setdefault(entry.video, row) == row:
            videos[entry.label].append(entry.video)
    rng = np.random.default_rng(seed)
    held_out: set[str] = set()
    for _, names in sorted(videos.items()):
        count = min(max(round(share * len(names)), 1), len(names) - 1)
        held_out.update(rng.permutation(names)[:count].tolist())
    rows = np.array(sorted(first[video] for video in held_out), dtype=np.int64)
    if len(set(normal[rows].tolist())) < 2:
        raise UserError(
            "--protocol clean holds out normal and anomalous videos: the training list needs at least two normal "
            "videos, and two videos of one anomalous class"
        )
    return np.array([row for row, entry in enumerate(entries) if entry.video not in held_out]), rows


@dataclass
class _Finder:
    """Finds listed files on this machine; see ``read_list`` for the order in which places are tried."""

    folder: Path
    root: str | None
    searched: bool = False

    @cached_property
    def below(self) -> dict[str, list[Path]]:
        """All feature files below the root by their names."""
        files = defaultdict(list)
        for file in walk_files(self.root or "", ".npy"):
            files[file.name].append(file)
        return files

    def find(self, listed: str) -> str | Path | None:
        for name in dict.fromkeys((listed, listed.replace("\\", "/"))):
            for base in ("",) if os.path.isabs(name) else ("", self.folder, self.folder / os.pardir):
                if os.path.isfile(joined := os.path.join(base, name)):
                    return joined
        # Lists come from Windows machines too; ".." must not lead out of the root.
        parts = tuple(part for part in re.split(r"[\\/]", listed) if part not in ("", ".", ".."))
        if self.root is None or not parts:
            return None
        self.searched = True
        for start in range(len(parts)):
            if os.path.isfile(joined := os.path.join(self.root, *parts[start:])):
                return joined
        # The file of that name whose folders agree best with the listed ones.
        files = self.below.get(parts[-1], [])
        tails = [len(os.path.commonprefix([file.parts[::-1], parts[::-1]])) for file in files]
        best = [file for file, tail in zip(files, tails, strict=True) if tail == max(tails)]
        for other in best[1:]:
            if not os.path.samefile(best[0], other):
                raise UserError(f"{'/'.join(parts)} may be {best[0]} or {other}; remove one")
        return best[0] if best else None


def read_split(path: str | Path) -> set[str]:
    """Return the video names of a split file: a name or path per line, or CSV with a column ``video`` or ``path``."""
    lines = [line.strip() for line in read_text(path, "split file").splitlines() if line.strip()]
    for column in ("video", "path"):
        if lines and delimiter(lines[0], (column,)):
            lines = [cells[column] for _, cells in read_csv(path, "split file", (column,)) if cells[column]]
            break
    if not lines:
        raise UserError(f"split file {path} is empty")
    names = map(video_key, lines)
    return {split_crop(name.removesuffix(".npy"))[0] if name.endswith(".npy") else name for name in names}
