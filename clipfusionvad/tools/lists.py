"""Build a dataset's lists and ground truth from a folder of features and the official annotation files."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import numpy as np

from clipfusionvad.data.annotations import (
    Annotation,
    join_pieces,
    match_names,
    read_annotation_files,
    read_lengths,
    with_classes,
    write_annotations_csv,
)
from clipfusionvad.data.config import FRAMES_PER_SNIPPET, SEGMENTS
from clipfusionvad.data.conventions import find_convention, judged_frames, misfit, read_bounds
from clipfusionvad.data.features import CONVERT, NotOneCrop, check_frames, read_shape, recorded_frames
from clipfusionvad.data.lists import Entry, read_split, split_crop, write_list
from clipfusionvad.data.truth import frames_from_segments
from clipfusionvad.datasets import NORMAL_IN_TRUTH, Dataset
from clipfusionvad.io.errors import UserError, is_text, printable, warn
from clipfusionvad.io.files import walk_files, write_array
from clipfusionvad.io.option import Option, size

Annotations = dict[str, Annotation]
# Videos without features that are named.
SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class ListsConfig:
    """What lists are built from, and how."""

    features: Annotated[str, Option("folder with the .npy feature files", metavar="DIR", required=True)]
    output: Annotated[str, Option("folder for lists and truth", metavar="DIR", required=True)]
    annotations: Annotated[
        tuple[str, ...],
        Option(
            "annotation files or folders of masks, and a CSV video,frames of lengths", metavar="FILE", nonempty=True
        ),
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
    exclude: Annotated[tuple[str, ...], Option("leave out, by name or path", metavar="GLOB", nonempty=True)] = ()
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
    convention: Annotated[
        str | None,
        Option("which frames the truth holds: docs/datasets.md (default: 16 per row)", metavar="NAME"),
    ] = None
    frames_per_snippet: Annotated[int, size("frames that a feature row covers", metavar="N")] = FRAMES_PER_SNIPPET
    segments: Annotated[str, Option(SEGMENTS, choices=("fixed", "equal"))] = "fixed"


@dataclass
class Video:
    """One video's feature files: ``crops`` maps the crop number (None: no suffix) to (path, snippets)."""

    name: str
    label: str
    #: "train" or "test" if the name of a folder contains it.
    folder_split: str | None = None
    crops: dict[int | None, tuple[Path, int]] = field(default_factory=dict)


