"""Everything that the checks of data look at, read once: lists, features, truth, packed stores."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clipfusionvad.data.annotations import video_key
from clipfusionvad.data.config import NO_TRUTH
from clipfusionvad.data.features import load_features
from clipfusionvad.data.lists import Entry, add_streams, read_list
from clipfusionvad.data.packed.store import open_store, store_folder
from clipfusionvad.data.truth import Truth, read_truth
from clipfusionvad.datasets import Dataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_csv
from clipfusionvad.models import find_method

COLUMNS = ("path", "label")


@dataclass(frozen=True)
class Features:
    """Figures of one feature file.

    ``norm`` is that of its middling snippet, ``zeros`` the number of all-zero snippets; ``still`` says that several
    snippets are all equal; ``digest`` sums up shape and values; ``mean`` (D,) float32 is over the snippets.
    """

    snippets: int
    dim: int
    dtype: str
    norm: float
    zeros: int
    still: bool
    digest: bytes
    mean: np.ndarray


@dataclass(frozen=True)
class Row:
    """A row of a list: as listed, found, and read (``figures``), or why it could not be (``problem``)."""

    entry: Entry
    listed: str
    figures: Features | None = None
    problem: str = ""

    @property
    def label(self) -> str:
        return self.entry.label

    @property
    def number(self) -> int:
        return self.entry.row

    @property
    def features(self) -> Features:
        """What was read; only of rows that could be."""
        if self.figures is None:
            raise ValueError(f"{self.entry.path} could not be read")
        return self.figures

    @property
    def present(self) -> bool:
        return self.entry.path.is_file()

    @cached_property
    def video(self) -> str:
        """The video's name, whatever the path, crop, suffix or case of letters."""
        return video_key(self.entry.video).casefold()


@dataclass
class Listed:
    """A list with all its rows; ``problem`` says why it could not be read, ``store`` what is packed beside it."""

    role: str
    path: str
    rows: list[Row] = field(default_factory=list)
    problem: str = ""
    store: Path | None = None
    store_problem: str = ""

    @property
    def packed(self) -> bool:
        """Whether the single files are not needed."""
        return self.store is not None and not self.store_problem

    @cached_property
    def videos(self) -> dict[str, list[Row]]:
        grouped = defaultdict(list)
        for row in self.rows:
            grouped[row.video].append(row)
        return dict(grouped)

    @property
    def read(self) -> list[Row]:
        """The rows whose features could be read."""
        return [row for row in self.rows if row.figures is not None]


@dataclass
class Survey:
    """A dataset as the options name it; ``truth`` is in the order of the test list, None where it cannot be had."""

    dataset: Dataset
    options: Namespace
    train: Listed
    test: Listed
    truth: Truth | None = None
    truth_problem: str = ""
    truth_notes: list[str] = field(default_factory=list)

    @property
    def lists(self) -> tuple[Listed, Listed]:
        return self.train, self.test

    @property
    def has_truth(self) -> bool:
        return self.options.gt_path != NO_TRUTH

    @property
    def segments_file(self) -> str:
        """Where the truth's intervals stand."""
        keyed = Path(self.options.gt_path).suffix.lower() != ".npy"
        return str(self.options.gt_path if keyed else self.options.gt_segment_path)


def take_survey(options: Namespace, dataset: Dataset) -> Survey:
    """Read what the options of a training name; whatever cannot be read is noted for the checks to say.

    ``UserError`` for a feature root that is not there.
    """
    if options.feature_root is not None and not Path(options.feature_root).is_dir():
        raise UserError(f"feature root not found: {options.feature_root}")
    train, test = (
        _read(Listed(role, path), options)
        for role, path in (("training", options.train_list), ("test", options.test_list))
    )
    survey = Survey(dataset, options, train, test)
    if survey.has_truth and test.rows and len(test.read) == len(test.rows):
        _read_truth(survey)
    return survey


def _read(listed: Listed, options: Namespace) -> Listed:
    streams = find_method(options.method).streams
    try:
        entries = read_list(listed.path, options.feature_root, may_lack_files=True)
        paths, labels = ([cells[column] for _, cells in read_csv(listed.path, "list", COLUMNS)] for column in COLUMNS)
        if all(label.endswith(".npy") for label in labels):
            raise UserError(f"list {listed.path}: the column label holds paths; swap the names of the two columns")
        if len(streams) > 1:
            entries = add_streams(entries, options.stream_folders, listed.path, may_lack_files=True)
    except UserError as error:
        listed.problem = str(error)
        return listed
    _look_at_store(listed, entries, options)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda entry: _measure(entry, len(streams)), entries)
        # disable=None: no bar where stderr is not a terminal.
        read = list(tqdm(found, f"reading {listed.role} features", len(entries), disable=None, leave=False))
    listed.rows = [
        Row(entry, path, None, item) if isinstance(item, str) else Row(entry, path, item)
        for entry, path, item in zip(entries, paths, read, strict=True)
    ]
    return listed


def _measure(entry: Entry, streams: int) -> Features | str:
    try:
        figures = measure(load_features(entry.path))
        if len(entry.paths) < streams:
            return f"{entry.path.name} has no further stream of features beside it (--stream-folders)"
        for path in entry.further:
            other = load_features(path, figures.dim, may_miss=True)
            if len(other) != figures.snippets:
                return f"{path} has {len(other)} snippets, but {entry.path} has {figures.snippets}"
        return figures
    except UserError as error:
        return str(error)


def measure(features: np.ndarray) -> Features:
    """Figures of a video's features (L, D)."""
    wide = features.astype(np.float32, copy=False)
    norms = np.sqrt(np.einsum("ld,ld->l", wide, wide))
    return Features(
        len(wide),
        wide.shape[1],
        features.dtype.name,
        float(np.median(norms)),
        int((norms == 0).sum()),
        # The first test spares most files the second.
        bool(len(wide) > 1 and norms[0] == norms[-1] and not (wide != wide[0]).any()),
        _digest(features),
        wide.mean(axis=0),
    )


def _digest(features: np.ndarray) -> bytes:
    digest = hashlib.sha256(repr(features.shape).encode())
    digest.update(features.data)
    return digest.digest()


def _look_at_store(listed: Listed, entries: Sequence[Entry], options: Namespace) -> None:
    folder, method = store_folder(listed.path, options.packed_dir), find_method(options.method)
    if not (options.packed and folder.is_dir()):
        return
    listed.store = folder
    try:
        store = open_store(folder)
        sampling = method.sampling_of(vars(options)) if listed.role == "training" else None
        store.check_fit(listed.path, method.streams, options.visual_width, sampling)
        store.check_sources(entries)
        store.check_data()
    except UserError as error:
        listed.store_problem = str(error)


def _read_truth(survey: Survey) -> None:
    options, entries = survey.options, [row.entry for row in survey.test.rows]
    snippets = [row.features.snippets for row in survey.test.read]
    paths = (options.gt_path, options.gt_segment_path, options.gt_label_path)
    try:
        survey.truth = read_truth(
            *paths, entries, snippets, survey.dataset, options.frames_per_snippet, tell=survey.truth_notes.append
        )
    except UserError as error:
        survey.truth_problem = str(error)
