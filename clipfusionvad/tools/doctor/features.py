"""Checks of the features of both lists: damaged, of two extractions, of another model, copied, out of order."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from clipfusionvad.data.features import NORM_RANGE, check_dim, load_features
from clipfusionvad.io.errors import UserError
from clipfusionvad.tools.doctor import ERROR, NOTE, WARNING, Finding
from clipfusionvad.tools.doctor.scan import DatasetScan, ScannedList, ScannedRow
from clipfusionvad.tools.features.centroid import agreement, what_differs
from clipfusionvad.tools.features.order import RowOrder

# The median norms of the lists of one extraction differ by a few per cent.
LISTS_NORM_RANGE = 1.5
# CLIP's features share a direction: the videos of real lists have a median cosine of 0.88 with their centre, the
# lowest 0.6; the centres of two lists, one of CCTV and one of UCF-Crime, 0.73. Features of another model of the same
# width have a cosine near 0. Without a shared direction, nothing is reported.
COHERENT, FOREIGN, FOREIGN_LIST = 0.7, 0.3, 0.5
# Two videos of the same length: the cosine of their mean features above which they are compared snippet by snippet,
# and the correlation over time above which they are one video. Two recordings of one camera only reach the first.
ALIKE_MEAN, ALIKE_COURSE = 0.999, 0.9
# Roughness (see ``tools.features.order``): of 16 and more real snippets in order of time, 0.1 to 0.85; in random order,
# 0.8 to 1.2, mostly above 0.9. Noise reaches 1 in still videos, so those that vary less than half as much as most are
# not judged, and random order is reported where three times as many videos lie above ``RANDOM`` as below it.
RANDOM, ORDERED, FAR_MORE = 0.9, 0.75, 3
# Sorting rows by number makes those in order of time rougher (1.2 times), those in the order of file names smoother.
SMOOTHER, SMOOTH = 0.9, 0.85


def file_unreadable(scan: DatasetScan) -> Iterator[Finding]:
    """A feature file is damaged, empty, of a wrong shape, holds NaN, or lacks its further streams."""
    for row in scan.rows:
        if row.problem and row.entry.path.is_file():
            yield row.finding(ERROR, row.problem)


def feature_width(scan: DatasetScan) -> Iterator[Finding]:
    """Features have another width than the model's: they come from another CLIP."""
    for row in scan.read:
        try:
            check_dim(row.entry.path, row.features.dim, scan.settings.model.feature_width)
        except UserError as error:
            yield row.finding(ERROR, str(error))


def feature_norms(scan: DatasetScan) -> Iterator[Finding]:
    """Features have another scale than those of the other files: normalised, or of another model."""
    medians = []
    for listed in scan.lists:
        if listed.read:
            medians.append(float(np.median([row.features.norm for row in listed.read])))
        for row in listed.read:
            norm, median = row.features.norm, medians[-1]
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
        rows, units = _units(listed, scan.settings.model.feature_width)
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


def reference_features(scan: DatasetScan) -> Iterator[Finding]:
    """With --reference: how far the features' mean agrees with that of other features; of another model or scale."""
    if scan.reference is None:
        return
    path, centroid = scan.reference
    for listed in scan.lists:
        means = [row.features.mean for row in listed.read if len(row.features.mean) == len(centroid)]
        if not means:
            if listed.read:
                what = f"{path} has {len(centroid)} numbers a row, the features have {listed.read[0].features.dim}"
                yield listed.finding(ERROR, what, "name features of the same model")
            continue
        cosine, ratio = agreement(np.asarray(means, np.float64).mean(axis=0), centroid)
        single = np.quantile([agreement(mean, centroid)[0] for mean in means], (0.05, 0.95))
        what = (
            f"the features' mean has a cosine of {cosine:.2f} with that of {path} (most videos' {single[0]:.2f} to "
            f"{single[1]:.2f}), and {ratio:.3g} times its length"
        )
        differs = what_differs(cosine, ratio)
        yield listed.finding(WARNING if differs else NOTE, what, differs or "this fits features of one model")


