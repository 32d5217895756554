"""A held-out part of the training list, which selects checkpoints without the test set."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from clipfusionvad.data.lists import Entry
from clipfusionvad.io.errors import UserError


def split_holdout(
    entries: Sequence[Entry], normal: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and the rows held out, each sorted; ``normal`` (N,) marks normal entries.

    Whole videos are held out, of every label its share (of a label with two or more at least one, and never all),
    and each with one crop only; their other crops are used for neither. Raises ``UserError`` where normal or
    anomalous videos have none to spare.
    """
    rows_of: dict[str, list[int]] = defaultdict(list)
    videos_of: dict[str, list[str]] = defaultdict(list)
    for row, entry in enumerate(entries):
        if not rows_of[entry.video]:
            videos_of[entry.label].append(entry.video)
        rows_of[entry.video].append(row)
    rng = np.random.default_rng(seed)
    held_out: set[str] = set()
    for label in sorted(videos_of):
        videos = videos_of[label]
        count = min(max(round(share * len(videos)), 1), len(videos) - 1)
        held_out.update(rng.permutation(videos)[:count].tolist())
    rows = np.array(sorted(rows_of[video][0] for video in held_out), dtype=np.int64)
    if len(set(normal[rows].tolist())) < 2:
        raise UserError(
            "--protocol clean holds out normal and anomalous videos, but the training list has no two normal videos, "
            "or no two of any anomalous label"
        )
    return np.array([row for row, entry in enumerate(entries) if entry.video not in held_out]), rows
