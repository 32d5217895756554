"""Checks of the feature files: whether they can be read, are of one kind, and are what their names say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from clipfusionvad.data.checks import NORM_RANGE
from clipfusionvad.data.features import check_dim, load_features
from clipfusionvad.io.errors import UserError
from clipfusionvad.tools.doctor.findings import ERROR, WARNING, Finding
from clipfusionvad.tools.doctor.survey import Features, Listed, Row, Survey

# Lists of one extraction have middling norms within a few per cent of each other.
LISTS_NORM_RANGE = 1.5
# CLIP's features share a direction: the videos of real lists have a middling cosine of 0.88 with their centre, the
# furthest 0.6; two lists' centres, one of CCTV and one of UCF-Crime, 0.73. Those of another model of the same width
# have hardly any. Where features do not share a direction, nothing can be said.
COHERENT, FOREIGN, FOREIGN_LIST = 0.7, 0.3, 0.5
# Of two videos as long as each other: how alike their mean features must be to compare them snippet by snippet, and
# how much their ups and downs must agree to be one. Two recordings of one camera agree in the first only.
ALIKE_MEAN, ALIKE_COURSE = 0.999, 0.9


def file_unreadable(survey: Survey) -> Iterator[Finding]:
    """A feature file that is damaged, empty, of a wrong shape, holds NaN, or lacks its further streams."""
    for listed in survey.lists:
        for row in listed.rows:
            if row.problem and row.present:
                yield Finding(ERROR, row.problem, listed.path, row.number)


def feature_width(survey: Survey) -> Iterator[Finding]:
    """Features of another width than the model's: they come from another CLIP."""
    for listed, row, found in _read(survey):
        try:
            check_dim(row.entry.path, found.dim, survey.options.visual_width)
        except UserError as error:
            yield Finding(ERROR, str(error), listed.path, row.number)


def feature_norms(survey: Survey) -> Iterator[Finding]:
    """Features of another scale than those of the other files: normalised, or of another model."""
    middles = []
    for listed in survey.lists:
        norms = np.array([row.features.norm for row in listed.read])
        if not len(norms):
            continue
        middle = float(np.median(norms))
        middles.append(middle)
        for row, norm in zip(listed.read, norms, strict=True):
            if norm and not middle / NORM_RANGE <= norm <= middle * NORM_RANGE:
                kind = "is normalised" if abs(norm - 1) < 0.05 else f"has features of norm {norm:.3g}"
                what = f"{row.entry.path.name} {kind} among others of norm {middle:.3g}"
                yield Finding(ERROR, what, listed.path, row.number, "extract it as the others were")
    if len(middles) == 2 and max(middles) > LISTS_NORM_RANGE * min(middles) > 0:
        what = f"the features' norm is {middles[1]:.3g} here and {middles[0]:.3g} in the training list"
        yield Finding(ERROR, what, survey.test.path, advice="extract both lists with one model and the same options")


def feature_direction(survey: Survey) -> Iterator[Finding]:
    """Features that point elsewhere than all others do: another model of the same width."""
    centres = []
    for listed in survey.lists:
        rows, units = _units(listed, survey.options.visual_width)
        if len(rows) < 3:
            continue
        centre = np.median(units, axis=0)
        centre /= max(float(np.linalg.norm(centre)), 1e-12)
        cosines = units @ centre
        if np.median(cosines) < COHERENT:
            continue
        centres.append((centre, listed))
        for index in np.flatnonzero(cosines < FOREIGN):
            what = f"{rows[index].entry.path.name} has a cosine of {cosines[index]:.2f} with the mean of the list"
            advice = f"others have {np.median(cosines):.2f}: is it from another model?"
            yield Finding(WARNING, what, listed.path, rows[index].number, advice)
    if len(centres) == 2 and (cosine := float(centres[0][0] @ centres[1][0])) < FOREIGN_LIST:
        what = f"the features point elsewhere than those of the training list (cosine of the means {cosine:.2f})"
        yield Finding(WARNING, what, centres[1][1].path, advice="were both extracted with the same model?")


def feature_dtype(survey: Survey) -> Iterator[Finding]:
    """Files of different precision: of more than one extraction."""
    kinds = Counter(found.dtype for _, _, found in _read(survey))
    for kind, count in kinds.most_common()[1:]:
        listed, row, _ = next(item for item in _read(survey) if item[2].dtype == kind)
        usual = kinds.most_common(1)[0][0]
        what = f"{row.entry.path.name}{f' and {count - 1} more' if count > 1 else ''} of {kind}, others of {usual}"
        yield Finding(WARNING, what, listed.path, row.number, "are they from two extractions?")