def build_lists(dataset: Dataset, config: ListsConfig) -> str:
    """Write training list, test list and ground truth of a dataset; return a table of what was written.

    Files, order and arrays are those that the dataset's original projects released, fitted to these features.
    ``protocol`` "clean" corrects videos that the released lists have on the wrong side, and joins videos that the
    annotation has in pieces. Nothing is written unless everything has been checked (``UserError``).
    """
    notes: list[str] = []
    clean = config.protocol == "clean"
    tested = {name for path in config.split if _side_of(path) == "test" for name in read_split(path)}
    lengths = {path: found for path in config.annotations if (found := read_lengths(path))}
    frames_of = {name: count for found in lengths.values() for name, count in found.items()}
    annotations = [path for path in config.annotations if path not in lengths]
    for_frames, for_classes = read_annotation_files(annotations, dataset, tested)
    if clean:
        for_frames, for_classes = (join_pieces(read, dataset) for read in (for_frames, for_classes))
    convention = find_convention(dataset, config.convention) if config.convention else None
    if convention:
        if config.segments == "equal" or config.frames_per_snippet != FRAMES_PER_SNIPPET:
            raise UserError(f"--convention {convention.name} needs features with {FRAMES_PER_SNIPPET} frames per row")
        for_frames, for_classes = (
            {name: read_bounds(item, convention) for name, item in read.items()} for read in (for_frames, for_classes)
        )
    videos = _find_videos(config.features, dataset, for_classes, config.exclude, notes)
    for video in videos.values() if clean else ():
        if (whole := dataset.whole_of(video.name)) != video.name:
            raise UserError(
                f"{_first_file(video)}: {video.name} is a piece of {whole}, but annotations are in frames of the whole "
                f"video: give features of whole videos, or --exclude the pieces"
            )
    names = _find_names({*for_frames, *for_classes}, videos, "annotated videos", notes)
    if config.annotations and not names:
        raise _nothing_matches(" and ".join(config.annotations), for_classes, videos)
    for_frames, for_classes = (
        {names.get(name, name): replace(item, video=names.get(name, name)) for name, item in read.items()}
        for read in (for_frames, for_classes)
    )
    train, test = split_videos(videos, for_classes, dataset, config, notes)
    told = config.annotations or config.split or "train" in Path(config.features).name.lower()
    if not (test or told or any(video.folder_split for video in videos.values())):
        raise UserError(
            f"it is unknown which videos below {config.features} are test videos: give --annotations FILE or --split "
            f"FILE, or put them in folders named train and test"
        )
    if convention and convention.official_split:
        test.sort(key=lambda video: dataset.list_order(video.label, video.name, official=True))
    if test and config.truth and config.segments != "equal":
        paths = [path for video in test for path, _ in video.crops.values()]
        check_frames(paths, config.frames_per_snippet, recorded_frames(paths))

    train_rows = [
        (path, video.label)
        for video in train
        for _, (path, _) in sorted(video.crops.items(), key=lambda item: -1 if item[0] is None else item[0])
    ]
    test_rows, frames, keyed, counted = [], [], [], []
    for video in test:
        path, snippets = _choose_crop(video, dataset.test_crop if config.test_crop is None else config.test_crop)
        test_rows.append((path, video.label))
        if config.truth:
            _check_annotation(video, (for_frames, for_classes), dataset)
            timed, item = (read.get(video.name, Annotation(video.name)) for read in (for_frames, for_classes))
            known = item.frames or timed.frames or frames_of.get(video.name)
            length = known if config.segments == "equal" else config.frames_per_snippet * snippets
            if length is None:
                raise UserError(
                    f"no annotation holds the number of frames of test video {video.name} ({path}), which --segments "
                    f"equal needs: give a CSV with the columns video,frames as one more of --annotations"
                )
            if convention and known:
                counted.append((video.name, known, snippets))
                known = length = int(judged_frames(convention, [video.name], [known])[0])
            elif convention and convention.rule == "all":
                raise UserError(
                    f"no annotation holds the number of frames of test video {video.name} ({path}), which --convention "
                    f"{convention.name} needs: give a CSV with the columns video,frames as one more of --annotations"
                )
            frames.append(frames_from_segments(timed.segments, length))
            item = with_classes(item, video.label, dataset)
            keyed.append(replace(item, frames=known or length, label=video.label))
    if convention and counted and (wrong := misfit(dataset, convention, *zip(*counted, strict=True))):
        raise UserError(wrong)
    pairs = list(zip(frames, keyed, strict=True))
    counts = [int((frames_from_segments(item.segments, len(truth)) != truth).sum()) for truth, item in pairs]
    if any(counts):
        notes.append(
            f"the annotation files disagree in {sum(counts)} frames of {sum(map(bool, counts))} videos: "
            f"{dataset.truth_files['frames']} follows the one without classes, "
            f"{dataset.list_files['truth']} the one with classes"
        )

    base = Path(os.path.realpath(config.output))
    for side, rows in (("train", train_rows), ("test", test_rows)):
        # Paths are relative if lists and features are neighbours, which can move together.
        paths = [Path(os.path.relpath(path, base)) if path.is_relative_to(base.parent) else path for path, _ in rows]
        entries = [Entry(path, label, row) for row, (path, (_, label)) in enumerate(zip(paths, rows, strict=True), 2)]
        if entries:
            write_list(base / dataset.list_files[side], entries)
    if not train:
        notes.append(f"no training videos: {dataset.list_files['train']} not written")
    if not test:
        notes.append("no test videos: test list and ground truth not written")
    if keyed:
        write_annotations_csv(base / dataset.list_files["truth"], keyed)
        write_array(base / dataset.truth_files["frames"], np.concatenate(frames).astype(np.float32))
        # As released: arrays of objects, in which bounds are text for annotated videos and numbers for normal ones.
        segments, labels = np.empty((2, len(keyed)), dtype=object)
        for index, (truth, item) in enumerate(pairs):
            texts = [[str(start), str(end)] for start, end in item.segments]
            segments[index] = texts if texts else [[0, len(truth)]]
            labels[index] = item.labels or [NORMAL_IN_TRUTH]
        write_array(base / dataset.truth_files["segments"], segments)
        write_array(base / dataset.truth_files["labels"], labels)
    for note in notes:
        warn(note)
    return f"{_table(dataset, train, test, len(train_rows), frames)}\nwritten to {config.output}"


