"""Checks of the training list and the test list: what is in them, what is not, and what is there twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from clipfusionvad.io.errors import UserError, nearest
from clipfusionvad.tools.doctor.findings import ERROR, NOTE, WARNING, Finding
from clipfusionvad.tools.doctor.survey import Listed, Row, Survey


def _finding(level: str, listed: Listed, row: Row, what: str, advice: str = "") -> Finding:
    return Finding(level, what, listed.path, row.number, advice)


def list_unreadable(survey: Survey) -> Iterator[Finding]:
    """A list is missing, is no CSV file with the columns path and label, has them swapped, or has an empty cell."""
    for listed in survey.lists:
        if listed.problem:
            yield Finding(ERROR, listed.problem)


def file_missing(survey: Survey) -> Iterator[Finding]:
    """A listed feature file is not there."""
    for listed in survey.lists:
        for row in listed.rows:
            if not row.present and not listed.packed:
                where = "name the folder that holds it with --feature-root"
                foreign = _is_foreign(row.listed) and "; the path is one of another machine"
                yield _finding(ERROR, listed, row, f"{row.listed} not found{foreign or ''}", where)


def foreign_paths(survey: Survey) -> Iterator[Finding]:
    """Files were found by their names only, as the paths are those of another machine."""
    for listed in survey.lists:
        moved = [row for row in listed.rows if row.present and _is_foreign(row.listed)]
        if moved:
            what = f"{len(moved)} paths are of another machine ({moved[0].listed} is {moved[0].entry.path} here)"
            yield _finding(NOTE, listed, moved[0], what, "look whether these are the files that were meant")


def unknown_label(survey: Survey) -> Iterator[Finding]:
    """A label that is none of the dataset's."""
    dataset = survey.dataset
    for listed in survey.lists:
        for row in listed.rows:
            if not _is_label(survey, row.label):
                hint = nearest(row.label, dataset.labels)
                what = f"unknown label {row.label!r}{hint} of {row.entry.video}"
                yield _finding(ERROR, listed, row, what, f"known: {', '.join(dataset.labels)}")
            elif dataset.multi_label and (odd := set(row.label.split("-")) - {*dataset.labels, "0"}):
                what = f"the part {min(odd)!r} of the label {row.label!r} of {row.entry.video} is no class"
                yield _finding(WARNING, listed, row, what, "it is ignored; correct the label")


def label_against_name(survey: Survey) -> Iterator[Finding]:
    """The video's name, or else its folder, tells another class than its label."""
    dataset = survey.dataset
    for listed in survey.lists:
        for row in listed.rows:
            name = dataset.label_of(row.entry.video)
            told = name or dataset.label_of("", row.entry.path.parent.name)
            if told and _is_label(survey, row.label) and set(dataset.codes(told)) != set(dataset.codes(row.label)):
                by, level = ("name", ERROR) if name else ("folder", WARNING)
                what = f"{row.entry.video} is labelled {row.label}, but its {by} says {told}"
                yield _finding(level, listed, row, what, "correct the label, or rename the file")


def train_test_overlap(survey: Survey) -> Iterator[Finding]:
    """A test video is in the training list too, under whatever path, crop or case of letters."""
    for name, rows in survey.test.videos.items():
        if name in survey.train.videos:
            trained = survey.train.videos[name][0]
            what = f"{trained.entry.video} is trained on and tested on ({survey.test.path}, row {rows[0].number})"
            advice = "remove its rows from one of the lists: results look better than they are"
            yield _finding(ERROR, survey.train, trained, what, advice)


def lists_swapped(survey: Survey) -> Iterator[Finding]:
    """Training list and test list are in each other's place, or the same."""
    train, test = survey.train, survey.test
    if not (train.rows and test.rows):
        return
    if train.videos.keys() == test.videos.keys():
        yield Finding(ERROR, f"it holds the same videos as {train.path}", test.path, advice="give the test list")
    elif len(test.rows) > 1.5 * len(test.videos) and len(train.rows) == len(train.videos):
        what = f"it has several crops of a video, and {train.path} one of each"
        yield Finding(ERROR, what, test.path, advice="--train-list and --test-list are the wrong way round")


def misplaced_videos(survey: Survey) -> Iterator[Finding]:
    """A known mistake of released lists: a video that the official split has on the other side."""
    for listed in survey.lists:
        for name, side in survey.dataset.misplaced.items():
            rows = listed.videos.get(name.casefold())
            if rows and not listed.role.startswith(side):
                right = "training" if side == "train" else side
                what = f"{name} is here as in the released lists, but a {right} video by the official split"
                yield _finding(NOTE, listed, rows[0], what, "'lists --protocol clean' puts it right")
    if survey.dataset.multi_label and survey.test.rows:
        several = [
            sum(len(survey.dataset.codes(rows[0].label)) > 1 for rows in x.videos.values()) for x in survey.lists
        ]
        if several[0] and not several[1]:
            what = f"no test video has several labels, but {several[0]} training videos have"
            advice = "in some released lists the official test videos of this kind are trained on: see docs/datasets.md"
            yield Finding(NOTE, what, survey.test.path, advice=advice)


