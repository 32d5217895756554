"""Build a dataset's lists and ground truth from a folder of features and the official annotation files."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from clipfusionvad.data.annotations import Annotation, join_pieces, read_annotations, write_annotations_csv
from clipfusionvad.data.config import FRAMES_PER_SNIPPET
from clipfusionvad.data.lists import Entry, write_list
from clipfusionvad.data.truth import frames_from_segments
from clipfusionvad.datasets import NORMAL_IN_TRUTH, Dataset
from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.io.files import write_array
from clipfusionvad.io.option import Option, size
from clipfusionvad.tools.lists.videos import Annotations, Video, find_videos, note_missing, split_videos


@dataclass(frozen=True, kw_only=True)
class ListsConfig:
    """What lists are built from, and how."""

    features: Annotated[str, Option("folder with the .npy feature files", metavar="DIR", required=True)]
    output: Annotated[str, Option("folder for lists and truth", metavar="DIR", required=True)]
    annotations: Annotated[
        tuple[str, ...], Option("official annotation files, one or two", metavar="FILE", nonempty=True)
    ] = ()
    split: Annotated[
        tuple[str, ...],
        Option(
            "names of the test videos, or of the training videos if the file's name contains 'train' "
            "(default: the annotated videos are the test set)",
            metavar="FILE",
            nonempty=True,
        ),
    ] = ()
    exclude: Annotated[
        tuple[str, ...], Option("files to leave out, by name or path", metavar="GLOB", nonempty=True)
    ] = ()
    test_crop: Annotated[int | None, Option("crop used for test videos (default: the dataset's)", metavar="K")] = None
    protocol: Annotated[
        str,
        Option(
            "clean: correct videos on the wrong side in the released lists; paper: as released",
            choices=("clean", "paper"),
        ),
    ] = "clean"
    single_label: Annotated[bool, Option("leave out videos of several classes")] = False
    truth: Annotated[
        bool,
        Option(
            "no: write only lists, for test videos without annotation; test with --gt-path none judges whole videos"
        ),
    ] = True
    frames_per_snippet: Annotated[int, size("frames that a feature row covers", metavar="N")] = FRAMES_PER_SNIPPET


def build_lists(dataset: Dataset, config: ListsConfig) -> str:
    """Write training list, test list and ground truth of a dataset; return a table of what was written.

    Files, order and arrays are those that the dataset's original projects released, fitted to these features.
    ``protocol`` "clean" corrects videos that the released lists have on the wrong side, and joins videos that the
    annotation has in pieces. Nothing is written unless everything has been checked (``UserError``).
    """
    notes: list[str] = []
    clean = config.protocol == "clean"
    for_frames, for_classes = _read_annotation_files(config.annotations, dataset)
    if clean:
        for_frames, for_classes = (join_pieces(read, dataset) for read in (for_frames, for_classes))
    videos = find_videos(config.features, dataset, for_classes, config.exclude, notes)
    if clean:
        _check_pieces(videos, dataset)
    note_missing(for_classes, videos, "annotated videos", notes)
    train, test = split_videos(videos, for_classes, dataset, config.split, clean, config.single_label, notes)
    crop = dataset.test_crop if config.test_crop is None else config.test_crop
    chosen = [_choose_crop(video, crop) for video in test]
    if config.truth:
        for video in test:
            _check_annotation(video, (for_frames, for_classes), dataset)

    base = Path(os.path.realpath(config.output))
    train_rows = [
        (path, video.label)
        for video in train
        for _, (path, _) in sorted(video.crops.items(), key=lambda item: -1 if item[0] is None else item[0])
    ]
    test_rows = [(path, video.label) for video, (path, _) in zip(test, chosen, strict=True)]
    lengths = [config.frames_per_snippet * snippets for _, snippets in chosen]
    frames = [
        frames_from_segments(_segments_of(video, for_frames), length)
        for video, length in zip(test, lengths, strict=True)
    ]
    keyed = [_keyed(video, for_classes.get(video.name), length) for video, length in zip(test, lengths, strict=True)]
    _note_differences(frames, keyed, dataset, notes)

    if train:
        write_list(base / dataset.list_files["train"], _entries(train_rows, base))
    else:
        notes.append(f"no training videos: {dataset.list_files['train']} not written")
    if test:
        write_list(base / dataset.list_files["test"], _entries(test_rows, base))
    else:
        notes.append("no test videos: test list and ground truth not written")
    if test and config.truth:
        write_annotations_csv(base / dataset.list_files["truth"], keyed)
        segments, labels = _released_arrays(test, for_classes, lengths)
        write_array(base / dataset.truth_files["frames"], np.concatenate(frames).astype(np.float32))
        write_array(base / dataset.truth_files["segments"], segments)
        write_array(base / dataset.truth_files["labels"], labels)
    for note in notes:
        warn(note)
    table = _table(dataset, train, test, len(train_rows), frames if config.truth else [])
    return f"{table}\nwritten to {config.output}"


def _read_annotation_files(paths: Sequence[str], dataset: Dataset) -> tuple[Annotations, Annotations]:
    """Read the annotations of frame truth and of intervals by class (two files only for XD-Violence)."""
    if len(paths) > 2:
        raise UserError(f"{len(paths)} annotation files given; at most two can be used")
    read = [read_annotations(path, dataset) for path in paths]
    if not read:
        return {}, {}
    if len(read) == 1:
        return read[0], read[0]
    # The file for frame truth names no class in any line.
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
                f"--annotations, or --no-truth to judge only whole videos"
            )


def _segments_of(video: Video, annotations: Annotations) -> list[tuple[int, int]]:
    return annotations[video.name].segments if video.name in annotations else []


def _keyed(video: Video, item: Annotation | None, length: int) -> Annotation:
    item = item or Annotation(video.name)
    return Annotation(video.name, item.segments, item.labels, item.frames or length, video.label)


def _note_differences(frames: list[np.ndarray], keyed: list[Annotation], dataset: Dataset, notes: list[str]) -> None:
    """Note where the annotation files of XD-Violence disagree; the keyed file can hold only one of them."""
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
    """Return object arrays as released: bounds are text for annotated videos, numbers for normal ones."""
    segments, labels = np.empty(len(videos), dtype=object), np.empty(len(videos), dtype=object)
    for index, (video, length) in enumerate(zip(videos, lengths, strict=True)):
        if intervals := _segments_of(video, annotations):
            segments[index] = [[str(start), str(end)] for start, end in intervals]
            labels[index] = list(annotations[video.name].labels)
        else:
            segments[index] = [[0, length]]
            labels[index] = [NORMAL_IN_TRUTH]
    return segments, labels


def _entries(rows: list[tuple[Path, str]], base: Path) -> list[Entry]:
    """Return the entries of a list; paths are relative if lists and features are neighbours and can move together."""
    return [
        Entry(Path(os.path.relpath(path, base)) if path.is_relative_to(base.parent) else path, label, row)
        for row, (path, label) in enumerate(rows, 2)
    ]


def _table(dataset: Dataset, train: list[Video], test: list[Video], rows: int, frames: list[np.ndarray]) -> str:
    """Render the number of videos of each class, of rows and of abnormal frames."""
    import pandas as pd  # here: the command's --help does not need it

    counts = [Counter(code for video in part for code in dataset.codes(video.label)) for part in (train, test)]
    table = {label: [count[label] for count in counts] for label in dataset.labels if any(c[label] for c in counts)}
    table |= {"videos": [len(train), len(test)], "rows": [rows, len(test)]}
    frame = pd.DataFrame.from_dict(table, orient="index", columns=["train", "test"])
    text = frame.rename_axis(columns=dataset.title).to_string()
    if frames:
        total, abnormal = sum(map(len, frames)), sum(int(truth.sum()) for truth in frames)
        text += f"\ntest frames: {total}, {100 * abnormal / total:.3f} % abnormal"
    return text
