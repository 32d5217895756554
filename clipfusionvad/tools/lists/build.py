"""Build a dataset's lists and ground truth from a folder of features and the official annotation files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipfusionvad.data.annotations import Annotation, join_pieces, read_annotations, write_annotations_csv
from clipfusionvad.data.features import FRAMES_PER_SNIPPET
from clipfusionvad.data.lists import Entry, write_list
from clipfusionvad.data.truth import frames_from_segments
from clipfusionvad.datasets import NORMAL_IN_TRUTH, Dataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import write_array
from clipfusionvad.tools.lists.videos import Annotations, Video, find_videos, note_absent, split_videos

#: What is done about mistakes in the lists that the original projects released.
PROTOCOLS = ("clean", "paper")


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
    *,
    protocol: str = "clean",
    single_label: bool = False,
    frames_per_snippet: int = FRAMES_PER_SNIPPET,
    truth: bool = True,
) -> Built:
    """Write training list, test list and ground truth of a dataset into the folder ``output``.

    Files, order and arrays are those that the dataset's original projects released, made to fit these
    features. ``protocol`` "clean" puts videos right that the released lists have on the wrong side, and joins
    those that the annotation has in pieces; "paper" leaves both as released. ``single_label`` leaves videos of
    several classes out; without ``truth`` only the lists are written. Nothing is written unless everything has
    been checked (``UserError``).
    """
    notes: list[str] = []
    clean = protocol == "clean"
    for_frames, for_classes = _read_annotation_files(annotation_files, dataset)
    if clean:
        for_frames, for_classes = (join_pieces(read, dataset) for read in (for_frames, for_classes))
    videos = find_videos(features, dataset, for_classes, exclude, notes)
    if clean:
        _check_pieces(videos, dataset)
    note_absent(for_classes, videos, "annotated videos", notes)
    train, test = split_videos(videos, for_classes, dataset, split_files, clean, single_label, notes)
    crop = dataset.test_crop if test_crop is None else test_crop
    chosen = [_choose_crop(video, crop) for video in test]
    if truth:
        for video in test:
            _check_annotation(video, (for_frames, for_classes), dataset)

    base = Path(os.path.realpath(output))
    train_rows = [
        (_written_path(path, base), video.label)
        for video in train
        for _, (path, _) in sorted(video.crops.items(), key=lambda item: -1 if item[0] is None else item[0])
    ]
    test_rows = [(_written_path(path, base), v.label) for v, (path, _) in zip(test, chosen, strict=True)]
    lengths = [frames_per_snippet * snippets for _, snippets in chosen]
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
    else:
        notes.append("no test videos: test list and ground truth not written")
    if test and truth:
        write_annotations_csv(base / dataset.list_files["truth"], keyed)
        segments, labels = _released_arrays(test, for_classes, lengths)
        write_array(base / dataset.truth_files["frames"], np.concatenate(frames).astype(np.float32))
        write_array(base / dataset.truth_files["segments"], segments)
        write_array(base / dataset.truth_files["labels"], labels)
    return Built(_summary(dataset, train, test, len(train_rows), frames if truth else [], output), notes)


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


def _choose_crop(video: Video, crop: int) -> tuple[Path, int]:
    for wanted in (crop, None):
        if wanted in video.crops:
            return video.crops[wanted]
    present = ", ".join(sorted(map(str, video.crops)))
    raise UserError(f"test video {video.name} has no crop {crop}, only {present}; see --test-crop")


def _check_pieces(videos: dict[str, Video], dataset: Dataset) -> None:
    if pieces := [name for name in videos if dataset.whole_of(name) != name]:
        path = next(iter(videos[pieces[0]].crops.values()))[0]
        raise UserError(
            f"{path}: {pieces[0]} is a piece of {dataset.whole_of(pieces[0])}, but annotations are in frames of the "
            f"whole video: give features of that, or --exclude the pieces"
        )


def _check_annotation(video: Video, annotations: Iterable[Annotations], dataset: Dataset) -> None:
    normal = dataset.is_normal(video.label)
    for source in annotations:
        item = source.get(video.name)
        if normal and item and item.segments:
            raise UserError(f"test video {video.name} is {video.label}, but its annotation has intervals")
        if not normal and item is None:
            path = next(iter(video.crops.values()))[0]
            raise UserError(
                f"test video {video.name} is {video.label}, but no annotation says when ({path}); give one with "
                f"--annotations, or --no-truth to judge whole videos only"
            )


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
    if frames:
        total = sum(map(len, frames))
        abnormal = sum(int(truth.sum()) for truth in frames)
        lines.append(f"test frames: {total}, {100 * abnormal / total:.3f} % abnormal")
    lines.append(f"written to {output}")
    return "\n".join(lines)
