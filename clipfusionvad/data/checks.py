"""What is verified before a run starts, so that a bad file is not met after hours of training."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from clipfusionvad.data.features import check_dim, load_features, read_shape
from clipfusionvad.data.lists import Entry
from clipfusionvad.errors import UserError, warn


def check_features(entries: Sequence[Entry], dim: int | None, list_name: str, read: bool = True) -> list[int]:
    """Verify every feature file of a list and return its number of snippets, entry by entry.

    Checks shape, dtype, dim and completeness, and with ``read`` that all values are finite. Raises one
    ``UserError`` that names the list, the row and the file of the first bad entry and counts the others.
    """

    def check(entry: Entry) -> int | UserError:
        try:
            if read:
                return len(load_features(entry.path, dim))
            rows, found, _ = read_shape(entry.path)
            check_dim(entry.path, found, dim)
            return rows
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
    return results


def check_overlap(train: Sequence[Entry], test: Sequence[Entry]) -> None:
    """Warn where videos of the test list, by name, are in the training list as well."""
    trained = {entry.video for entry in train}
    shared = sorted({entry.video for entry in test} & trained)
    if shared:
        warn(
            f"{len(shared)} test videos are in the training list as well, the first is {shared[0]}: "
            f"the results will look better than they are"
        )