def duplicate_rows(survey: Survey) -> Iterator[Finding]:
    """A crop of a video stands in a list twice."""
    for listed in survey.lists:
        first: dict[tuple[str, int | None], Row] = {}
        for row in listed.rows:
            other = first.setdefault((row.video, row.entry.crop), row)
            if other is not row:
                crop = "" if row.entry.crop is None else f"crop {row.entry.crop} of "
                what = f"{crop}{row.entry.video} is in row {other.number} already"
                if row.entry.path != other.entry.path:
                    what += f", as {other.entry.path}"
                level = WARNING if listed is survey.train else ERROR
                yield _finding(level, listed, row, what, "remove one: it counts twice")


def training_crops(survey: Survey) -> Iterator[Finding]:
    """A training video has other crops than most have."""
    crops = {name: frozenset(row.entry.crop for row in rows) for name, rows in survey.train.videos.items()}
    if not crops:
        return
    usual, count = Counter(crops.values()).most_common(1)[0]
    if count <= len(crops) / 2:
        yield Finding(WARNING, "the videos have all kinds of crops", survey.train.path, advice="list the same of each")
        return
    for name, there in crops.items():
        if there != usual:
            row = survey.train.videos[name][0]
            parts = {"lacks": usual - there, "also has": there - usual}
            what = " and ".join(f"{word} {_numbers(part)}" for word, part in parts.items() if part)
            yield _finding(
                WARNING,
                survey.train,
                row,
                f"{row.entry.video} {what}",
                "list the same of each: it counts more or less than others",
            )


def crop_labels(survey: Survey) -> Iterator[Finding]:
    """Crops of one video have different labels."""
    for listed in survey.lists:
        for rows in listed.videos.values():
            usual = Counter(row.label for row in rows).most_common(1)[0][0]
            for row in rows:
                if row.label != usual:
                    what = f"{row.entry.path.name} is labelled {row.label}, other crops of the video {usual}"
                    yield _finding(ERROR, listed, row, what, "correct the label")


def test_crops(survey: Survey) -> Iterator[Finding]:
    """The test list has several rows of a video, or not the same crop of each, or another one than was published."""
    test = survey.test
    if not test.rows:
        return
    for rows in test.videos.values():
        if len({row.entry.crop for row in rows}) > 1:
            what = f"{rows[1].entry.video} is in row {rows[0].number} already, with another crop"
            yield _finding(ERROR, test, rows[1], what, "list one crop of each: it is judged once for every row")
    usual, count = Counter(row.entry.crop for row in test.rows).most_common(1)[0]
    for rows in test.videos.values():
        if rows[0].entry.crop != usual:
            what = f"{rows[0].entry.path.name} is crop {rows[0].entry.crop}, most are crop {usual}"
            yield _finding(WARNING, test, rows[0], what, "list the same crop of each")
    if usual is not None and usual != survey.dataset.test_crop and count > len(test.rows) / 2:
        what = f"crop {usual} is tested; published results are of crop {survey.dataset.test_crop}"
        yield Finding(NOTE, what, test.path)


def one_kind_only(survey: Survey) -> Iterator[Finding]:
    """A list without normal videos, or without anomalous ones."""
    for listed in survey.lists:
        known = [row for row in listed.rows if _is_label(survey, row.label)]
        normal = sum(survey.dataset.is_normal(row.label) for row in known)
        for kind, count in (("normal", normal), ("anomalous", len(known) - normal)):
            if known and not count:
                effect = "nothing tells the two apart" if listed is survey.train else "AUC and AP say nothing"
                yield Finding(ERROR, f"it has no {kind} video: {effect}", listed.path, advice="use the complete list")


def classes_absent(survey: Survey) -> Iterator[Finding]:
    """Classes without a training video, or without a test video."""
    for listed in survey.lists:
        there = {code for row in listed.rows for code in survey.dataset.codes(row.label)}
        absent = [label for label in survey.dataset.labels if label not in there]
        if listed.rows and absent and len(absent) < len(survey.dataset.labels):
            yield Finding(NOTE, f"no {listed.role} video of {', '.join(absent)}", listed.path)


def stale_store(survey: Survey) -> Iterator[Finding]:
    """Packed features that are damaged, or not those of the list and its files as they are now."""
    for listed in survey.lists:
        if listed.store_problem:
            yield Finding(ERROR, listed.store_problem)


def _is_label(survey: Survey, label: str) -> bool:
    try:
        survey.dataset.encode(label)
    except UserError:
        return False
    # With two classes everything that is not the first one is the second.
    return len(survey.dataset.labels) > 2 or label in survey.dataset.labels


def _is_foreign(listed: str) -> bool:
    """Whether a path is one of a Windows machine, or absolute and leads nowhere here."""
    if "\\" in listed or re.match(r"[A-Za-z]:", listed):
        return True
    return PurePosixPath(listed).is_absolute() and not Path(listed).is_file()


def _numbers(crops: frozenset[int | None]) -> str:
    return ", ".join("the file without a crop" if crop is None else f"crop {crop}" for crop in sorted(crops, key=str))


CHECKS = (
    list_unreadable,
    file_missing,
    foreign_paths,
    unknown_label,
    label_against_name,
    lists_swapped,
    train_test_overlap,
    misplaced_videos,
    duplicate_rows,
    training_crops,
    crop_labels,
    test_crops,
    one_kind_only,
    classes_absent,
    stale_store,
)
