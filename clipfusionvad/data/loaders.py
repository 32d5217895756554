"""Which videos make a batch, and the batches themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from clipfusionvad.data.features import load_features
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.sampling import sample_uniform
from clipfusionvad.datasets import Dataset
from clipfusionvad.errors import UserError


class BatchPlan(Protocol):
    """Says for every epoch which rows of the training list make each batch, in order."""

    def epoch(self, epoch: int) -> list[np.ndarray]: ...


class ShuffledPlan:
    """Rows shuffled anew in each epoch; the last, smaller batch is kept."""

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed

    def epoch(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]


class BalancedPlan:
    """As many normal as anomalous rows in a batch, normal ones first.

    Both kinds are shuffled, incomplete batches are dropped, and the epoch ends with the scarcer kind.
    """

    def __init__(self, normal: np.ndarray, anomalous: np.ndarray, batch_size: int, seed: int):
        self.normal, self.anomalous, self.batch_size, self.seed = normal, anomalous, batch_size, seed
        for kind, rows in (("normal", normal), ("anomalous", anomalous)):
            if len(rows) < batch_size:
                raise UserError(
                    f"a balanced batch takes {batch_size} {kind} rows, but the training list has {len(rows)}: "
                    f"lower --batch-size or use --no-balanced"
                )

    def epoch(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        normal, anomalous = rng.permutation(self.normal), rng.permutation(self.anomalous)
        steps = min(len(normal), len(anomalous)) // self.batch_size
        size = steps * self.batch_size
        pairs = zip(np.split(normal[:size], steps), np.split(anomalous[:size], steps), strict=True)
        return [np.concatenate(pair) for pair in pairs]


def make_plan(targets: np.ndarray, rows: np.ndarray, batch_size: int, balanced: bool, seed: int) -> BatchPlan:
    """targets (N, C) multi-hot of the whole list, of which only ``rows`` are used."""
    if not balanced:
        return ShuffledPlan(rows, batch_size, seed)
    normal = targets[rows, 0] > 0
    return BalancedPlan(rows[normal], rows[~normal], batch_size, seed)


class Bags(TorchDataset):
    """The training list as bags: features sampled to T snippets, valid length, multi-hot label."""

    def __init__(self, entries: Sequence[Entry], dataset: Dataset, length: int, width: int):
        self.entries, self.length, self.width = entries, length, width
        self.targets = np.stack([dataset.encode(entry.label) for entry in entries])

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, row: int) -> tuple[Tensor, int, Tensor]:
        features = load_features(self.entries[row].path, self.width)
        visual, count = sample_uniform(features, self.length)
        return torch.from_numpy(visual.astype(np.float32)), count, torch.from_numpy(self.targets[row])


def load_batches(bags: Bags, batches: Sequence[np.ndarray], workers: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches (visual (B, T, D) float32, lengths (B,) int64, targets (B, C)) in the given order."""
    loader = DataLoader(
        bags,
        batch_sampler=[batch.tolist() for batch in batches],
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # Each loader draws a number; from torch's own generator a resumed epoch would draw it a second time.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except UserError as error:
        # From a worker process it comes wrapped in that process's traceback; what we said is at its end.
        raise UserError(str(error).rsplit("UserError: ", 1)[-1]) from None