def row_order(scan: DatasetScan) -> Iterator[Finding]:
    """Rows are not in order of time: they are sorted as text (0, 1, 10, …), or shuffled."""
    for listed in scan.lists:
        measured = [(row, row.features.order) for row in listed.read if row.features.order]
        typical = float(np.median([order.variation for _, order in measured])) if measured else 0.0
        judged = [(row, order) for row, order in measured if order.variation >= typical / 2]
        by_name = [row for row, order in judged if order.sorted_roughness < min(SMOOTHER * order.roughness, SMOOTH)]
        by_chance = [row for row, order in judged if order.roughness > RANDOM]
        unclear = sum(ORDERED < order.roughness <= RANDOM for _, order in judged)
        # Without a direction that snippets share, features are noise, not a model's.
        if typical > 1 or not by_name + by_chance:
            continue
        if len(by_name) >= len(by_chance):
            what = "in the order of file names (0, 1, 10, 11, …)"
            advice = "sort the parts by number, not by name, and make the files again"
            yield _out_of_order(ERROR, by_name, judged, what, advice)
        elif len(by_chance) >= FAR_MORE * unclear:
            what = "in random order: neighbouring rows differ as much as distant ones"
            yield _out_of_order(WARNING, by_chance, judged, what, "were they shuffled, or not sorted by time?")


def _out_of_order(
    level: str, rows: list[ScannedRow], judged: list[tuple[ScannedRow, RowOrder]], what: str, advice: str
) -> Finding:
    videos, of = len({row.video for row in rows}), len({row.video for row, _ in judged})
    return rows[0].finding(
        level, f"the rows of {videos} of {of} videos, the first is {rows[0].file}, are {what}", advice
    )


def feature_dtype(scan: DatasetScan) -> Iterator[Finding]:
    """Files have different precisions: they are of more than one extraction."""
    counted = Counter(row.features.dtype for row in scan.read).most_common()
    for dtype, count in counted[1:]:
        row = next(row for row in scan.read if row.features.dtype == dtype)
        what = f"{row.file}{f' and {count - 1} more' if count > 1 else ''} of {dtype}, others of {counted[0][0]}"
        yield row.finding(WARNING, what, "are they from two extractions?")


def blank_snippets(scan: DatasetScan) -> Iterator[Finding]:
    """Snippets are all zero, or all snippets of a video are the same."""
    for row in scan.read:
        count, zeros = row.features.snippets, row.features.zeros
        if zeros:
            what = f"{zeros} of {count} snippets of {row.file} are all zero"
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
    firsts: dict[bytes, ScannedRow] = {}
    for row in scan.read:
        first = firsts.setdefault(row.features.digest, row)
        what = f"{row.file} holds the same features as {first.file} ({first.list.path}, row {first.entry.row})"
        if row.file != first.file and row.video == first.video:
            yield row.finding(WARNING, what, "two crops are never the same: extract again")
        elif row.file != first.file:
            crossing = row.list is not first.list or row.label != first.label
            yield row.finding(ERROR if crossing else WARNING, what, "one is a copy under another name")


def near_duplicates(scan: DatasetScan) -> Iterator[Finding]:
    """A test video is nearly a training video, snippet by snippet, under another name."""
    (train, a), (test, b) = (_units(listed, scan.settings.model.feature_width) for listed in scan.lists)
    lengths = np.array([row.features.snippets for row in train])
    seen: set[tuple[str, str]] = set()
    for tested, unit in zip(test, b, strict=True):
        same = np.flatnonzero(lengths == tested.features.snippets)
        # One or two snippets are too few to compare.
        for other in same[a[same] @ unit > ALIKE_MEAN] if tested.features.snippets > 2 else ():
            trained = train[other]
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
    means = np.array([row.features.mean for row in rows], np.float32).reshape(-1, width)
    return rows, means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
