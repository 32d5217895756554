"""Which videos make a batch, and the batches themselves."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from clipfusionvad.data.features import load_entry
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.packed.batches import PackedBatches
from clipfusionvad.data.sampling import Sampling
from clipfusionvad.datasets import Dataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.signals import ignore_stop_signals


class BatchSampler(Protocol):
    """Says for every epoch which rows of the training list make each batch, in order."""

    def epoch(self, epoch: int) -> list[np.ndarray]: ...


class ShuffledBatchSampler:
    """Rows shuffled anew in each epoch; the last, smaller batch is kept."""

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed

    def epoch(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]


class BalancedBatchSampler:
    """As many normal as anomalous rows in a batch, normal ones first.

    Both kinds are shuffled and incomplete batches are dropped. The epoch ends with the scarcer kind or, with
    ``cycle``, with the other one, for which the scarcer kind is shuffled and used again.
    """

    def __init__(self, normal: np.ndarray, anomalous: np.ndarray, batch_size: int, seed: int, cycle: bool = False):
        self.kinds, self.batch_size, self.seed, self.cycle = (normal, anomalous), batch_size, seed, cycle
        for kind, rows in (("normal", normal), ("anomalous", anomalous)):
            if len(rows) < batch_size:
                raise UserError(
                    f"a balanced batch takes {batch_size} {kind} rows, but the training list has {len(rows)}: "
                    f"lower --batch-size or use --no-balanced"
                )

    def epoch(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        full = [len(rows) // self.batch_size for rows in self.kinds]
        steps = max(full) if self.cycle else min(full)
        halves = []
        for rows, batches in zip(self.kinds, full, strict=True):
            rounds = [rng.permutation(rows)[: batches * self.batch_size] for _ in range(-(-steps // batches))]
            halves.append(np.concatenate(rounds)[: steps * self.batch_size].reshape(steps, self.batch_size))
        return list(np.concatenate(halves, axis=1))


def make_batch_sampler(
    targets: np.ndarray, rows: np.ndarray, batch_size: int, balanced: bool, seed: int, cycle: bool = False
) -> BatchSampler:
    """targets (N, C) multi-hot of the whole list, of which only ``rows`` are used."""
    if not balanced:
        return ShuffledBatchSampler(rows, batch_size, seed)
    normal = targets[rows, 0] > 0
    return BalancedBatchSampler(rows[normal], rows[~normal], batch_size, seed, cycle)


class BagDataset(TorchDataset[tuple[Tensor, int, Tensor]]):
    """The training list as bags: an input sampled from each video, its valid length, its multi-hot label.

    An item is asked for as (row, *draw): equal numbers give the same sample, whatever was asked for before.
    ``packed`` is where their batches are gathered from, where the list is packed.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        dataset: Dataset,
        sampling: Sampling,
        width: int,
        seed: int = 0,
        packed: PackedBatches | None = None,
    ):
        self.entries, self.sampling, self.width, self.seed, self.packed = entries, sampling, width, seed, packed
        self.targets = np.stack([dataset.encode(entry.label) for entry in entries])

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, item: tuple[int, ...]) -> tuple[Tensor, int, Tensor]:
        row, *draw = item
        features = load_entry(self.entries[row], self.width)
        visual, count = self.sampling.sample(features, self.generator(*draw))
        return torch.from_numpy(visual.astype(np.float32)), count, torch.from_numpy(self.targets[row])

    @property
    def stock(self) -> PackedBatches:
        """``packed``, for those who have made sure that there is one."""
        if self.packed is None:
            raise ValueError("the features of this list are not packed")
        return self.packed

    def generator(self, *draw: int) -> np.random.Generator:
        """What an item is drawn with."""
        return np.random.default_rng([self.seed, *draw])

    def index(self, rows: np.ndarray, *draw: int) -> np.ndarray:
        """Where on the packed the inputs of ``rows`` (B,) stand: (B,) samples, or (B, T) snippets as they are drawn."""
        if not self.sampling.is_random:
            return rows
        drawn = [
            self.sampling.draw_rows(count, self.generator(*draw, place))
            for place, count in enumerate(self.stock.lengths[rows].tolist())
        ]
        return self.stock.starts[rows, None] + np.stack(drawn)

    @property
    def lengths(self) -> np.ndarray:
        """Valid snippets of every row's input, (N,) int64, where they are packed."""
        drawn = np.full_like(self.stock.lengths, self.sampling.length)
        return drawn if self.sampling.is_random else self.stock.lengths


def load_batches(
    bags: BagDataset,
    batches: Sequence[np.ndarray],
    workers: int,
    epoch: int = 0,
    start: int = 0,
    part: Callable[[int], slice] = slice,
    pin: bool = False,
) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
    """Batches (visual (B, T, D) float32, lengths (B,) int64, targets (B, C)) of an epoch, from batch ``start`` on.

    ``workers`` processes read and sample single files; packed features need none. ``part`` says which rows of a batch
    of so many are wanted (not given: all); they are those that it has as a whole. What is read from single files is
    put where a GPU can copy it from while it works, if ``pin``.
    """
    if bags.packed is not None:
        yield from _gather_batches(bags, bags.packed, batches, epoch, start, part)
        return
    items = [[(row, epoch, at, place) for place, row in enumerate(rows.tolist())] for at, rows in enumerate(batches)]
    loader = DataLoader(
        bags,
        batch_sampler=[batch[part(len(batch))] for batch in items[start:]],
        # Mapped features would be copied to processes that are not forked.
        num_workers=workers if bags.entries[0].packed is None else 0,
        # Ctrl-C and torchrun signal children, too, but the step in progress still needs their work.
        worker_init_fn=ignore_stop_signals,
        pin_memory=pin,
        # Each loader draws a number; from torch's own generator a resumed epoch would draw it a second time.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except UserError as error:
        # From a worker process it comes wrapped in that process's traceback; what we said is at its end.
        raise UserError(str(error).rsplit("UserError: ", 1)[-1]) from None


def _gather_batches(
    bags: BagDataset,
    packed: PackedBatches,
    batches: Sequence[np.ndarray],
    epoch: int,
    start: int,
    part: Callable[[int], slice],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same batches from packed features, each gathered in one step, on the device where they are wanted."""
    targets, lengths = (torch.from_numpy(known).to(packed.device) for known in (bags.targets, bags.lengths))
    # Drawn for the whole batch: a place in it has its own random numbers.
    indices = (bags.index(rows, epoch, at)[part(len(rows))] for at, rows in enumerate(batches[start:], start))
    for rows, visual in zip(batches[start:], packed.gather(indices), strict=False):
        chosen = torch.from_numpy(rows[part(len(rows))]).to(packed.device)
        yield visual, lengths[chosen], targets[chosen]