def _first_file(video: Video) -> Path:
    return next(iter(video.crops.values()))[0]


def _choose_crop(video: Video, crop: int) -> tuple[Path, int]:
    for wanted in (crop, None):
        if wanted in video.crops:
            return video.crops[wanted]
    present = ", ".join(sorted(map(str, video.crops)))
    raise UserError(f"test video {video.name} has no crop {crop}, only {present}; see --test-crop")


def _check_annotation(video: Video, annotations: Iterable[Annotations], dataset: Dataset) -> None:
    normal = dataset.is_normal(video.label)
    for source in annotations:
        item = source.get(video.name)
        if normal and item and item.segments:
            raise UserError(f"test video {video.name} is {video.label}, but its annotation has intervals")
        if not normal and not (item and item.segments):
            raise UserError(
                f"test video {video.name} is {video.label}, but has no annotation ({_first_file(video)}); give "
                f"one with --annotations, or --no-truth to judge only whole videos"
            )


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


def _find_videos(
    folder: str | Path, dataset: Dataset, annotations: Annotations, exclude: Sequence[str], notes: list[str]
) -> dict[str, Video]:
    """Return the videos below a folder by name, with label and crops; ``notes`` gets what is skipped."""
    if not os.path.isdir(folder):
        raise UserError(f"feature folder not found: {folder}")
    # Links above the folder are resolved, but the folder keeps its name, so that lists stay portable.
    named = Path(os.path.abspath(folder))
    root = named.parent.resolve() / named.name
    videos: dict[str, Video] = {}
    found: list[tuple[Path, int]] = []
    excluded = 0
    skipped: list[str] = []
    unnamed: list[str] = []
    for path in walk_files(root, ".npy"):
        inside = path.relative_to(root)
        if any(fnmatchcase(path.name, glob) or fnmatchcase(inside.as_posix(), glob) for glob in exclude):
            excluded += 1
            continue
        if not is_text(str(inside)):
            unnamed.append(printable(str(path)))
            continue
        try:
            found.append((path, read_shape(path)[0]))
        except NotOneCrop as error:
            skipped.append(str(error))
    names = match_names(annotations, {split_crop(path.stem)[0] for path, _ in found})
    labels = {names[name]: item.label for name, item in annotations.items() if name in names}
    for path, snippets in found:
        name, crop = split_crop(path.stem)
        label = dataset.label_of(name, path.parent.name) or labels.get(name)
        if label is None:
            raise UserError(
                f"{path}: neither its name, its folder nor an annotation gives the class of {name}; "
                f"classes of {dataset.title}: {', '.join(dataset.labels)} (--exclude leaves files out)"
            )
        folders = path.relative_to(root).parts[:-1]
        video = videos.setdefault(name, Video(name, label, _split_of(folders, dataset)))
        if crop in video.crops:
            raise UserError(_same_crop(video.crops[crop][0], path, name))
        video.crops[crop] = (path, snippets)
    if excluded:
        notes.append(f"{excluded} files left out by --exclude")
    if unnamed:
        notes.append(
            f"{len(unnamed)} files left out because their names have control characters or bytes that are not UTF-8, "
            f"the first is {unnamed[0]}: rename them"
        )
    if skipped:
        advice = "" if CONVERT in skipped[0] else f" ({CONVERT} converts other arrays)"
        notes.append(f"{len(skipped)} files skipped that are not (snippets, dim): {skipped[0]}{advice}")
    if not videos:
        if not skipped and (first := next(walk_files(root, ""), None)):
            skipped = [f"the first file is {first}; {CONVERT} reads .npy, .npz, .pt and .h5"]
        raise UserError(
            f"no feature files (.npy, one per crop, of shape (snippets, dim)) below {folder}"
            + (f": {skipped[0]}" if skipped else "")
        )
    return videos


