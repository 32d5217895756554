"""Build a dataset's lists and ground truth from a folder of features and the official annotation files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from clipfusionvad.data.annotations import Annotation, read_annotations, video_key, write_annotations_csv
from clipfusionvad.data.features import FRAMES_PER_SNIPPET, NotOneCrop, read_shape
from clipfusionvad.data.lists import Entry, split_crop, write_list
from clipfusionvad.data.truth import frames_from_segments
from clipfusionvad.datasets import NORMAL_IN_TRUTH, Dataset
from clipfusionvad.errors import UserError
from clipfusionvad.files import read_csv, read_text, walk_files, write_array

Annotations = dict[str, Annotation]


@dataclass
class Video:
    """One video's feature files: ``crops`` maps the crop number (None: no suffix) to (path, snippets)."""

    name: str
    label: str
    #: "train" or "test" if a folder on the files' path says so.
    folder_split: str | None = None
    crops: dict[int | None, tuple[Path, int]] = field(default_factory=dict)


@dataclass
class Built:
    """What was written, as a table to print, and what the user should know besides."""

    summary: str
    notes: list[str]


def build_lists(
    dataset: Dataset,
    features: str | Path,
    output: str | Path,
    annotation_files: Sequence[str | Path] = (),
    split_files: Sequence[str | Path] = (),
    exclude: Sequence[str] = (),
    test_crop: int | None = None,
) -> Built:
    """Write training list, test list and ground truth of a dataset into the folder ``output``.

    Files, order and arrays are those that the dataset's original projects released, made to fit these
    features: 16 frames per snippet. Nothing is written unless everything has been checked (``UserError``).
    """
    notes: list[str] = []
    for_frames, for_classes = _read_annotation_files(annotation_files, dataset)
    videos = find_videos(features, dataset, for_classes, exclude, notes)
    _note_absent(for_classes, videos, "annotated videos", notes)
    if split_files:
        train, test = _split_by_files(split_files, videos, notes)
    else:
        train, test = _split_by_annotation(videos, for_classes, dataset, notes)
    train, test = _released_order(train, dataset), _released_order(test, dataset)
    crop = dataset.test_crop if test_crop is None else test_crop
    chosen = [_choose_crop(video, crop) for video in test]
    for video in test:
        _check_annotation(video, (for_frames, for_classes), dataset)

    base = Path(os.path.realpath(output))
    train_rows = [
        (_written_path(path, base), video.label)
        for video in train
        for _, (path, _) in sorted(video.crops.items(), key=lambda item: -1 if item[0] is None else item[0])
    ]
    test_rows = [(_written_path(path, base), v.label) for v, (path, _) in zip(test, chosen, strict=True)]
    lengths = [FRAMES_PER_SNIPPET * snippets for _, snippets in chosen]
    frames = [
        frames_from_segments(_segments_of(video, for_frames), length)
        for video, length in zip(test, lengths, strict=True)
    ]
    keyed = [_keyed(video, for_classes.get(video.name), length) for video, length in zip(test, lengths, strict=True)]
    _note_differences(frames, keyed, dataset, notes)

    if train:
        write_list(base / dataset.list_files["train"], _entries(train_rows))
    else:
        notes.append(f"no training videos: {dataset.list_files['train']} not written")
    if test:
        write_list(base / dataset.list_files["test"], _entries(test_rows))
        write_annotations_csv(base / dataset.list_files["truth"], keyed)
        segments, labels = _released_arrays(test, for_classes, lengths)
        write_array(base / dataset.truth_files["frames"], np.concatenate(frames).astype(np.float32))
        write_array(base / dataset.truth_files["segments"], segments)
        write_array(base / dataset.truth_files["labels"], labels)
    else:
        notes.append("no test videos: test list and ground truth not written")
    return Built(_summary(dataset, train, test, len(train_rows), frames, output), notes)


