"""Find the videos of a feature folder, label them, and split them into training and test."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from clipfusionvad.data.annotations import Annotation, video_key
from clipfusionvad.data.features import NotOneCrop, read_shape
from clipfusionvad.data.lists import split_crop
from clipfusionvad.datasets import Dataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_csv, read_text, walk_files

Annotations = dict[str, Annotation]


@dataclass
class Video:
    """One video's feature files: ``crops`` maps the crop number (None: no suffix) to (path, snippets)."""

    name: str
    label: str
    #: "train" or "test" if the name of a folder contains it.
    folder_split: str | None = None
    crops: dict[int | None, tuple[Path, int]] = field(default_factory=dict)


def find_videos(
    folder: str | Path, dataset: Dataset, annotations: Annotations, exclude: Sequence[str], notes: list[str]
) -> dict[str, Video]:
    """Return the videos below a folder by name, with label and crops; ``notes`` gets what is skipped."""
    if not os.path.isdir(folder):
        raise UserError(f"feature folder not found: {folder}")
    # Links above the folder are resolved, but the folder keeps its name, so that lists stay portable.
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
            snippets, _ = read_shape(path)
        except NotOneCrop:
            skipped.append(path)
            continue
        name, crop = split_crop(path.stem)
        label = dataset.label_of(name, path.parent.name)
        if label is None and name in annotations:
            label = annotations[name].label
        if label is None:
            raise UserError(
                f"{path}: neither its name, its folder nor an annotation gives the class of {name}; "
                f"classes of {dataset.title}: {', '.join(dataset.labels)} (--exclude leaves files out)"
            )
        video = videos.setdefault(name, Video(name, label, _split_of(inside.parts[:-1], dataset)))
        if crop in video.crops:
            raise UserError(_same_crop(video.crops[crop][0], path, name))
        video.crops[crop] = (path, snippets)
    if excluded:
        notes.append(f"{excluded} files left out by --exclude")
    if skipped:
        notes.append(f"{len(skipped)} files skipped that are not (snippets, dim), the first is {skipped[0]}")
    if not videos:
        raise UserError(f"no feature files (.npy, one per crop, of shape (snippets, dim)) below {folder}")
    return videos


def split_videos(
    videos: dict[str, Video],
    annotations: Annotations,
    dataset: Dataset,
    split_files: Sequence[str | Path],
    clean: bool,
    single_label: bool,
    notes: list[str],
) -> tuple[list[Video], list[Video]]:
    """Return training and test videos, each in the order of the released lists.

    Split files decide if there are any, else annotations and folders. ``clean`` moves videos that the released lists
    have on the wrong side; ``single_label`` leaves out videos of several classes.
    """
    if split_files:
        train, test = _split_by_files(split_files, videos, notes)
        names = sorted({video.name for video in train} & annotations.keys() - dataset.misplaced.keys())
        if names:
            notes.append(f"{len(names)} annotated videos are in the training list, the first is {names[0]}")
    else:
        train, test = _split_by_annotation(videos, annotations, dataset, notes)
    if clean:
        train, test = _correct_split(train, test, dataset, notes)
    if single_label:
        chosen = [[video for video in part if len(dataset.codes(video.label)) == 1] for part in (train, test)]
        if left_out := len(train) + len(test) - sum(map(len, chosen)):
            notes.append(f"{left_out} videos of several classes left out by --single-label")
        train, test = chosen
    train, test = (
        sorted(part, key=lambda video: dataset.list_order(video.label, video.name)) for part in (train, test)
    )
    return train, test


def read_split(path: str | Path) -> set[str]:
    """Return the video names of a split file: a name or path per line, or CSV with a column ``video`` or ``path``."""
    lines = [line.strip() for line in read_text(path, "split file").splitlines() if line.strip()]
    header = [cell.strip() for cell in lines[0].split(",")] if lines else []
    for column in ("video", "path"):
        if column in header:
            lines = [cells[column] for _, cells in read_csv(path, "split file", (column,)) if cells[column]]
            break
    if not lines:
        raise UserError(f"split file {path} is empty")
    names = map(video_key, lines)
    return {split_crop(name.removesuffix(".npy"))[0] if name.endswith(".npy") else name for name in names}


def _same_crop(first: Path, second: Path, name: str) -> str:
    index = next(index for index, (a, b) in enumerate(zip(first.parts, second.parts, strict=False)) if a != b)
    return (
        f"{first} and {second} are the same crop of {name}: if {first.parts[index]} and {second.parts[index]} are two "
        f"streams of features, give one of them (--features {Path(*second.parts[: index + 1])}); else --exclude one"
    )


def _split_of(folders: Iterable[str], dataset: Dataset) -> str | None:
    """Return the split in the folder names, the innermost first; a class such as "Protest" does not count."""
    labels = {label.lower() for label in dataset.labels}
    for word in map(str.lower, reversed(list(folders))):
        for split in ("train", "test"):
            if word not in labels and (word.startswith(split) or (split in word and word not in dataset.aliases)):
                return split
    return None


def _split_by_files(
    paths: Sequence[str | Path], videos: dict[str, Video], notes: list[str]
) -> tuple[list[Video], list[Video]]:
    train: set[str] = set()
    test: set[str] = set()
    for path in paths:
        names = read_split(path)
        note_missing(names, videos, f"videos in {path}", notes)
        if "train" in Path(path).name.lower():
            train |= names
        else:
            test |= names
    if both := sorted(train & test):
        raise UserError(f"{len(both)} videos are in both a training and a test split, the first is {both[0]}")
    if not train:
        train = videos.keys() - test
    elif not test:
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
        notes.append("no anomalous video is left for training, so all videos become the test set")
        return [], train + test
    if test and not any(dataset.is_normal(video.label) for video in test):
        notes.append(
            "the test set has no normal video: if annotations name only anomalous videos, normal test videos end up "
            "in the training list; name the test videos with --split"
        )
    return train, test


def note_missing(names: Iterable[str], videos: dict[str, Video], what: str, notes: list[str]) -> None:
    if missing := sorted(set(names) - videos.keys()):
        notes.append(f"{len(missing)} {what} have no feature file, the first is {missing[0]}")


def _correct_split(
    train: list[Video], test: list[Video], dataset: Dataset, notes: list[str]
) -> tuple[list[Video], list[Video]]:
    to_test = [video for video in train if dataset.misplaced.get(video.name) == "test"]
    to_train = [video for video in test if dataset.misplaced.get(video.name) == "train"]
    for moved, side in ((to_test, "test"), (to_train, "training")):
        if moved:
            names = ", ".join(video.name for video in moved)
            notes.append(f"moved to the {side} list, as in the official split (--protocol paper does not): {names}")
    return (
        [video for video in train if video not in to_test] + to_train,
        [video for video in test if video not in to_train] + to_test,
    )
