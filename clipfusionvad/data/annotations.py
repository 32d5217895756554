"""The official annotation files: the abnormal intervals of each test video and their classes.

Formats are recognised by their content; intervals are in frames, start inclusive and end exclusive:

- text, ``NAME CLASS s e s e`` (UCF-Crime, ShanghaiTech; unused slots are -1), ``NAME SCENE s e`` (MSAD),
  ``NAME s e s e`` (XD-Violence) or ``NAME CLASS s e CLASS s e`` (XD-Violence with classes). A line without a
  class takes it from the name; where the name has several, each interval counts for every one of them.
- CSV with the header ``video,frames,label,start,end``: a row per interval; one row with empty start and end
  for a video in which nothing happens; frames (the video's length) may be empty.
- Frame masks and MATLAB files: ``data.masks``. Where these name no class, that of a list counts.
- JSON, ``{"videos": [{"video_name", "label", "num_frames", "anomalous": [{"start_frame", "end_frame"}]}]}``.
  There ``end_frame`` is inclusive: the frame-level arrays published beside such files say so.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clipfusionvad.data.masks import Intervals, is_masks, read_masks
from clipfusionvad.datasets import Dataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import delimiter, read_csv, read_text, write_csv

WHAT = "annotation file"
COLUMNS = ("video", "frames", "label", "start", "end")
# Frames of the longest believable video (38 days at 30 fps): more would only exhaust the memory.
_MOST_FRAMES = 10**8
_ENDINGS = re.compile(
    r"(\.(mp4|avi|mkv)|[_-](x264|i3d|c3d|clip|vit|videomae|rgb|flow|fp16|fp32|feats?|features?))+$", re.IGNORECASE
)


@dataclass
class Annotation:
    """The intervals of one video in frames [start, end) and the class of each.

    ``frames`` is the video's length where the file holds it; ``label`` is the video's list label where the
    file names classes, and None where only the video's name does. Without ``labels``, neither names them. ``text``:
    the bounds are those of a text file, which conventions read in different ways (``data.conventions``).
    """

    video: str
    segments: list[tuple[int, int]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    frames: int | None = None
    label: str | None = None
    text: bool = field(default=False, compare=False)


def video_key(name: str) -> str:
    """Return the name of a video without folders and suffix, by which it is looked up."""
    return re.sub(r"\.(mp4|avi|mkv)$", "", re.split(r"[\\/]", name.strip())[-1], flags=re.IGNORECASE)


def match_names(names: Iterable[str], present: Iterable[str]) -> dict[str, str]:
    """Return by name the present one that means the same video: equal, else the only one that is so without endings.

    Endings are those that programs add or drop: suffixes of video files, ``_x264``, ``_i3d``. Case is ignored.
    """
    wanted, there = set(names), set(present)
    matched = {name: name for name in wanted & there}
    alike: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, left in enumerate((wanted - there, there - wanted)):
        for name in left:
            alike[_ENDINGS.sub("", name).casefold()][side].append(name)
    return matched | {ours[0]: theirs[0] for ours, theirs in alike.values() if len(ours) == len(theirs) == 1}


def read_annotations(path: str | Path, dataset: Dataset, names: Collection[str] = ()) -> dict[str, Annotation]:
    """Read an annotation file of any of the formats above, by video name.

    ``names`` are the test videos, for a file that holds no names. Raises ``UserError`` naming the file and the line for
    anything that does not parse, for unknown classes, for empty intervals, and for a video annotated twice with
    different content.
    """
    masks = is_masks(path)
    text = "" if masks else read_text(path, WHAT)
    if not masks and not text.strip():
        raise UserError(f"{WHAT} {path} is empty")
    parts: Iterable[tuple[str, Any]]
    parse: Callable[[Any, Dataset, Mapping[str, Annotation]], Annotation]
    if masks:
        parts, parse = read_masks(path, names), _parse_intervals
    elif text.lstrip()[0] in "{[":
        videos = enumerate(_json_videos(path, text), 1)
        parts, parse = ((f"video {number}", video) for number, video in videos), _parse_video
    elif delimiter(text.lstrip().split("\n", 1)[0].strip(), ("video", "start")) or str(path).endswith(".csv"):
        rows = read_csv(path, WHAT, ("video", "label", "start", "end"))
        parts, parse = ((f"row {row}", cells) for row, cells in rows), _parse_row
    else:
        lines = enumerate(text.splitlines(), 1)
        parts, parse = ((f"line {number}", _words(line)) for number, line in lines if line.split()), _parse_line
    annotations: dict[str, Annotation] = {}
    for place, content in parts:
        try:
            item = parse(content, dataset, annotations)
            if not item.video:
                raise UserError("the name of the video is empty")
            label = item.label or dataset.label_of(item.video)
            # A plain list of names is not an annotation file.
            if label and not item.segments and not dataset.is_normal(label):
                raise UserError(f"{item.video} is {label}, but has no interval")
            if annotations.setdefault(item.video, item) != item:
                raise UserError(f"{item.video} has a second annotation, which differs from the first")
        except UserError as error:
            raise UserError(f"{WHAT} {path}, {place}: {error}") from error
    if not annotations:
        raise UserError(f"{WHAT} {path} holds no videos")
    return annotations


def read_annotation_files(
    paths: Sequence[str], dataset: Dataset, names: Collection[str]
) -> tuple[dict[str, Annotation], dict[str, Annotation]]:
    """Read the annotations of frame truth and of intervals by class (two files only for XD-Violence)."""
    if len(paths) > 2:
        raise UserError(f"{len(paths)} annotation files given; at most two can be used")
    read = [read_annotations(path, dataset, names) for path in paths] or [{}]
    if len(read) == 1:
        return read[0], read[0]
    # The file for frame truth names no class in any line.
    read.sort(key=_names_classes)
    if _names_classes(read[0]) == _names_classes(read[1]):
        raise UserError(
            f"two annotation files must be one with the class of each interval and one without: "
            f"{paths[0]} and {paths[1]} are of the same kind"
        )
    return read[0], read[1]


def _names_classes(annotations: Mapping[str, Annotation]) -> bool:
    return any(item.label is not None for item in annotations.values())


def read_lengths(path: str | Path) -> dict[str, int] | None:
    """Return the frames of videos from a CSV with video and frames (or n_frames) and without intervals; else None."""
    rows = read_csv(path, WHAT, ("video",)) if str(path).lower().endswith(".csv") else []
    header = rows[0][1] if rows else {}
    column = next((name for name in header if re.fullmatch(r"(n_|num_)?frames(_\w+)?", name)), None)
    if column is None or "start" in header:
        return None
    lengths = {}
    for row, cells in rows:
        try:
            lengths[video_key(cells["video"])] = _frames(cells[column])
        except UserError as error:
            raise UserError(f"{WHAT} {path}, row {row}: {error}") from error
    return lengths


def join_pieces(annotations: dict[str, Annotation], dataset: Dataset) -> dict[str, Annotation]:
    """Join the parts in which the file lists a video; the first one gives its list label.

    The intervals of the parts are in frames of the whole video.
    """
    joined: dict[str, Annotation] = {}
    for item in annotations.values():
        video = dataset.whole_of(item.video)
        if video in annotations:
            joined[item.video] = item
            continue
        whole = joined.setdefault(video, Annotation(video, label=item.label, text=item.text))
        whole.segments.extend(item.segments)
        whole.labels.extend(item.labels)
    return joined


def with_classes(item: Annotation, label: str, dataset: Dataset) -> Annotation:
    """Return the annotation of a video of this list label, with the label's classes where its file names none."""
    if len(item.labels) == len(item.segments):
        return item
    pairs = [(segment, code) for segment in item.segments for code in dataset.codes(label)]
    return replace(item, segments=[segment for segment, _ in pairs], labels=[code for _, code in pairs])


