"""Fit score files to the truth of a test set: which scores are of which video, and which frames each one covers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipfusionvad.data.annotations import Annotation, match_names, with_classes
from clipfusionvad.data.config import FRAMES_PER_SNIPPET
from clipfusionvad.data.conventions import SHOWN, convention_of, find_convention, judged_frames, read_bounds
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.truth import Truth, frames_from_segments
from clipfusionvad.datasets import NORMAL_IN_TRUTH, Convention, Dataset
from clipfusionvad.engine.evaluator import VideoDataset, VideoScores
from clipfusionvad.io.errors import UserError
from clipfusionvad.tools.evaluate.score_files import ScoreFile
from clipfusionvad.tools.evaluate.truth import Annotations, KnownTruth

EQUAL = "equal"


@dataclass(frozen=True)
class Judged:
    """Scores of a file, one item per video in the order of the truth, with the frames that they are judged on.

    ``bordered``: the videos are told apart; else all are one. ``classed``: the truth names classes.
    """

    scores: list[VideoScores]
    videos: VideoDataset
    convention: str
    notes: list[str]
    bordered: bool = True
    classed: bool = True


@dataclass(frozen=True)
class _Fit:
    """A way in which scores fit: names, judged frames and scores (V,) of each video; frames per score, None: equal."""

    found: ScoreFile
    names: list[str]
    judged: np.ndarray
    rows: np.ndarray
    stride: int | None


def fit_scores(
    path: str, found: ScoreFile, known: KnownTruth, dataset: Dataset, convention: str | None, stride: str | None
) -> Judged:
    """Return the scores of a file with the truth of each video.

    ``stride`` is the number of frames per score, "equal", or None: the one that fits. ``UserError`` where videos are
    unknown or missing, and where the numbers of scores and frames do not fit; it names the convention that would.
    """
    wanted = find_convention(dataset, convention) if convention else None
    strides = [FRAMES_PER_SNIPPET, 1, None] if stride is None else [None if stride == EQUAL else int(stride)]
    if known.array is not None:
        return _judge_array(path, found, known, dataset, wanted, strides)
    return _judge_annotated(path, found, known, dataset, wanted, strides, stride is None)


def _judge_array(
    path: str,
    found: ScoreFile,
    known: KnownTruth,
    dataset: Dataset,
    wanted: Convention | None,
    strides: Sequence[int | None],
) -> Judged:
    """Judge scores by one array of frames, which holds no names."""
    array = known.array
    assert array is not None
    notes = list(found.notes)
    borders = found.rows if known.lengths is None else known.lengths
    named = convention_of(dataset, 0 if borders is None else len(borders), len(array))
    if wanted and wanted.frames and named != wanted:
        other = f"that is {named.name}: give --convention {named.name}" if named else "no convention has as many"
        raise UserError(f"{known.source} holds {len(array)} frames, {wanted.name} {wanted.frames}; {other}")
    orders = {"": found}
    if isinstance(known.lengths, dict):
        orders = {"": _align(path, found, list(known.lengths), dataset)}
    elif found.names:
        orders = {"the order of the lists": _in_list_order(found, dataset)}
        if found.ordered:
            orders = {"the file's order": found} | orders
    fits = {order: fit for order, own in orders.items() if (fit := _fit_array(own, array, known.lengths, strides))}
    if not fits:
        raise UserError(_array_misfit(path, found, known, dataset, named))
    # The truth contradicts the names least in the right order.
    order = min(fits, key=lambda one: len(_contradictions(fits[one], array, dataset)))
    fit = fits[order]
    if order:
        notes.append(f"{path}: {known.source} holds no names; the videos are taken in {order}")
    parts = np.split(array, np.cumsum(fit.judged)[:-1])
    if wrong := [
        name for name in _contradictions(fit, array, dataset) if dataset.is_normal(dataset.label_of(name) or "")
    ]:
        raise UserError(f"{known.source} has abnormal frames in normal videos, {_some(wrong)}: is it in another order?")
    known_labels = [dataset.label_of(name) for name in fit.names]
    labels = [own or dataset.labels[int(part.any())] for own, part in zip(known_labels, parts, strict=True)]
    truth = Truth(parts, [[] for _ in parts], [[] for _ in parts])
    if borders is None:
        notes.append(f"{path}: nothing tells the videos apart; give --lengths FILE for intervals and other metrics")
    name = named.name if named else "as the truth array"
    return _judged(fit, dataset, labels, truth, name, notes, borders is not None, False)


def _fit_array(
    found: ScoreFile, array: np.ndarray, lengths: dict[str, int] | np.ndarray | None, strides: Sequence[int | None]
) -> _Fit | None:
    """Return how scores in this order cover an array of frames, None if they do not."""
    if lengths is not None:
        counts = np.array([*lengths.values()] if isinstance(lengths, dict) else lengths)
        if counts.sum() != len(array):
            raise UserError(f"--lengths are {counts.sum()} frames in all, the truth holds {len(array)}")
        return next(_fits(found, _names(found, lengths, len(counts)), counts, strides), None)
    rows = np.array([len(found.scores)]) if found.rows is None else found.rows
    size = next((size for size in strides if size and size * len(found.scores) == len(array)), None)
    return _Fit(found, _names(found, None, len(rows)), size * rows, rows, size) if size else None


def _contradictions(fit: _Fit, array: np.ndarray, dataset: Dataset) -> list[str]:
    """Return the videos whose name says anything else than their frame truth."""
    parts = np.split(array, np.cumsum(fit.judged)[:-1])
    labels = [dataset.label_of(name) for name in fit.names]
    named = zip(fit.names, labels, parts, strict=True)
    return [name for name, label, part in named if label and dataset.is_normal(label) == part.any()]


def _array_misfit(path: str, found: ScoreFile, known: KnownTruth, dataset: Dataset, named: Convention | None) -> str:
    assert known.array is not None
    total, count = len(known.array), len(found.scores)
    what = f"{path} holds {count} scores, but {known.source} {total} frames{f' ({named.name})' if named else ''}"
    what += f": {FRAMES_PER_SNIPPET} frames per score need {total / FRAMES_PER_SNIPPET:.10g} scores, 1 needs {total}"
    for size in (FRAMES_PER_SNIPPET, 1):
        other = convention_of(dataset, len(found.rows) if found.rows is not None else 0, size * count)
        if other and other != named:
            what += f"; the scores are {size * count} frames, as in --convention {other.name}: give its truth"
            if short := (other.short or (named.short if named else None)):
                what += f", which differs in {_some(sorted(short))}"
            return what
    if isinstance(known.lengths, dict) and found.rows is not None:
        return f"{what}; {_differing(list(known.lengths), np.array([*known.lengths.values()]), found.rows)}"
    if found.rows is None or known.lengths is None:
        return what + "; give --lengths FILE if last snippets are incomplete" * (known.lengths is None)
    return f"{what}; {_differing(_names(found, None, len(found.rows)), np.asarray(known.lengths), found.rows)}"


def _judge_annotated(
    path: str,
    found: ScoreFile,
    known: KnownTruth,
    dataset: Dataset,
    wanted: Convention | None,
    strides: Sequence[int | None],
    free: bool,
) -> Judged:
    """Judge scores by annotations, which hold names."""
    names = _listed(path, found, known, dataset, wanted)
    annotated = match_names(known.timed, names)
    timed = {annotated[name]: item for name, item in known.timed.items() if name in annotated}
    named = match_names(known.classed, names)
    classed = {named[name]: item for name, item in known.classed.items() if name in named}
    if found.rows is not None:
        found = _align(path, found, names, dataset)
    frames = _frames(known, names, timed, classed)
    text = any(item.text for item in timed.values())
    # A file that holds exact bounds and lengths is judged on these, as in a test.
    order = sorted(dataset.conventions, key=lambda one: not text and one.rule != "all")
    notes = list(found.notes)
    if frames is None:
        fit, chosen = _fit_by_rows(path, found, names, timed, dataset, wanted, [s for s in strides if s], free)
        name = chosen.name if chosen else f"{fit.stride} frames per score"
    else:
        options = [
            (one, fit)
            for one in order
            for fit in _fits(found, names, judged_frames(one, names, frames), strides)
            if not one.frames or one.videos != len(names) or abs(one.frames - fit.judged.sum()) < 16 * len(names)
        ]
        # Equal parts fit anything; frames per score that fit go first.
        options.sort(key=lambda option: option[1].stride is None)
        mine = [option for option in options if wanted in (None, option[0])]
        if not mine:
            raise UserError(_misfit(path, found, names, frames, wanted or order[0], options))
        chosen, fit = mine[0]
        name = chosen.name
        if not wanted:
            same = {one.name for one, other in options if (other.judged == fit.judged).all() and one is not chosen}
            others = sorted({one.name for one, _ in options} - {name} - same)
            notes.append(f"{path}: convention {name}" + (f"; {', '.join(others)} would fit too" if others else ""))
    labels, truth = [], Truth([], [], [])
    for video, length in zip(names, fit.judged.tolist(), strict=True):
        item, by_class = (read.get(video, Annotation(video)) for read in (timed, classed))
        label = item.label or by_class.label or dataset.label_of(video)
        label = label or dataset.labels[int(bool(item.segments))]
        normal = dataset.is_normal(label)
        if normal and item.segments:
            raise UserError(f"{known.source} has intervals for {video}, which is {label}")
        if not normal and not item.segments:
            raise UserError(f"{known.source} has no interval for {video}, which is {label}")
        item, by_class = (with_classes(one, label, dataset) for one in (item, by_class))
        if chosen:
            item, by_class = read_bounds(item, chosen), read_bounds(by_class, chosen)
        labels.append(label)
        truth.frames.append(frames_from_segments(item.segments, length))
        truth.segments.append([(0, length)] if normal else by_class.segments)
        truth.labels.append([NORMAL_IN_TRUTH] if normal else by_class.labels)
    return _judged(fit, dataset, labels, truth, name, notes)


def _listed(path: str, found: ScoreFile, known: KnownTruth, dataset: Dataset, wanted: Convention | None) -> list[str]:
    """Return the test videos by name: those of --lengths in its order, else the annotated ones in list order."""
    if isinstance(known.lengths, dict):
        return list(known.lengths)
    official = bool(wanted and wanted.official_split)
    labels = {name: item.label or dataset.label_of(name) or "" for name, item in known.timed.items()}
    if found.names and not any(label and dataset.is_normal(label) for label in labels.values()):
        # The file names only anomalous videos.
        matched = match_names(found.names, labels)
        for name in found.names:
            label = dataset.label_of(name)
            if name not in matched and label and dataset.is_normal(label):
                labels[name] = label
    own = set(match_names(labels, found.names or []))
    skipped = {name for name, side in dataset.misplaced.items() if side == "train" and (found.names or official)}
    names = [name for name in labels if name in own or name not in skipped]
    return sorted(names, key=lambda name: dataset.list_order(labels[name] or dataset.labels[1], name, official))


def _frames(known: KnownTruth, names: list[str], timed: Annotations, classed: Annotations) -> np.ndarray | None:
    """Return the frames of each video, (V,); None where they are not all known."""
    if isinstance(known.lengths, dict):
        return np.array([*known.lengths.values()])
    if known.lengths is not None:
        if len(known.lengths) != len(names):
            raise UserError(f"--lengths holds {len(known.lengths)} videos, {known.source} {len(names)}")
        return known.lengths
    empty = Annotation("")
    frames = [timed.get(name, empty).frames or classed.get(name, empty).frames or 0 for name in names]
    return np.array(frames) if all(frames) else None


def _fit_by_rows(
    path: str,
    found: ScoreFile,
    names: list[str],
    timed: Annotations,
    dataset: Dataset,
    wanted: Convention | None,
    strides: Sequence[int],
    free: bool,
) -> tuple[_Fit, Convention | None]:
    """Fit scores whose videos' frames are unknown: each score covers as many frames as it should."""
    if found.rows is None or not strides:
        raise UserError(
            f"the frames of each test video are needed to tell the videos of {path} apart: give --lengths FILE, a CSV "
            f"video,frames or the numbers as .npy"
        )
    count, rows = len(found.scores), found.rows
    named = {size: convention_of(dataset, len(names), size * count) for size in strides}
    stride = strides[0]
    if free:
        ends = np.array([max((end for _, end in timed[n].segments), default=0) if n in timed else 0 for n in names])
        # The ends of most intervals lie within the scores only if these are of frames.
        by_frame = (ends > 0).any() and (ends <= rows)[ends > 0].mean() > 0.5
        stride = next((size for size in strides if named[size]), 1 if by_frame else stride)
    chosen = named[stride]
    if wanted and wanted.frames and wanted.videos == len(names) and chosen != wanted:
        total = stride * count
        what = f"{path} holds {count} scores of {stride} frames, {total} in all; {wanted.name} has {wanted.frames}"
        if chosen is None:
            raise UserError(
                f"{what} in {wanted.videos} videos; no convention of {dataset.title} has as many as the file"
            )
        short = sorted(wanted.short ^ chosen.short)
        raise UserError(
            f"{what}: give --convention {chosen.name}" + (f", which differs in {_some(short)}" if short else "")
        )
    return _Fit(found, names, stride * rows, rows, stride), wanted or chosen