def _same_crop(first: Path, second: Path, name: str) -> str:
    index = next(index for index, (a, b) in enumerate(zip(first.parts, second.parts, strict=False)) if a != b)
    return (
        f"{first} and {second} are the same crop of {name}: if {first.parts[index]} and {second.parts[index]} are two "
        f"streams of features, give one of them (--features {Path(*second.parts[: index + 1])}); or --exclude one"
    )


def _split_of(folders: Sequence[str], dataset: Dataset) -> str | None:
    """Return the split in the folder names, the innermost first; a class such as "Protest" does not count."""
    labels = {label.lower() for label in dataset.labels}
    for word in map(str.lower, reversed(folders)):
        for split in ("train", "test"):
            if word not in labels and (word.startswith(split) or (split in word and word not in dataset.aliases)):
                return split
    return None


def split_videos(
    videos: dict[str, Video], annotations: Annotations, dataset: Dataset, config: ListsConfig, notes: list[str]
) -> tuple[list[Video], list[Video]]:
    """Return training and test videos, each in the order of the released lists.

    Split files decide if there are any, else annotations and folders.
    """
    normal = {name for name, video in videos.items() if dataset.is_normal(video.label)}
    train: set[str] = set()
    test: set[str] = set()
    for path in config.split:
        split = read_split(path)
        matched = _find_names(split, videos, f"videos in {path}", notes)
        side = train if _side_of(path) == "train" else test
        side |= {matched.get(name, name) for name in split}
    if config.split and not (train | test) & videos.keys():
        raise _nothing_matches(" and ".join(config.split), train | test, videos)
    if both := sorted(train & test):
        raise UserError(f"{len(both)} videos are in both a training and a test split, the first is {both[0]}")
    if config.split:
        train, test = train or videos.keys() - test, test or videos.keys() - train
        if neither := sorted(videos.keys() - train - test):
            notes.append(f"{len(neither)} videos are in no split file and are left out, the first is {neither[0]}")
        if names := train & videos.keys() & annotations.keys() - dataset.misplaced.keys():
            notes.append(f"{len(names)} annotated videos are in the training list, the first is {min(names)}")
    else:
        test = {name for name, video in videos.items() if name in annotations or video.folder_split == "test"}
        train = videos.keys() - test
        if train and test and train <= normal:
            notes.append("no anomalous video is left for training, so all videos become the test set")
            train, test = set(), set(videos)
        elif test and not test & normal:
            notes.append(
                "the test set has no normal video: if annotations name only anomalous videos, normal test videos end "
                "up in the training list; name the test videos with --split"
            )
    for wrong, right, title in ((train, test, "test"), (test, train, "training")) if config.protocol == "clean" else ():
        moved = sorted(name for name in wrong & videos.keys() if title.startswith(dataset.misplaced.get(name, "-")))
        if moved:
            official = "as in the official split (--protocol paper does not)"
            notes.append(f"moved to the {title} list, {official}: {', '.join(moved)}")
            wrong.difference_update(moved)
            right.update(moved)
    several = {name for name, video in videos.items() if config.single_label and len(dataset.codes(video.label)) > 1}
    if left_out := len(several & (train | test)):
        notes.append(f"{left_out} videos of several classes left out by --single-label")
    ordered = sorted(videos.values(), key=lambda video: dataset.list_order(video.label, video.name))
    first, second = ([video for video in ordered if video.name in side - several] for side in (train, test))
    return first, second


def _side_of(path: str) -> str:
    return "train" if "train" in Path(path).name.lower() else "test"


def _find_names(names: set[str], videos: dict[str, Video], what: str, notes: list[str]) -> dict[str, str]:
    """Return the names of the features by those in a file; ``notes`` gets what is missing or named otherwise."""
    found = match_names(names, videos)
    if found and (missing := sorted(names - found.keys())):
        first = ", ".join(missing[:SHOWN]) + ", …" * (len(missing) > SHOWN)
        notes.append(f"{len(missing)} {what} have no feature file ({len(found)} have): {first}")
    if other := sorted((name, video) for name, video in found.items() if name != video):
        notes.append(f"{len(other)} {what} have features of a similar name, the first: {' = '.join(other[0])}")
    return found


def _nothing_matches(files: str, names: Iterable[str], videos: dict[str, Video]) -> UserError:
    return UserError(
        f"no video of {files} has a feature file, because the names differ ({min(names)} there, {min(videos)} in the "
        f"features): rename one side"
    )