def blank_snippets(survey: Survey) -> Iterator[Finding]:
    """Snippets that are all zero, or a video whose snippets are all the same."""
    for listed, row, found in _read(survey):
        name = row.entry.path.name
        if found.zeros:
            what = f"{found.zeros} of {found.snippets} snippets of {name} are all zero"
            yield Finding(WARNING, what, listed.path, row.number, "extract the video again")
        elif found.still:
            what = f"all {found.snippets} snippets of {name} are the same"
            yield Finding(WARNING, what, listed.path, row.number, "look at the video, or extract it again")


def crop_lengths(survey: Survey) -> Iterator[Finding]:
    """Crops of one video differ in length: one of them is another video's."""
    for listed in survey.lists:
        for rows in listed.videos.values():
            read = [row for row in rows if row.figures]
            usual = Counter(row.features.snippets for row in read).most_common(1)
            for row in read:
                if row.features.snippets != usual[0][0]:
                    what = f"{row.entry.path.name} has {row.features.snippets} snippets, other crops {usual[0][0]}"
                    yield Finding(WARNING, what, listed.path, row.number, "is it another video? Extract it again")


def same_features(survey: Survey) -> Iterator[Finding]:
    """The same features under two names: a copy, or a file in another one's place."""
    groups: dict[bytes, list[tuple[Listed, Row]]] = defaultdict(list)
    for listed, row, found in _read(survey):
        groups[found.digest].append((listed, row))
    for (first, row), *others in groups.values():
        for listed, other in others:
            if other.entry.path.name == row.entry.path.name:
                continue
            where = f"{first.path}, row {row.number}"
            crossing = listed is not first or row.label != other.label
            what = f"{other.entry.path.name} holds the same features as {row.entry.path.name} ({where})"
            if other.video == row.video:
                yield Finding(WARNING, what, listed.path, other.number, "two crops are never the same: extract again")
            else:
                level = ERROR if crossing else WARNING
                yield Finding(level, what, listed.path, other.number, "one is a copy under another name")


def near_duplicates(survey: Survey) -> Iterator[Finding]:
    """A test video that is nearly a training video, snippet by snippet, under another name."""
    width = survey.options.visual_width
    (train, a), (test, b) = (_units(listed, width) for listed in survey.lists)
    if not (train and test):
        return
    lengths = [np.array([row.features.snippets for row in rows]) for rows in (train, test)]
    seen: set[tuple[str, str]] = set()
    # Of one or two snippets nobody can say it.
    for index in np.flatnonzero(lengths[1] > 2):
        same = np.flatnonzero(lengths[0] == lengths[1][index])
        for other in same[a[same] @ b[index] > ALIKE_MEAN]:
            tested, trained = test[index], train[other]
            known = trained.features.digest == tested.features.digest or trained.video == tested.video
            if known or (trained.video, tested.video) in seen or not _same_course(trained, tested):
                continue
            seen.add((trained.video, tested.video))
            what = f"{tested.entry.path.name} is nearly {trained.entry.path.name} ({survey.train.path}"
            what += f", row {trained.number}), snippet by snippet"
            advice = "are they one video under two names? Then remove one"
            yield Finding(WARNING, what, survey.test.path, tested.number, advice)


def _same_course(one: Row, other: Row) -> bool:
    """Whether two videos change alike over time."""
    a, b = (load_features(row.entry.path).astype(np.float32) for row in (one, other))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return float((a * b).sum()) > ALIKE_COURSE * float(np.linalg.norm(a) * np.linalg.norm(b)) > 0


def _units(listed: Listed, width: int) -> tuple[list[Row], np.ndarray]:
    """The rows with features of the right width, and the directions (N, D) of their mean features."""
    rows = [row for row in listed.read if row.features.dim == width]
    means = np.stack([row.features.mean for row in rows]) if rows else np.zeros((0, width), np.float32)
    return rows, means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


def _read(survey: Survey) -> Iterator[tuple[Listed, Row, Features]]:
    for listed in survey.lists:
        for row in listed.rows:
            if row.figures:
                yield listed, row, row.figures


CHECKS = (
    file_unreadable,
    feature_width,
    feature_norms,
    feature_direction,
    feature_dtype,
    blank_snippets,
    crop_lengths,
    same_features,
    near_duplicates,
)
