"""A held-out part of the training list, to pick checkpoints without looking at the test set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from clipfusionvad.data.lists import Entry
from clipfusionvad.errors import UserError


def split_holdout(entries: Sequence[Entry], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out, each sorted.

    Whole videos are held out, of every label its share (at least one of a label with two or more), and each
    with one crop only; their other crops are used for neither. Raises ``UserError`` where fewer than two labels
    have a video to spare.
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
        count = max(round(share * len(videos)), 1) if len(videos) > 1 else 0
        held_out.update(rng.permutation(videos)[:count].tolist())
    if len({label for label, videos in videos_of.items() if held_out.intersection(videos)}) < 2:
        raise UserError("--protocol clean holds out training videos of each label, but too few labels have two videos")
    train = [row for row, entry in enumerate(entries) if entry.video not in held_out]
    return np.array(train), np.array(sorted(rows_of[video][0] for video in held_out))
