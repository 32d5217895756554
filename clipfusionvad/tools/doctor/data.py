"""Checks of the training list and the test list, of their features, and of the model file that belongs to them."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from clipfusionvad.data.features import NORM_RANGE, check_dim, load_features
from clipfusionvad.engine.checkpoint import check_method, read_model_file
from clipfusionvad.io.errors import UserError
from clipfusionvad.tools.doctor import ERROR, NOTE, WARNING, Finding
from clipfusionvad.tools.doctor.scan import DatasetScan, ScannedList, ScannedRow

# The median norms of the lists of one extraction differ by a few per cent.
LISTS_NORM_RANGE = 1.5
# CLIP's features share a direction: the videos of real lists have a median cosine of 0.88 with their centre, the
# lowest 0.6; the centres of two lists, one of CCTV and one of UCF-Crime, 0.73. Features of another model of the same
# width have a cosine near 0. Without a shared direction, nothing is reported.
COHERENT, FOREIGN, FOREIGN_LIST = 0.7, 0.3, 0.5
# Two videos of the same length: the cosine of their mean features above which they are compared snippet by snippet,
# and the correlation over time above which they are one video. Two recordings of one camera only reach the first.
ALIKE_MEAN, ALIKE_COURSE = 0.999, 0.9


def list_unreadable(scan: DatasetScan) -> Iterator[Finding]:
    """A list is missing, is not a CSV file with the columns path and label, has them swapped, or has an empty cell."""
    for listed in scan.lists:
        if listed.problem:
            yield Finding(ERROR, listed.problem)


def file_missing(scan: DatasetScan) -> Iterator[Finding]:
    """A listed feature file does not exist."""
    for row in scan.rows:
        if not row.entry.path.is_file() and not row.list.packed:
            foreign = "; the path is one of another machine" if _is_foreign(row.listed) else ""
            advice = "name the folder that holds it with --feature-root"
            yield row.finding(ERROR, f"{row.listed} not found{foreign}", advice)


def foreign_paths(scan: DatasetScan) -> Iterator[Finding]:
    """Files were found by their names only, because the paths are those of another machine."""
    for listed in scan.lists:
        moved = [row for row in listed.rows if row.entry.path.is_file() and _is_foreign(row.listed)]
        if moved:
            what = f"{len(moved)} paths are of another machine ({moved[0].listed} is {moved[0].entry.path} here)"
            yield moved[0].finding(NOTE, what, "check that these are the intended files")


def unknown_label(scan: DatasetScan) -> Iterator[Finding]:
    """A label is not one of the dataset's."""
    labels = scan.dataset.labels
    for row in scan.rows:
        if not _is_label(scan, row.label):
            what = f"unknown label {row.label!r}{scan.dataset.label_hint(row.label)} of {row.entry.video}"
            yield row.finding(ERROR, what, f"known: {', '.join(labels)}")
        elif scan.dataset.multi_label and (odd := set(row.label.split("-")) - {*labels, "0"}):
            what = f"the part {min(odd)!r} of the label {row.label!r} of {row.entry.video} is not a class"
            yield row.finding(WARNING, what, "it is ignored; correct the label")


def label_against_name(scan: DatasetScan) -> Iterator[Finding]:
    """The video's name, or else its folder, names another class than its label."""
    dataset = scan.dataset
    for row in scan.rows:
        name = dataset.label_of(row.entry.video)
        named = name or dataset.label_of("", row.entry.path.parent.name)
        if named and _is_label(scan, row.label) and set(dataset.codes(named)) != set(dataset.codes(row.label)):
            what = f"{row.entry.video} is labelled {row.label}, but its {'name' if name else 'folder'} says {named}"
            yield row.finding(ERROR if name else WARNING, what, "correct the label, or rename the file")


def lists_swapped(scan: DatasetScan) -> Iterator[Finding]:
    """Training list and test list are swapped, or are the same list."""
    train, test = scan.lists
    if train.rows and train.videos.keys() == test.videos.keys():
        yield test.finding(ERROR, f"it holds the same videos as {train.path}", "give the test list")
    elif train.rows and len(test.rows) > 1.5 * len(test.videos) and len(train.rows) == len(train.videos):
        what = f"it has several crops of a video, and {train.path} one of each"
        yield test.finding(ERROR, what, "swap --train-list and --test-list")