def find_videos(
    folder: str | Path,
    dataset: Dataset,
    annotations: Annotations,
    exclude: Sequence[str],
    notes: list[str],
) -> dict[str, Video]:
    """The videos below a folder by name, with label and crops; what is skipped is said in ``notes``."""
    if not os.path.isdir(folder):
        raise UserError(f"feature folder not found: {folder}")
    # Links on the way to the folder are resolved, the folder itself keeps its name: lists stay portable.
    named = Path(os.path.abspath(folder))
    root = named.parent.resolve() / named.name
    videos: dict[str, Video] = {}
    excluded, skipped = 0, []
    for path in walk_files(root, ".npy"):
        inside = path.relative_to(root)
        if any(fnmatchcase(path.name, glob) or fnmatchcase(inside.as_posix(), glob) for glob in exclude):
            excluded += 1
            continue
        try:
            snippets, _, _ = read_shape(path)
        except NotOneCrop:
            skipped.append(path)
            continue
        name, crop = split_crop(path.stem)
        label = dataset.label_of(name, path.parent.name)
        if label is None and name in annotations:
            label = annotations[name].label
        if label is None:
            raise UserError(
                f"{path}: neither its name, its folder nor an annotation tells the class of {name}; "
                f"classes of {dataset.title}: {', '.join(dataset.labels)} (--exclude leaves files out)"
            )
        video = videos.setdefault(name, Video(name, label, _split_of(inside.parts[:-1])))
        if crop in video.crops:
            raise UserError(f"{video.crops[crop][0]} and {path} are the same crop of {name}; --exclude one")
        video.crops[crop] = (path, snippets)
    if excluded:
        notes.append(f"{excluded} files left out by --exclude")
    if skipped:
        notes.append(f"{len(skipped)} files skipped that are not (snippets, dim), the first is {skipped[0]}")
    if not videos:
        raise UserError(f"no feature files (.npy, one per crop, of shape (snippets, dim)) below {folder}")
    return videos


def read_split(path: str | Path) -> set[str]:
    """Video names of a split file: one name or path a line, or CSV with a column ``video`` or ``path``."""
    lines = [line.strip() for line in read_text(path, "split file").splitlines() if line.strip()]
    header = [cell.strip() for cell in lines[0].split(",")] if lines else []
    for column in ("video", "path"):
        if column in header:
            lines = [cells[column] for _, cells in read_csv(path, "split file", (column,)) if cells[column]]
            break
    if not lines:
        raise UserError(f"split file {path} is empty")
    return {_name_in_split(line) for line in lines}


def _name_in_split(line: str) -> str:
    name = video_key(line)
    return split_crop(name.removesuffix(".npy"))[0] if name.endswith(".npy") else name


def _read_annotation_files(paths: Sequence[str | Path], dataset: Dataset) -> tuple[Annotations, Annotations]:
    """Annotations for the frame truth and for the intervals by class (two files only for XD-Violence)."""
    if len(paths) > 2:
        raise UserError(f"{len(paths)} annotation files given; at most two can be used")
    read = [read_annotations(path, dataset) for path in paths]
    if not read:
        return {}, {}
    if len(read) == 1:
        return read[0], read[0]
    # The file of plain pairs names no class in any line.
    pairs = [all(item.label is None for item in annotations.values()) for annotations in read]
    if pairs[0] == pairs[1]:
        raise UserError(
            f"of two annotation files one must name the class of each interval and one must not: "
            f"{paths[0]} and {paths[1]} are of the same kind"
        )
    return (read[0], read[1]) if pairs[0] else (read[1], read[0])


def _split_of(folders: Iterable[str]) -> str | None:
    """What the folders on a file's path say; the innermost one counts."""
    for folder in reversed(list(folders)):
        for split in ("train", "test"):
            if split in folder.lower():
                return split
    return None


def _split_by_files(
    paths: Sequence[str | Path], videos: dict[str, Video], notes: list[str]
) -> tuple[list[Video], list[Video]]:
    train: set[str] | None = None
    test: set[str] | None = None
    for path in paths:
        names = read_split(path)
        _note_absent(names, videos, f"videos in {path}", notes)
        if "train" in Path(path).name.lower():
            train = names | (train or set())
        else:
            test = names | (test or set())
    if train and test and (both := sorted(train & test)):
        raise UserError(f"{len(both)} videos are in both a training and a test split, the first is {both[0]}")
    if train is None:
        train = videos.keys() - test
    elif test is None:
        test = videos.keys() - train
    elif neither := sorted(videos.keys() - train - test):
        notes.append(f"{len(neither)} videos are in no split file and left out, the first is {neither[0]}")
    return [v for v in videos.values() if v.name in train], [v for v in videos.values() if v.name in test]


def _split_by_annotation(
    videos: dict[str, Video], annotations: Annotations, dataset: Dataset, notes: list[str]
) -> tuple[list[Video], list[Video]]:
    train: list[Video] = []
    test: list[Video] = []
    for video in videos.values():
        is_test = video.name in annotations or video.folder_split == "test"
        (test if is_test else train).append(video)
    if train and test and all(dataset.is_normal(video.label) for video in train):
        notes.append("no anomalous video is left for training, so all videos are taken as the test set")
        return [], train + test
    if test and not any(dataset.is_normal(video.label) for video in test):
        notes.append(
            "no normal video is in the test set: annotations that name anomalous videos only leave normal test videos "
            "in the training list; name the test videos with --split"
        )
    return train, test


