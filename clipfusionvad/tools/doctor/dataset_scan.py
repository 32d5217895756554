"""All data of a dataset that is checked, read once: lists, features, truth, packed stores."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from clipfusionvad.data.annotations import video_key
from clipfusionvad.data.config import NO_TRUTH, DataConfig
from clipfusionvad.data.features import load_features
from clipfusionvad.data.lists import Entry, add_streams, read_list
from clipfusionvad.data.packed import open_store, store_folder
from clipfusionvad.data.truth import Truth, read_truth
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.config import Settings
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_csv
from clipfusionvad.models import find_method
from clipfusionvad.models.config import ModelConfig
from clipfusionvad.tools.doctor.findings import Finding

COLUMNS = ("path", "label")


@dataclass(frozen=True)
class Features:
    """Statistics of one feature file.

    ``norm`` is the median over snippets, ``zeros`` the number of all-zero snippets; ``still`` says that all of several
    snippets are equal; ``digest`` is a hash of shape and values; ``mean`` (D,) float32 is over the snippets.
    """

    snippets: int
    dim: int
    dtype: str
    norm: float
    zeros: int
    still: bool
    digest: bytes
    mean: np.ndarray


@dataclass
class ScannedList:
    """A list with all its rows; ``problem`` says why it could not be read, ``store_problem`` why its packed store could
    not; ``packed``: there is a good one, so the single files are not needed."""

    role: str
    path: str
    rows: list[ScannedRow] = field(default_factory=list)
    problem: str = ""
    packed: bool = False
    store_problem: str = ""

    @cached_property
    def videos(self) -> dict[str, list[ScannedRow]]:
        grouped = defaultdict(list)
        for row in self.rows:
            grouped[row.video].append(row)
        return dict(grouped)

    @property
    def read(self) -> list[ScannedRow]:
        """The rows whose features could be read."""
        return [row for row in self.rows if row.features]

    def finding(self, level: str, what: str, advice: str = "") -> Finding:
        return Finding(level, what, self.path, advice=advice)


@dataclass(frozen=True)
class ScannedRow:
    """A row of a list: as listed, found, and read (``features``, a ``Features``), or why that failed (``problem``)."""

    list: ScannedList
    entry: Entry
    listed: str
    features: Any = None
    problem: str = ""

    @property
    def label(self) -> str:
        return self.entry.label

    @property
    def file(self) -> str:
        return self.entry.path.name

    @cached_property
    def video(self) -> str:
        """The video's name without path, crop and suffix, in lower case."""
        return video_key(self.entry.video).casefold()

    def finding(self, level: str, what: str, advice: str = "") -> Finding:
        return Finding(level, what, self.list.path, self.entry.row, advice)


@dataclass
class DatasetScan:
    """A dataset as the options name it; ``truth`` is in the order of the test list, None if it cannot be read."""

    settings: Settings
    train: ScannedList
    test: ScannedList
    truth: Truth | None = None
    truth_problem: str = ""
    truth_notes: list[str] = field(default_factory=list)

    @property
    def dataset(self) -> Dataset:
        return self.settings.dataset

    @property
    def config(self) -> DataConfig:
        return self.settings.data

    @property
    def lists(self) -> tuple[ScannedList, ScannedList]:
        return self.train, self.test

    @property
    def rows(self) -> list[ScannedRow]:
        return self.train.rows + self.test.rows

    @property
    def read(self) -> list[ScannedRow]:
        return self.train.read + self.test.read

    @property
    def has_truth(self) -> bool:
        return self.config.gt_path != NO_TRUTH

    @property
    def segments_file(self) -> str:
        """The file that holds the segments: an array, or the keyed truth."""
        is_array = Path(self.config.gt_path).suffix.lower() == ".npy"
        return self.config.gt_segment_path if is_array else self.config.gt_path


def scan_dataset(settings: Settings) -> DatasetScan:
    """Read lists, features and truth; what cannot be read is noted.

    Raises ``UserError`` for a feature root that does not exist.
    """
    config = settings.data
    if config.feature_root is not None and not Path(config.feature_root).is_dir():
        raise UserError(f"feature root not found: {config.feature_root}")
    train, test = ScannedList("training", config.train_list), ScannedList("test", config.test_list)
    for listed in (train, test):
        _read(listed, config, settings.model)
    scan = DatasetScan(settings, train, test)
    if scan.has_truth and test.rows and len(test.read) == len(test.rows):
        entries = [row.entry for row in test.rows]
        snippets = [row.features.snippets for row in test.read]
        paths = config.gt_path, config.gt_segment_path, config.gt_label_path
        notes = scan.truth_notes.append
        try:
            scan.truth = read_truth(*paths, entries, snippets, settings.dataset, config.frames_per_snippet, notes)
        except UserError as error:
            scan.truth_problem = str(error)
    return scan


def _read(listed: ScannedList, config: DataConfig, model: ModelConfig) -> None:
    streams = find_method(model.method).streams
    try:
        entries = read_list(listed.path, config.feature_root, may_lack_files=True)
        paths, labels = ([cells[column] for _, cells in read_csv(listed.path, "list", COLUMNS)] for column in COLUMNS)
        if all(label.endswith(".npy") for label in labels):
            raise UserError(f"list {listed.path}: the column label holds paths; swap the names of the two columns")
        if len(streams) > 1:
            entries = add_streams(entries, config.stream_folders or streams, listed.path, may_lack_files=True)
    except UserError as error:
        listed.problem = str(error)
        return
    folder = store_folder(listed.path, config.packed_dir)
    if config.packed and folder.is_dir():
        try:
            store = open_store(folder)
            sampling = find_method(model.method).sampling_of(model.options) if listed.role == "training" else None
            store.check_fit(listed.path, streams, model.visual_width, sampling)
            store.check_sources(entries)
            store.check_data()
            listed.packed = True
        except UserError as error:
            listed.store_problem = str(error)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda entry: _measure(entry, len(streams)), entries)
        # disable=None: no bar where stderr is not a terminal.
        read = list(tqdm(found, f"reading {listed.role} features", len(entries), disable=None, leave=False))
    for entry, path, item in zip(entries, paths, read, strict=True):
        result = {"problem": item} if isinstance(item, str) else {"features": item}
        listed.rows.append(ScannedRow(listed, entry, path, **result))


def _measure(entry: Entry, streams: int) -> Features | str:
    try:
        statistics = measure(load_features(entry.path))
        if len(entry.paths) < streams:
            return f"{entry.path.name} has no further stream of features beside it (--stream-folders)"
        for path in entry.further:
            other = load_features(path, statistics.dim, may_miss=True)
            if len(other) != statistics.snippets:
                return f"{path} has {len(other)} snippets, but {entry.path} has {statistics.snippets}"
        return statistics
    except UserError as error:
        return str(error)


def measure(features: np.ndarray) -> Features:
    """Return statistics of a video's features (L, D)."""
    wide = features.astype(np.float32, copy=False)
    norms = np.sqrt(np.einsum("ld,ld->l", wide, wide))
    digest = hashlib.sha256(repr(features.shape).encode())
    digest.update(features.data)
    return Features(
        snippets=len(wide),
        dim=wide.shape[1],
        dtype=features.dtype.name,
        norm=float(np.median(norms)),
        zeros=int((norms == 0).sum()),
        # The first test saves the second for most files.
        still=bool(len(wide) > 1 and norms[0] == norms[-1] and not (wide != wide[0]).any()),
        digest=digest.digest(),
        mean=wide.mean(axis=0),
    )