def train_test_overlap(scan: DatasetScan) -> Iterator[Finding]:
    """A test video is in the training list too, under any path, crop or case of letters."""
    for name, (tested, *_) in scan.test.videos.items():
        if name in scan.train.videos:
            trained = scan.train.videos[name][0]
            what = f"{trained.entry.video} is trained on and tested on ({scan.test.path}, row {tested.entry.row})"
            yield trained.finding(ERROR, what, "remove its rows from one of the lists: results are too good otherwise")


def misplaced_videos(scan: DatasetScan) -> Iterator[Finding]:
    """A known mistake of released lists: a video is on the other side of the official split."""
    for listed in scan.lists:
        for name, side in scan.dataset.misplaced.items():
            rows = listed.videos.get(name.casefold())
            if rows and not listed.role.startswith(side):
                right = "training" if side == "train" else side
                what = f"{name} is here as in the released lists, but a {right} video by the official split"
                yield rows[0].finding(NOTE, what, "'lists --protocol clean' puts it right")
    if scan.dataset.multi_label and scan.test.rows:
        trained, tested = (
            sum(len(scan.dataset.codes(rows[0].label)) > 1 for rows in listed.videos.values()) for listed in scan.lists
        )
        if trained and not tested:
            what = f"no test video has several labels, but {trained} training videos have"
            advice = "in some released lists the official test videos of this kind are trained on: see docs/datasets.md"
            yield scan.test.finding(NOTE, what, advice)


def duplicate_rows(scan: DatasetScan) -> Iterator[Finding]:
    """A crop of a video is in a list twice."""
    for listed in scan.lists:
        first: dict[tuple[str, int | None], ScannedRow] = {}
        for row in listed.rows:
            other = first.setdefault((row.video, row.entry.crop), row)
            if other is not row:
                crop = "" if row.entry.crop is None else f"crop {row.entry.crop} of "
                path = "" if row.entry.path == other.entry.path else f", as {other.entry.path}"
                what = f"{crop}{row.entry.video} is in row {other.entry.row} already{path}"
                yield row.finding(WARNING if listed is scan.train else ERROR, what, "remove one: it counts twice")


def training_crops(scan: DatasetScan) -> Iterator[Finding]:
    """A training video has other crops than most have."""
    crops = {name: frozenset(row.entry.crop for row in rows) for name, rows in scan.train.videos.items()}
    usual, count = Counter(crops.values()).most_common(1)[0] if crops else (frozenset(), 0)
    if count <= len(crops) / 2 and crops:
        yield scan.train.finding(WARNING, "the videos have different sets of crops", "list the same crops of each")
        return
    for name, there in crops.items():
        if there != usual:
            row = scan.train.videos[name][0]
            parts = {"lacks": usual - there, "also has": there - usual}
            what = " and ".join(f"{word} {_numbers(part)}" for word, part in parts.items() if part)
            advice = "list the same of each: it counts more or less than others"
            yield row.finding(WARNING, f"{row.entry.video} {what}", advice)


def crop_labels(scan: DatasetScan) -> Iterator[Finding]:
    """Crops of one video have different labels."""
    for rows in (rows for listed in scan.lists for rows in listed.videos.values()):
        usual = Counter(row.label for row in rows).most_common(1)[0][0]
        for row in rows:
            if row.label != usual:
                what = f"{row.file} is labelled {row.label}, other crops of the video {usual}"
                yield row.finding(ERROR, what, "correct the label")


