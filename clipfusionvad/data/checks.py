"""Checks of features and lists before a run, so that a bad file does not end it after hours."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clipfusionvad.data.features import load_video, read_video_shape
from clipfusionvad.data.lists import Entry
from clipfusionvad.io.errors import UserError, warn

# Files of one extraction have norms within a factor of two; a normalised file among others is ten times off.
NORM_RANGE = 5


def check_features(
    entries: Sequence[Entry],
    dim: int | None,
    list_name: str,
    read: bool = True,
    note: Callable[[Path], None] | None = None,
) -> list[int]:
    """Verify every feature file of a list and return its number of snippets, entry by entry.

    Checks shape, dtype, dim and completeness, and with ``read`` that all values are finite. Raises one
    ``UserError`` that names the list, the row and the file of the first bad entry and counts the others.
    With ``read`` also warns where some files have far larger features than others. ``note`` is called with every file,
    by several threads, after it has been read.
    """

    def check(entry: Entry) -> tuple[int, float] | UserError:
        try:
            found = _read(entry, dim) if read else (read_video_shape(entry.paths, dim), 1.0)
            if note:
                for path in entry.paths:
                    note(path)
            return found
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        checked = pool.map(check, entries)
        # disable=None: no bar where stderr is not a terminal.
        results = list(tqdm(checked, "checking features", len(entries), disable=None, leave=False))
    bad = [index for index, result in enumerate(results) if isinstance(result, UserError)]
    if bad:
        others = f" ({len(bad) - 1} other files of the list are bad too)" if len(bad) > 1 else ""
        raise UserError(f"{list_name}, row {entries[bad[0]].row}: {results[bad[0]]}{others}")
    compare_norms(entries, np.array([norm for _, norm in results]), list_name)
    return [rows for rows, _ in results]


def _read(entry: Entry, dim: int | None) -> tuple[int, float]:
    features = load_video(entry.paths, dim)
    return len(features), median_norm(features)


def median_norm(features: np.ndarray) -> float:
    """Return the median norm of the snippets of a video (L, D)."""
    return float(np.median(np.linalg.norm(features.astype(np.float32), axis=1)))


def compare_norms(entries: Sequence[Entry], norms: np.ndarray, list_name: str) -> None:
    """Warn where the norms (N,) of a list's videos lie far apart."""
    low, high = int(norms.argmin()), int(norms.argmax())
    if norms[high] > NORM_RANGE * norms[low]:
        warn(
            f"{list_name}: features differ in scale, with norms from {norms[low]:.3g} ({entries[low].path.name}) to "
            f"{norms[high]:.3g} ({entries[high].path.name}): are some normalised, or from another model?"
        )


def check_overlap(train: Sequence[Entry], test: Sequence[Entry]) -> None:
    """Warn where videos of the test list, by name, are in the training list as well."""
    trained = {entry.video for entry in train}
    shared = sorted({entry.video for entry in test} & trained)
    if shared:
        warn(
            f"{len(shared)} test videos are in the training list as well, the first is {shared[0]}: "
            f"the results will look better than they are"
        )
