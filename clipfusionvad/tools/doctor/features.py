"""Checks of the feature files: readable, of one extraction, and of the videos that their names say."""

from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from clipfusionvad.data.features import NORM_RANGE, check_dim, load_features
from clipfusionvad.io.errors import UserError
from clipfusionvad.tools.doctor.dataset_scan import DatasetScan, ScannedList, ScannedRow
from clipfusionvad.tools.doctor.findings import ERROR, WARNING, Finding

# The median norms of the lists of one extraction differ by a few per cent.
LISTS_NORM_RANGE = 1.5
# CLIP's features share a direction: the videos of real lists have a median cosine of 0.88 with their centre, the
# lowest 0.6; the centres of two lists, one of CCTV and one of UCF-Crime, 0.73. Features of another model of the same
# width have a cosine near 0. Without a shared direction, nothing is reported.
COHERENT, FOREIGN, FOREIGN_LIST = 0.7, 0.3, 0.5
# Two videos of the same length: the cosine of their mean features above which they are compared snippet by snippet,
# and the correlation over time above which they are one video. Two recordings of one camera only reach the first.
ALIKE_MEAN, ALIKE_COURSE = 0.999, 0.9


def file_unreadable(scan: DatasetScan) -> Iterator[Finding]:
    """A feature file is damaged, empty, of a wrong shape, holds NaN, or lacks its further streams."""
    for row in scan.rows:
        if row.problem and row.entry.path.is_file():
            yield row.finding(ERROR, row.problem)


def feature_width(scan: DatasetScan) -> Iterator[Finding]:
    """Features have another width than the model's: they come from another CLIP."""
    for row in scan.read:
        try:
            check_dim(row.entry.path, row.features.dim, scan.settings.model.visual_width)
        except UserError as error:
            yield row.finding(ERROR, str(error))


def feature_norms(scan: DatasetScan) -> Iterator[Finding]:
    """Features have another scale than those of the other files: normalised, or of another model."""
    medians = []
    for listed in scan.lists:
        if not listed.read:
            continue
        median = float(np.median([row.features.norm for row in listed.read]))
        medians.append(median)
        for row in listed.read:
            norm = row.features.norm
            if norm and not median / NORM_RANGE <= norm <= median * NORM_RANGE:
                kind = "is normalised" if abs(norm - 1) < 0.05 else f"has features of norm {norm:.3g}"
                what = f"{row.file} {kind} among others of norm {median:.3g}"
                yield row.finding(ERROR, what, "extract it as the others were")
    if len(medians) == 2 and max(medians) > LISTS_NORM_RANGE * min(medians) > 0:
        what = f"the features' norm is {medians[1]:.3g} here and {medians[0]:.3g} in the training list"
        yield scan.test.finding(ERROR, what, "extract both lists with one model and the same options")


def feature_direction(scan: DatasetScan) -> Iterator[Finding]:
    """Features point in another direction than all others: another model of the same width."""
    centres = []
    for listed in scan.lists:
        rows, units = _units(listed, scan.settings.model.visual_width)
        if len(rows) < 3:
            continue
        centre = np.median(units, axis=0)
        centre /= max(float(np.linalg.norm(centre)), 1e-12)
        cosines = units @ centre
        if np.median(cosines) < COHERENT:
            continue
        centres.append(centre)
        for index in np.flatnonzero(cosines < FOREIGN):
            what = f"{rows[index].file} has a cosine of {cosines[index]:.2f} with the mean of the list"
            yield rows[index].finding(WARNING, what, f"others have {np.median(cosines):.2f}: is it from another model?")
    if len(centres) == 2 and (cosine := float(centres[0] @ centres[1])) < FOREIGN_LIST:
        what = f"the features point elsewhere than those of the training list (cosine of the means {cosine:.2f})"
        yield scan.test.finding(WARNING, what, "were both extracted with the same model?")