def write_annotations_csv(path: str | Path, annotations: Iterable[Annotation]) -> None:
    """Write annotations in the CSV format above."""
    rows: list[tuple[Any, ...]] = []
    for item in annotations:
        frames = "" if item.frames is None else item.frames
        if not item.segments:
            rows.append((item.video, frames, item.label or "", "", ""))
        for (start, end), label in zip(item.segments, item.labels, strict=True):
            rows.append((item.video, frames, label, start, end))
    write_csv(path, COLUMNS, rows)


def _words(line: str) -> list[str]:
    """Split a line at white space, or at the commas or semicolons that separate all its words."""
    words = line.split()
    if re.search(r"[,;]\s*[-+.\d]+$", line.strip()) and all(word[-1] in ",;" for word in words[:-1]):
        words = re.split(r"\s*[,;]\s*", line.strip())
    return words


def _parse_line(tokens: list[str], dataset: Dataset, before: Mapping[str, Annotation]) -> Annotation:
    name, *words = tokens
    item = Annotation(video_key(name), text=True)
    label: str | None = None
    bounds: list[int] = []
    is_number = re.compile(r"[-+.\d]").match
    if dataset.scene_in_annotation and words and not is_number(words[0]):
        del words[0]
    # Intervals are complete when the next class comes, or with the empty word at the end.
    for token in [*words, ""]:
        if is_number(token):
            bounds.append(_integer(token))
            continue
        if len(bounds) % 2:
            raise UserError(f"{item.video} has an odd number of interval bounds ({len(bounds)})")
        for start, end in zip(bounds[::2], bounds[1::2], strict=True):
            unused = (start, end) == (-1, -1) or (dataset.empty_intervals and start == end >= 0)
            if not unused:
                _add(item, start, end, label, dataset)
        bounds = []
        if token:
            label = _label(token, dataset)
            _name_label(item, label, dataset)
    return item


