"""Which of several processes this one is, as torchrun says in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """``rank`` of ``size`` processes, ``local_rank`` of ``local_size`` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launched() -> Place:
    """The place that torchrun gave this process; the only one of one without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    # Clusters set some of these for every process; LOCAL_RANK tells that a launcher did.
    return Place(*(int(os.environ[name]) for name in names)) if all(name in os.environ for name in names) else Place()
