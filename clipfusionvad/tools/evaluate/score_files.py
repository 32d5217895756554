"""Score files of other programs: one score for each snippet or frame of the videos of a test set.

- ``.npy``: all videos joined (N,) or (N, 1); (N, C) or (N, 1 + C) with class probabilities; or an object per video.
- ``.csv`` (and other text): a row per score; columns for the video, the score and, named as the dataset's classes are,
  class probabilities. One column of numbers without a header is all videos joined.
- ``.json``: name → list; ``.npz``: name → array; a folder with ``NAME.npy`` or ``NAME.json`` for each video.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipfusionvad.data.annotations import video_key
from clipfusionvad.data.lists import split_crop
from clipfusionvad.datasets import Dataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_unpacked_size, must_exist, read_text, walk_files
from clipfusionvad.io.npy import read_array

WHAT = "scores"
VIDEO_COLUMNS = "video video_id video_name name vid file filename path".split()
SCORE_COLUMNS = "score scores score1 pred prediction prob probability anomaly anomaly_score".split()
PLACE_COLUMNS = "snippet frame index segment".split()
TRUTH_COLUMNS = "gt label target truth".split()
# Constant scores compress hundreds of times, a decompression bomb a thousand times.
_LARGEST_SHARE = 500


@dataclass(frozen=True)
class ScoreFile:
    """The scores of a file, its videos joined.

    scores (N,) float64; classes (N, C) or None, class 0 normal; ``rows``, the scores of each video (V,), is None where
    the file does not tell videos apart; ``names`` is None where they are numbered; ``ordered``: the file's order is its
    author's, not that of names in a folder. ``notes`` are facts to print.
    """

    scores: np.ndarray
    classes: np.ndarray | None = None
    rows: np.ndarray | None = None
    names: list[str] | None = None
    ordered: bool = True
    notes: tuple[str, ...] = ()

    def reorder(self, order: Sequence[int]) -> "ScoreFile":
        """Return the file with its videos in another order."""
        assert self.rows is not None
        ends = np.cumsum(self.rows)
        rows = np.concatenate([np.arange(ends[one] - self.rows[one], ends[one]) for one in order])
        classes = None if self.classes is None else self.classes[rows]
        names = self.names and [self.names[one] for one in order]
        return replace(self, scores=self.scores[rows], classes=classes, rows=self.rows[order], names=names)


def read_score_file(path: str | Path, dataset: Dataset) -> ScoreFile:
    """Read a file or folder of any of the formats above; ``UserError`` for others and for scores that are not finite.

    Without a column of the anomaly score, it is 1 − P(normal) of the class probabilities.
    """
    suffix = Path(path).suffix.lower()
    if Path(path).is_dir():
        found = _read_folder(Path(path), dataset)
    else:
        must_exist(path, WHAT)
        readers: dict[str, Callable[[str | Path, Dataset], ScoreFile]] = {".npy": _read_npy, ".npz": _read_npz}
        found = readers.get(suffix, _read_json if suffix == ".json" else _read_table)(path, dataset)
    for array in (found.scores, found.classes):
        if array is not None and not (finite := np.isfinite(array).reshape(len(array), -1).all(axis=1)).all():
            bad = np.flatnonzero(~finite)
            raise UserError(f"{WHAT} {path}: {len(bad)} are not finite, the first is {_place(found, bad[0])}")
    return found


def _place(found: ScoreFile, row: int) -> str:
    """Return the video and the row of a score, counted from 0."""
    if found.rows is None:
        return f"score {row}"
    ends = np.cumsum(found.rows)
    video = int(np.searchsorted(ends, row, side="right"))
    name = found.names[video] if found.names else f"video {video}"
    return f"score {row - ends[video] + found.rows[video]} of {name}"


def _columns(values: Any, where: str, dataset: Dataset) -> tuple[np.ndarray, np.ndarray | None]:
    """Return scores (N,) and classes (N, C) or None of an array: (N,), (N, 1), (1, N), (N, C) or (N, 1 + C)."""
    classes = len(dataset.labels)
    try:
        array = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} is not a list of numbers, one for each snippet or frame") from error
    if array.size and 1 in array.shape and array.ndim == 2 and array.shape[1] not in (classes, classes + 1):
        array = array.ravel()
    if array.ndim == 1 and array.size:
        return array, None
    if array.ndim == 2 and array.size and array.shape[1] in (classes, classes + 1):
        known = array[:, -classes:]
        return (1 - known[:, 0] if array.shape[1] == classes else array[:, 0]), known
    raise UserError(
        f"{where} has shape {array.shape}: give (n,), or with the {classes} classes of {dataset.title}, normal first, "
        f"(n, {classes}) or (n, {classes + 1}) with the anomaly score first"
    )


def _join(videos: Mapping[str, Any], path: str | Path, dataset: Dataset, ordered: bool = True) -> ScoreFile:
    """Join the scores of videos by name."""
    parts = [_columns(values, f"{WHAT} {path}: {name}", dataset) for name, values in videos.items()]
    if not parts:
        raise UserError(f"{WHAT} {path} holds no videos")
    if len({classes is None for _, classes in parts}) > 1:
        raise UserError(f"{WHAT} {path}: some videos have class probabilities and others have not")
    names, rows = [*map(video_key, videos)], np.array([len(scores) for scores, _ in parts])
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{WHAT} {path} holds {min(repeated)} more than once")
    classes = [known for _, known in parts if known is not None]
    joined = np.concatenate(classes) if classes else None
    return _without_numbers(ScoreFile(np.concatenate([scores for scores, _ in parts]), joined, rows, names, ordered))


def _without_numbers(found: ScoreFile) -> ScoreFile:
    """Sort videos whose names are numbers, and drop names that only number them."""
    if not found.names or not all(re.fullmatch(r"\d+", name) for name in found.names):
        return found
    found = found.reorder(np.argsort([int(name) for name in found.names], kind="stable").tolist())
    numbers = [int(name) for name in found.names or []]
    consecutive = numbers[0] in (0, 1) and numbers == [*range(numbers[0], numbers[0] + len(numbers))]
    return replace(found, names=None, ordered=True) if consecutive else found


def _read_npy(path: str | Path, dataset: Dataset) -> ScoreFile:
    array = read_array(path, WHAT)
    if array.dtype == object:
        return _join({str(index): values for index, values in enumerate(array.tolist())}, path, dataset)
    return ScoreFile(*_columns(array, f"{WHAT} {path}", dataset))


def _read_npz(path: str | Path, dataset: Dataset) -> ScoreFile:
    try:
        check_unpacked_size(path, _LARGEST_SHARE)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    # Zip, its compression and numpy's headers raise errors of many kinds.
    except Exception as error:
        raise UserError(f"{WHAT} {path} are not a readable .npz file of plain arrays: {error}") from error
    if len(arrays) == 1:
        return ScoreFile(*_columns(next(iter(arrays.values())), f"{WHAT} {path}", dataset))
    return _join(arrays, path, dataset)


def _json_content(path: str | Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if repeated := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise ValueError(f"{repeated[0]!r} is there more than once")
        return dict(pairs)

    try:
        return json.loads(read_text(path, WHAT), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{WHAT} {path} is not readable JSON: {error}") from error


def _by_frame(content: Any) -> Any:
    """Return the values of an object frame → score in the order of its frames; anything else as it is."""
    if isinstance(content, dict) and content and all(re.fullmatch(r"\d+", key) for key in content):
        return [content[key] for key in sorted(content, key=int)]
    return content


def _read_json(path: str | Path, dataset: Dataset) -> ScoreFile:
    content = _json_content(path)
    if isinstance(content, dict) and any(isinstance(values, dict | list) for values in content.values()):
        return _join({name: _by_frame(values) for name, values in content.items()}, path, dataset)
    values = _by_frame(content)
    widths = {len(row) if isinstance(row, list) else 0 for row in values} if isinstance(values, list) else set()
    if widths <= {0, 1} or widths < {len(dataset.labels), len(dataset.labels) + 1}:
        return ScoreFile(*_columns(values, f"{WHAT} {path}", dataset))
    return _join({str(index): one for index, one in enumerate(values)}, path, dataset)


def _read_folder(folder: Path, dataset: Dataset) -> ScoreFile:
    videos: dict[str, Any] = {}
    for path in [*walk_files(folder, ".npy"), *walk_files(folder, ".json")]:
        name = split_crop(path.stem)[0]
        if name in videos:
            raise UserError(f"{WHAT} {folder} holds {name} more than once: {path}")
        videos[name] = read_array(path, WHAT) if path.suffix == ".npy" else _by_frame(_json_content(path))
    if not videos:
        raise UserError(f"{WHAT} {folder}: the folder holds no NAME.npy and no NAME.json")
    return _join(videos, folder, dataset, ordered=False)


def _read_table(path: str | Path, dataset: Dataset) -> ScoreFile:
    import pandas as pd

    text = read_text(path, WHAT)
    first = next(filter(str.strip, text.splitlines()), "")
    mark = next((mark for mark in ",;\t" if mark in first), None)
    headless = all(_is_number(cell) for cell in re.split(r"[,;\s]+", first.strip()))
    try:
        table = pd.read_csv(
            io.StringIO(text),
            sep=mark or (r"\s+" if headless else ","),
            header=None if headless else 0,
            skipinitialspace=True,
            # Numbers are read exactly below; names such as 01_0130 stay text.
            dtype=str,
            keep_default_na=False,
        )
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{WHAT} {path} is not readable as CSV: {' '.join(str(error).split())}") from error
    if headless:
        return ScoreFile(*_columns(_numbers(table, list(table), path, 1), f"{WHAT} {path}", dataset))
    columns = {str(name).strip().strip('"').lower(): name for name in table}
    header = ",".join(map(str, table))[:100]
    videos, scores = ([columns[name] for name in known if name in columns] for known in (VIDEO_COLUMNS, SCORE_COLUMNS))
    known = {word.lower(): label for label, prompt in dataset.classes.items() for word in (prompt, label)}
    labelled = {known[name]: column for name, column in columns.items() if name in known}
    if len(scores) > 1 or len(videos) > 1:
        raise UserError(f"{WHAT} {path} has the columns {header}: keep one of {', '.join(map(str, scores + videos))}")
    if not scores and dataset.labels[0] not in labelled:
        known_names = ", ".join(SCORE_COLUMNS)
        raise UserError(f"{WHAT} {path} has no column of scores ({known_names}); its header is {header!r}")
    if missing := [label for label in dataset.labels[1:] if labelled and label not in labelled]:
        raise UserError(f"{WHAT} {path} has columns of some classes, but none of {', '.join(missing)}")
    notes = []
    if ignored := [name for name in TRUTH_COLUMNS if name in columns]:
        notes.append(f"{path}: the column {', '.join(ignored)} is ignored; frames are judged by the truth")
    anomaly = _numbers(table, scores, path, 2)[:, 0] if scores else None
    classes = None
    if labelled:
        named = _numbers(table, [labelled[label] for label in dataset.labels if label in labelled], path, 2)
        if dataset.labels[0] not in labelled and anomaly is not None:
            named = np.column_stack([1 - anomaly, named])
            notes.append(f"{path}: no column {dataset.labels[0]}; 1 - score is used")
        classes = named
        anomaly = 1 - classes[:, 0] if anomaly is None else anomaly
    assert anomaly is not None
    if not len(anomaly):
        raise UserError(f"{WHAT} {path} holds no rows")
    if not videos:
        return ScoreFile(anomaly, classes, notes=tuple(notes))
    codes, names = pd.factorize(table[videos[0]].map(video_key))
    if len(back := np.flatnonzero(np.diff(codes) < 0)):
        row = int(back[0]) + 1
        raise UserError(
            f"{WHAT} {path}, row {row + 2}: {names[codes[row]]} comes again after other videos; sort the rows by video"
        )
    if placed := [columns[name] for name in PLACE_COLUMNS if name in columns]:
        order = np.lexsort((_numbers(table, placed[:1], path, 2)[:, 0], codes))
        if (order != np.arange(len(order))).any():
            notes.append(f"{path}: the rows of each video are sorted by the column {placed[0]}")
        anomaly, classes = anomaly[order], None if classes is None else classes[order]
    found = ScoreFile(anomaly, classes, np.bincount(codes), [split_crop(name)[0] for name in names], notes=tuple(notes))
    return _without_numbers(found)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _numbers(table: Any, columns: list[Any], path: str | Path, first: int) -> np.ndarray:
    """Return columns as numbers (N, k); ``first`` is the line of the table's first row."""
    found = []
    for column in columns:
        cells = table[column].to_numpy(dtype=str)
        try:
            found.append(cells.astype(np.float64))
        except ValueError as error:
            row = next(row for row, cell in enumerate(cells) if not _is_number(cell))
            raise UserError(
                f"{WHAT} {path}, row {row + first}: {column} is {str(cells[row])!r}, not a number"
            ) from error
    return np.column_stack(found)