def feature_dtype(scan: DatasetScan) -> Iterator[Finding]:
    """Files have different precisions: they are of more than one extraction."""
    (usual, _), *others = Counter(row.features.dtype for row in scan.read).most_common() or [("", 0)]
    for dtype, count in others:
        row = next(row for row in scan.read if row.features.dtype == dtype)
        what = f"{row.file}{f' and {count - 1} more' if count > 1 else ''} of {dtype}, others of {usual}"
        yield row.finding(WARNING, what, "are they from two extractions?")


def blank_snippets(scan: DatasetScan) -> Iterator[Finding]:
    """Snippets are all zero, or all snippets of a video are the same."""
    for row in scan.read:
        count = row.features.snippets
        if row.features.zeros:
            what = f"{row.features.zeros} of {count} snippets of {row.file} are all zero"
            yield row.finding(WARNING, what, "extract the video again")
        elif row.features.still:
            what = f"all {count} snippets of {row.file} are the same"
            yield row.finding(WARNING, what, "look at the video, or extract it again")


def crop_lengths(scan: DatasetScan) -> Iterator[Finding]:
    """Crops of one video differ in length: one of them is another video's."""
    for listed in scan.lists:
        for rows in listed.videos.values():
            lengths = Counter(row.features.snippets for row in rows if row.features)
            for row in rows:
                if row.features and row.features.snippets != (usual := lengths.most_common(1)[0][0]):
                    what = f"{row.file} has {row.features.snippets} snippets, other crops {usual}"
                    yield row.finding(WARNING, what, "is it another video? Extract it again")


def same_features(scan: DatasetScan) -> Iterator[Finding]:
    """The same features under two names: a copy, or a file in another one's place."""
    groups: dict[bytes, list[ScannedRow]] = defaultdict(list)
    for row in scan.read:
        groups[row.features.digest].append(row)
    for first, *others in groups.values():
        for row in others:
            what = f"{row.file} holds the same features as {first.file} ({first.list.path}, row {first.entry.row})"
            if row.video == first.video and row.file != first.file:
                yield row.finding(WARNING, what, "two crops are never the same: extract again")
            elif row.file != first.file:
                crossing = row.list is not first.list or row.label != first.label
                yield row.finding(ERROR if crossing else WARNING, what, "one is a copy under another name")


def near_duplicates(scan: DatasetScan) -> Iterator[Finding]:
    """A test video is nearly a training video, snippet by snippet, under another name."""
    (train, a), (test, b) = (_units(listed, scan.settings.model.visual_width) for listed in scan.lists)
    if not (train and test):
        return
    lengths = [np.array([row.features.snippets for row in rows]) for rows in (train, test)]
    seen: set[tuple[str, str]] = set()
    # One or two snippets are too few to compare.
    for index in np.flatnonzero(lengths[1] > 2):
        same = np.flatnonzero(lengths[0] == lengths[1][index])
        for other in same[a[same] @ b[index] > ALIKE_MEAN]:
            tested, trained = test[index], train[other]
            pair = trained.video, tested.video
            reported = trained.features.digest == tested.features.digest or pair[0] == pair[1] or pair in seen
            if not reported and _same_course(trained, tested):
                seen.add(pair)
                place = f"{scan.train.path}, row {trained.entry.row}"
                what = f"{tested.file} is nearly {trained.file} ({place}), snippet by snippet"
                yield tested.finding(WARNING, what, "are they one video under two names? Then remove one")


def _same_course(one: ScannedRow, other: ScannedRow) -> bool:
    """Whether two videos change alike over time."""
    a, b = (load_features(row.entry.path).astype(np.float32) for row in (one, other))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return float((a * b).sum()) > ALIKE_COURSE * float(np.linalg.norm(a) * np.linalg.norm(b)) > 0


def _units(listed: ScannedList, width: int) -> tuple[list[ScannedRow], np.ndarray]:
    """Return the rows with features of the right width, and the directions (N, D) of their mean features."""
    rows = [row for row in listed.read if row.features.dim == width]
    means = np.stack([row.features.mean for row in rows]) if rows else np.zeros((0, width), np.float32)
    return rows, means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