def _parse_row(cells: dict[str, str], dataset: Dataset, before: Mapping[str, Annotation]) -> Annotation:
    if not cells["video"]:
        raise UserError("the video is empty")
    frames = _frames(cells["frames"]) if cells.get("frames") else None
    video = video_key(cells["video"])
    label = _label(cells["label"], dataset) if cells["label"] else None
    item = before.get(video, Annotation(video, frames=frames))
    if item.frames != frames:
        raise UserError(f"{video} has {frames} frames here and {item.frames} in a row before")
    _name_label(item, label, dataset)
    start, end = ("" if cells[key].lower() in ("nan", "none") else cells[key] for key in ("start", "end"))
    has_interval = bool(start or end)
    if video in before and has_interval != bool(item.segments):
        raise UserError(f"{video} has rows with an interval and a row without one")
    if has_interval:
        _add(item, _integer(start), _integer(end), label, dataset)
    return item


def _json_videos(path: str | Path, text: str) -> list[Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{WHAT} {path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{WHAT} {path} is not valid JSON: {error}") from error
    videos = content.get("videos") if isinstance(content, dict) else None
    if not isinstance(videos, list):
        raise UserError(f"{WHAT} {path} has no list named 'videos'")
    return videos


def _parse_video(video: Any, dataset: Dataset, before: Mapping[str, Annotation]) -> Annotation:
    item = Annotation(video_key(_member(video, "video_name", str)))
    item.label = _label(_member(video, "label", str), dataset)
    if video.get("num_frames") is not None:
        item.frames = _frames(video["num_frames"])
    for event in _member(video, "anomalous", list):
        start, end = (_integer(_member(event, key, int)) for key in ("start_frame", "end_frame"))
        _add(item, start, end + 1, item.label, dataset)
    return item


def _parse_intervals(found: Intervals, dataset: Dataset, before: Mapping[str, Annotation]) -> Annotation:
    item = Annotation(video_key(found.video), frames=found.frames)
    if found.label:
        item.label = _label(found.label, dataset)
    elif len(dataset.labels) == 2:
        item.label = dataset.labels[bool(found.segments)]
    for start, end in found.segments:
        _add(item, start, end, item.label, dataset, may_lack_class=True)
    return item


def _add(
    item: Annotation, start: int, end: int, label: str | None, dataset: Dataset, may_lack_class: bool = False
) -> None:
    """Add an interval, once for each class of ``label`` (None: the classes in the video's name)."""
    if start < 0 or end < 0:
        raise UserError(f"{item.video} has the interval {start} {end}; only unused slots may be -1 -1")
    if end <= start:
        raise UserError(f"{item.video} has the interval {start} {end}, which ends before it starts")
    label = label or dataset.label_of(item.video)
    if label is None and may_lack_class:
        item.segments.append((start, end))
        return
    if label is None:
        raise UserError(f"{item.video} has an interval, but neither its name nor the file names the class")
    if dataset.is_normal(label):
        raise UserError(f"{item.video} is {label}, but has the interval {start} {end}")
    for code in dataset.codes(label):
        item.segments.append((start, end))
        item.labels.append(code)


def _name_label(item: Annotation, label: str | None, dataset: Dataset) -> None:
    """Add a class named in the file to the label of the video."""
    if item.label is None:
        item.label = label
    elif label and dataset.multi_label:
        item.label = "-".join(dict.fromkeys([*item.label.split("-"), *label.split("-")]))


def _label(word: str, dataset: Dataset) -> str:
    label = dataset.match_label(word)
    if label is None:
        known = ", ".join(dataset.labels)
        raise UserError(f"unknown class {word!r}{dataset.label_hint(word)}; known: {known}")
    return label


def _integer(value: str | float) -> int:
    """Return a whole number, which other programs may have written as 160.0 or 160,0."""
    found = re.fullmatch(r"([-+]?[0-9]{1,18})([.,]0*)?", str(value))
    if not found:
        raise UserError(f"{str(value)[:40]!r} is not a whole number of frames")
    return int(found[1])


def _frames(value: Any) -> int:
    frames = _integer(value) if isinstance(value, str | int | float) else 0
    if not 0 < frames <= _MOST_FRAMES:
        raise UserError(f"{str(value)[:40]!r} is not a number of frames that a video can have")
    return frames


def _member(parent: Any, key: str, kind: type) -> Any:
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, int | float if kind is int else kind) or isinstance(value, bool):
        kinds = {str: "text", int: "a whole number", list: "a list"}
        raise UserError(f"{key!r} is missing or not {kinds[kind]}")
    return value