def _note_absent(names: Iterable[str], videos: dict[str, Video], what: str, notes: list[str]) -> None:
    if absent := sorted(set(names) - videos.keys()):
        notes.append(f"{len(absent)} {what} have no feature file, the first is {absent[0]}")


def _released_order(videos: Iterable[Video], dataset: Dataset) -> list[Video]:
    """Anomalous videos first, then normal ones, each by name: the order of the released lists."""
    return sorted(videos, key=lambda video: (dataset.is_normal(video.label), video.name))


def _choose_crop(video: Video, crop: int) -> tuple[Path, int]:
    for wanted in (crop, None):
        if wanted in video.crops:
            return video.crops[wanted]
    present = ", ".join(map(str, sorted(video.crops)))
    raise UserError(f"test video {video.name} has no crop {crop}, only {present}; see --test-crop")


def _check_annotation(video: Video, annotations: Iterable[Annotations], dataset: Dataset) -> None:
    normal = dataset.is_normal(video.label)
    for source in annotations:
        item = source.get(video.name)
        if normal and item and item.segments:
            raise UserError(f"test video {video.name} is {video.label}, but its annotation has intervals")
        if not normal and item is None:
            path = next(iter(video.crops.values()))[0]
            raise UserError(f"test video {video.name} is {video.label}, but no annotation says when ({path})")


def _segments_of(video: Video, annotations: Annotations) -> list[tuple[int, int]]:
    return annotations[video.name].segments if video.name in annotations else []


def _keyed(video: Video, item: Annotation | None, length: int) -> Annotation:
    item = item or Annotation(video.name)
    return Annotation(video.name, item.segments, item.labels, item.frames or length, video.label)


def _note_differences(frames: list[np.ndarray], keyed: list[Annotation], dataset: Dataset, notes: list[str]) -> None:
    """The annotation files of XD-Violence do not agree everywhere; the keyed file can hold only one."""
    counts = [
        int((frames_from_segments(item.segments, len(truth)) != truth).sum())
        for truth, item in zip(frames, keyed, strict=True)
    ]
    if total := sum(counts):
        notes.append(
            f"the annotation files disagree in {total} frames of {sum(map(bool, counts))} videos: "
            f"{dataset.truth_files['frames']} follows the one without classes, "
            f"{dataset.list_files['truth']} the one with classes"
        )


def _released_arrays(
    videos: list[Video], annotations: Annotations, lengths: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Object arrays as released: bounds are text for annotated videos, numbers for normal ones."""
    segments, labels = np.empty(len(videos), dtype=object), np.empty(len(videos), dtype=object)
    for index, (video, length) in enumerate(zip(videos, lengths, strict=True)):
        if intervals := _segments_of(video, annotations):
            segments[index] = [[str(start), str(end)] for start, end in intervals]
            labels[index] = list(annotations[video.name].labels)
        else:
            segments[index] = [[0, length]]
            labels[index] = [NORMAL_IN_TRUTH]
    return segments, labels


def _entries(rows: list[tuple[Path, str]]) -> list[Entry]:
    return [Entry(path, label, row) for row, (path, label) in enumerate(rows, 2)]


def _written_path(path: Path, base: Path) -> Path:
    """Relative to the list's folder where features and lists are neighbours and can move together."""
    return Path(os.path.relpath(path, base)) if path.is_relative_to(base.parent) else path


def _summary(
    dataset: Dataset,
    train: list[Video],
    test: list[Video],
    train_rows: int,
    frames: list[np.ndarray],
    output: str | Path,
) -> str:
    counts = [Counter(code for video in part for code in dataset.codes(video.label)) for part in (train, test)]
    width = max(map(len, [dataset.title, *dataset.labels]))
    lines = [f"{dataset.title:{width}}  train   test"]
    lines += [
        f"{label:{width}}  {counts[0][label]:5d}  {counts[1][label]:5d}"
        for label in dataset.labels
        if counts[0][label] or counts[1][label]
    ]
    lines.append(f"{'videos':{width}}  {len(train):5d}  {len(test):5d}")
    lines.append(f"{'rows':{width}}  {train_rows:5d}  {len(test):5d}")
    if test:
        total = sum(map(len, frames))
        abnormal = sum(int(truth.sum()) for truth in frames)
        lines.append(f"test frames: {total}, {100 * abnormal / total:.3f} % abnormal")
    lines.append(f"written to {output}")
    return "\n".join(lines)