def test_crops(scan: DatasetScan) -> Iterator[Finding]:
    """The test list has several rows of a video, different crops, or another crop than was published."""
    test, published = scan.test, scan.dataset.test_crop
    for first, *others in test.videos.values():
        if others and len({row.entry.crop for row in (first, *others)}) > 1:
            what = f"{others[0].entry.video} is in row {first.entry.row} already, with another crop"
            yield others[0].finding(ERROR, what, "list one crop of each: every row is scored")
    for usual, count in Counter(row.entry.crop for row in test.rows).most_common(1):
        for row, *_ in test.videos.values():
            if row.entry.crop != usual:
                what = f"{row.file} is crop {row.entry.crop}, most are crop {usual}"
                yield row.finding(WARNING, what, "list the same crop of each")
        if usual not in (None, published) and count > len(test.rows) / 2:
            yield test.finding(NOTE, f"crop {usual} is tested; published results are of crop {published}")


def one_kind_only(scan: DatasetScan) -> Iterator[Finding]:
    """A list has no normal videos, or no anomalous ones."""
    for listed in scan.lists:
        normal = {scan.dataset.is_normal(row.label) for row in listed.rows if _is_label(scan, row.label)}
        if len(normal) == 1:
            kind = "anomalous" if normal == {True} else "normal"
            effect = "training cannot tell them apart" if listed is scan.train else "AUC and AP mean nothing"
            yield listed.finding(ERROR, f"it has no {kind} video: {effect}", "use the complete list")


def classes_absent(scan: DatasetScan) -> Iterator[Finding]:
    """A class has no training video, or no test video."""
    for listed in scan.lists:
        there = {code for row in listed.rows for code in scan.dataset.codes(row.label)}
        absent = [label for label in scan.dataset.labels if label not in there]
        if there and absent:
            yield listed.finding(NOTE, f"no {listed.role} video of {', '.join(absent)}")


def stale_store(scan: DatasetScan) -> Iterator[Finding]:
    """Packed features are damaged, or do not match the list and its files."""
    for listed in scan.lists:
        if listed.store_problem:
            yield Finding(ERROR, listed.store_problem)


def model_file(scan: DatasetScan) -> Iterator[Finding]:
    """The model file is damaged, or of another method, dataset or set of classes."""
    path, dataset = scan.settings.run.model_path, scan.dataset
    if not Path(path).is_file():
        return
    file = read_model_file(path)
    check_method(file, scan.settings.model.method)
    if not file.hparams:
        return
    if file.hparams["dataset"] != dataset.name:
        what = f"it was trained on {file.hparams['dataset']}, not on {dataset.name}"
        yield Finding(ERROR, what, "give the model of this dataset with --model-path", path)
    elif list(file.hparams.get("classes", dataset.classes)) != dataset.labels:
        yield Finding(ERROR, "its classes are not those of the dataset", "train again", path)
    trained, used = file.hparams.get("frames_per_snippet"), scan.config.frames_per_snippet
    if trained and trained != used:
        what = f"it was trained with --frames-per-snippet {trained}, now it is {used}"
        yield Finding(WARNING, what, "a test uses the value in the file", path)
    if "parts" in file.hparams and scan.config.segments != "equal":
        yield Finding(WARNING, "it was trained with --segments equal", "a test uses the value in the file", path)


def normal_centroid_file(scan: DatasetScan) -> Iterator[Finding]:
    """The file of --normal-centroid does not exist."""
    path = scan.settings.run.normal_centroid
    if path and not Path(path).is_file():
        yield Finding(ERROR, f"normal centroid file not found: {path}", "give the calibration.pt of a run")


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


def _is_label(scan: DatasetScan, label: str) -> bool:
    try:
        scan.dataset.encode(label)
    except UserError:
        return False
    # With two classes every label but the first is encoded as the second.
    return len(scan.dataset.labels) > 2 or label in scan.dataset.labels


def _is_foreign(listed: str) -> bool:
    """Whether a path is one of a Windows machine, or absolute and does not exist here."""
    windows = "\\" in listed or re.match(r"[A-Za-z]:", listed) is not None
    return windows or (PurePosixPath(listed).is_absolute() and not Path(listed).is_file())


def _numbers(crops: frozenset[int | None]) -> str:
    return ", ".join("the file without a crop" if crop is None else f"crop {crop}" for crop in sorted(crops, key=str))
