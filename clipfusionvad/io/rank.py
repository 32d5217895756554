"""The rank of this process, as torchrun sets it in the environment."""

import os
from typing import NamedTuple


class RankInfo(NamedTuple):
    """``rank`` of ``world_size`` processes, ``local_rank`` of ``local_world_size`` on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def rank_info() -> RankInfo:
    """Return the rank that torchrun set, or that of a single process where torchrun did not start this one."""
    # Clusters set some of these for every process. Only a launcher sets LOCAL_RANK.
    values = [os.environ.get(name.upper(), "") for name in RankInfo._fields]
    return RankInfo(*map(int, values)) if all(values) else RankInfo()


def is_main() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank_info().rank == 0
