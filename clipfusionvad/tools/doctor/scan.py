"""All data of a dataset that is checked, read once: lists, features, truth, packed stores."""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from clipfusionvad.data.annotations import Annotation, read_annotations, video_key
from clipfusionvad.data.config import NO_TRUTH
from clipfusionvad.data.features import load_video
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.packed import open_store, store_folder
from clipfusionvad.data.truth import Truth, is_keyed, read_truth
from clipfusionvad.engine.config import Settings
from clipfusionvad.engine.setup import read_entries
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_csv
from clipfusionvad.io.hub import local_path
from clipfusionvad.models import find_method
from clipfusionvad.tools.doctor import Finding
from clipfusionvad.tools.features.centroid import read_centroid
from clipfusionvad.tools.features.order import row_order


class Features:
    """Statistics of a video's features (L, D).

    ``norm`` is the median over snippets, ``zeros`` the number of all-zero snippets; ``still`` says that all of several
    snippets are equal; ``digest`` is a hash of shape and values; ``mean`` (D,) float32 is over the snippets; ``order``
    says how rows follow one another.
    """

    def __init__(self, features: np.ndarray) -> None:
        self.snippets, self.dim = features.shape
        self.dtype = features.dtype.name
        wide = features.astype(np.float32, copy=False)
        norms = np.sqrt(np.einsum("ld,ld->l", wide, wide))
        self.norm, self.zeros = float(np.median(norms)), int((norms == 0).sum())
        # The first test saves the second for most files.
        self.still = bool(len(wide) > 1 and norms[0] == norms[-1] and not (wide != wide[0]).any())
        digest = hashlib.sha256(repr(features.shape).encode())
        digest.update(np.ascontiguousarray(features).data)
        self.digest = digest.digest()
        self.mean, self.order = wide.mean(axis=0), row_order(wide)


@dataclass(frozen=True)
class ScannedRow:
    """A row of a list: as listed, found, and read (``features``), or why that failed (``problem``)."""

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
        return Finding(level, what, advice, self.list.path, self.entry.row)


class ScannedList:
    """A list with all its ``rows``, those that could be ``read``, and the rows of each of its ``videos``.

    ``problem`` says why it could not be read, ``store_problem`` why its store could not; ``packed``: that is good.
    """

    def __init__(self, role: str, path: str, settings: Settings) -> None:
        self.role, self.path, self.packed, self.problem, self.store_problem = role, path, False, "", ""
        self.rows: list[ScannedRow] = []
        self.read: list[ScannedRow] = []
        self.videos: dict[str, list[ScannedRow]] = defaultdict(list)
        config, model = settings.data, settings.model
        method = find_method(model.method)
        try:
            entries = read_entries(path, None, model, config, may_lack_files=True)
            if all(entry.label.endswith(".npy") for entry in entries):
                raise UserError(f"list {path}: the column label holds paths; swap the names of the two columns")
        except UserError as error:
            self.problem = str(error)
            return
        folder = store_folder(path, config.packed_dir)
        if config.packed and folder.is_dir():
            try:
                store = open_store(folder)
                sampling = method.sampling_of(model.options) if role == "training" else None
                store.check_fit(path, method.streams, model.feature_width, sampling)
                store.check_sources(entries)
                store.check_data()
                self.packed = True
            except UserError as error:
                self.store_problem = str(error)

        def measure(entry: Entry) -> Features | str:
            try:
                features = load_video(entry.paths)
            except UserError as error:
                return str(error)
            if len(entry.paths) < len(method.streams):
                return f"{entry.path.name} has no further stream of features beside it (--stream-folders)"
            return Features(features[:, : features.shape[1] // len(entry.paths)])

        with ThreadPoolExecutor() as pool:
            # disable=None: no bar where stderr is not a terminal.
            found = pool.map(measure, entries)
            measured = list(tqdm(found, f"reading {role} features", len(entries), disable=None, leave=False))
        cells = [cells["path"] for _, cells in read_csv(path, "list", ("path",))]
        for entry, listed, item in zip(entries, cells, measured, strict=True):
            result = {"problem": item} if isinstance(item, str) else {"features": item}
            row = ScannedRow(self, entry, listed, **result)
            self.rows.append(row)
            self.videos[row.video].append(row)
        self.read = [row for row in self.rows if row.features]

    def finding(self, level: str, what: str, advice: str = "") -> Finding:
        return Finding(level, what, advice, self.path)


class DatasetScan:
    """A dataset as the options name it, read; what cannot be read is noted.

    ``truth`` is in the order of the test list, None if it cannot be read; ``annotated`` is keyed truth by lower-case
    name; ``reference`` is the path and mean of other features to compare with. Raises ``UserError`` for a feature root
    that does not exist, and a reference that cannot be read.
    """

    def __init__(self, settings: Settings, reference: Path | None = None) -> None:
        self.settings, self.dataset, self.config = settings, settings.dataset, settings.data
        self.reference = (reference, read_centroid(reference)) if reference else None
        config = settings.data
        if config.feature_root is not None and not local_path(config.feature_root).is_dir():
            raise UserError(f"feature root not found: {config.feature_root}")
        self.train = ScannedList("training", config.train_list, settings)
        self.test = ScannedList("test", config.test_list, settings)
        self.lists = self.train, self.test
        self.rows, self.read = self.train.rows + self.test.rows, self.train.read + self.test.read
        self.has_truth = config.gt_path != NO_TRUTH
        #: Whether the features of all test videos could be read.
        self.test_is_whole = 0 < len(self.test.rows) == len(self.test.read)
        # The file that holds the segments: an array, or the keyed truth.
        self.segments_file = config.gt_segment_path if config.gt_path.lower().endswith(".npy") else config.gt_path
        self.annotated: dict[str, Annotation] = {}
        if is_keyed(config.gt_path):
            with contextlib.suppress(UserError):
                names = {row.entry.video for row in self.test.rows}
                found = read_annotations(config.gt_path, self.dataset, names)
                self.annotated = {name.casefold(): item for name, item in found.items()}
        self.truth: Truth | None = None
        self.truth_problem, self.truth_notes = "", list[str]()
        if self.has_truth and self.test_is_whole:
            entries = [row.entry for row in self.test.rows]
            snippets = [row.features.snippets for row in self.test.rows]
            paths = config.gt_path, config.gt_segment_path, config.gt_label_path
            try:
                note = self.truth_notes.append
                self.truth = read_truth(*paths, entries, snippets, self.dataset, config.stride, note)
            except UserError as error:
                self.truth_problem = str(error)
