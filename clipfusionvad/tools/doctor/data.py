"""Checks of the training list and the test list, and of the model file that belongs to them."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from clipfusionvad.engine.checkpoint import check_method, read_model_file
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.hub import local_path
from clipfusionvad.tools.doctor import ERROR, NOTE, WARNING, Finding
from clipfusionvad.tools.doctor.scan import DatasetScan, ScannedRow


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
        what = f"it has several crops of each video, but {train.path} has one"
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
                yield rows[0].finding(NOTE, what, "'lists --protocol clean' corrects it")
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
                what = f"{crop}{row.entry.video} is also in row {other.entry.row}{path}"
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
            advice = "list the same crops of each video, so that each counts alike"
            yield row.finding(WARNING, f"{row.entry.video} {what}", advice)


def crop_labels(scan: DatasetScan) -> Iterator[Finding]:
    """Crops of one video have different labels."""
    for rows in (rows for listed in scan.lists for rows in listed.videos.values()):
        usual = Counter(row.label for row in rows).most_common(1)[0][0]
        for row in rows:
            if row.label != usual:
                what = f"{row.file} is labelled {row.label}, but other crops of the video {usual}"
                yield row.finding(ERROR, what, "correct the label")


def test_crops(scan: DatasetScan) -> Iterator[Finding]:
    """The test list has several rows of a video, different crops, or another crop than was published."""
    test, published = scan.test, scan.dataset.test_crop
    for first, *others in test.videos.values():
        if others and len({row.entry.crop for row in (first, *others)}) > 1:
            what = f"{others[0].entry.video} is also in row {first.entry.row}, with another crop"
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
            effect = f"{'training' if listed is scan.train else 'the test'} needs both kinds"
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
    if path and not local_path(path).is_file():
        yield Finding(ERROR, f"normal centroid file not found: {path}", "give the calibration.pt of a run")


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