def _fits(found: ScoreFile, names: list[str], judged: np.ndarray, strides: Sequence[int | None]) -> Iterator[_Fit]:
    """Yield the ways in which the scores fit videos of so many judged frames, for each number of frames per score."""
    count, videos, own = len(found.scores), len(names), found.rows
    if own is not None and len(own) != videos:
        return
    for size in strides:
        if size is None:
            rows = own if own is not None else np.full(videos, count // videos)
            # Not offered by default unless all videos have as many.
            if rows.sum() == count and (len(strides) == 1 or (len({*rows.tolist()}) == 1 and videos > 1)):
                yield _Fit(found, names, judged, rows, None)
            continue
        floor, ceil = judged // size, -(-judged // size)
        if own is not None and ((floor <= own) & (own <= ceil)).all():
            yield _Fit(found, names, judged, own, size)
        elif own is None and (fitting := [rows for rows in (floor, ceil) if rows.sum() == count and rows.min() > 0]):
            yield _Fit(found, names, judged, fitting[0], size)


def _misfit(
    path: str,
    found: ScoreFile,
    names: list[str],
    frames: np.ndarray,
    wanted: Convention,
    options: Sequence[tuple[Convention, _Fit]],
) -> str:
    """Say why scores do not fit a convention, which one they fit, and which videos differ."""
    judged, size = judged_frames(wanted, names, frames), FRAMES_PER_SNIPPET
    count = len(found.scores)
    if found.rows is not None and len(found.rows) != len(names):
        return f"{path} holds {len(found.rows)} videos, the truth {len(names)}"
    needed = (-(-judged // size)).sum()
    what = (
        f"{path} holds {count} scores, but {wanted.name} takes {needed} of {size} frames ({judged.sum()} frames in all)"
    )
    for other, fit in options:
        if fit.stride is not None:
            off = [name for name, a, b in zip(names, judged, fit.judged, strict=True) if a != b]
            return f"{what}; --convention {other.name} fits, which differs in {_some(off)}"
    if found.rows is not None:
        return f"{what}; no convention fits: {_differing(names, judged, found.rows)}"
    return f"{what}; no convention fits these lengths: are all videos there, and each whole?"


def _differing(names: Sequence[str], judged: np.ndarray, rows: np.ndarray) -> str:
    """Name the videos whose scores do not cover the judged frames."""
    size = FRAMES_PER_SNIPPET
    if len(rows) != len(names):
        return f"{len(rows)} videos in the scores, {len(names)} in the truth"
    off = [
        f"{name} ({row} scores, {-(-frames // size)} expected)"
        for name, frames, row in zip(names, judged.tolist(), rows.tolist(), strict=True)
        if not frames // size <= row <= -(-frames // size)
    ]
    return _some(off)


def _some(names: Sequence[str]) -> str:
    return (
        f"{len(names)} video{'s' * (len(names) > 1)}: {', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''}"
    )


def _align(path: str, found: ScoreFile, names: list[str], dataset: Dataset) -> ScoreFile:
    """Return the scores in the order of the test videos; numbered videos are in it."""
    if not found.names:
        if found.rows is not None and len(found.rows) != len(names):
            raise UserError(f"{path} holds {len(found.rows)} videos, the truth {len(names)}")
        return found
    matched = match_names(found.names, names)
    if unknown := [name for name in found.names if name not in matched]:
        raise UserError(
            f"{path} holds videos that the truth lacks, {_some(unknown)}" if matched else _foreign(path, unknown, names)
        )
    if missing := [name for name in names if name not in set(matched.values())]:
        raise UserError(f"{path} lacks {_some(missing)}")
    position = {matched[name]: row for row, name in enumerate(found.names)}
    return found.reorder([position[name] for name in names])


def _foreign(path: str, own: Sequence[str], names: Sequence[str]) -> str:
    return f"{path}: no video has a name of the truth; there the first is {names[0]}, here {own[0]}"


def _in_list_order(found: ScoreFile, dataset: Dataset) -> ScoreFile:
    """Return the scores in the order of the released lists, which a truth without names has."""
    assert found.names is not None
    labels = [dataset.label_of(name) or dataset.labels[1] for name in found.names]
    keys = [dataset.list_order(label, name) for label, name in zip(labels, found.names, strict=True)]
    return found.reorder(sorted(range(len(keys)), key=keys.__getitem__))


def _names(found: ScoreFile, lengths: dict[str, int] | np.ndarray | None, count: int) -> list[str]:
    if isinstance(lengths, dict):
        return list(lengths)
    return found.names if found.names and len(found.names) == count else [f"video {index}" for index in range(count)]


def _judged(
    fit: _Fit,
    dataset: Dataset,
    labels: list[str],
    truth: Truth,
    convention: str,
    notes: list[str],
    bordered: bool = True,
    classed: bool = True,
) -> Judged:
    named = enumerate(zip(fit.names, labels, strict=True), start=2)
    entries = [Entry(Path(f"{name}__0.npy"), label, row) for row, (name, label) in named]
    ends = np.cumsum(fit.rows)[:-1]
    classes = [None] * len(entries) if fit.found.classes is None else np.split(fit.found.classes, ends)
    scores = [VideoScores(one[None], own) for one, own in zip(np.split(fit.found.scores, ends), classes, strict=True)]
    videos = VideoDataset(entries, dataset, 0, truth, fit.stride)
    return Judged(scores, videos, convention, notes, bordered, classed)
