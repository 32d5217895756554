"""Batch samplers and the batches that they make, from feature files or packed features."""

import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from clipfusionvad.data.features import load_entry
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.packed import Store
from clipfusionvad.data.sampling import Sampling
from clipfusionvad.datasets import Dataset
from clipfusionvad.io.errors import UserError, ignore_stop_signals

#: Returns which rows of a batch of so many are wanted.
Part = Callable[[int], slice]
# The share of a GPU's free memory that features may take; training needs the rest.
_GPU_SHARE = 0.5
# Batches that wait in pinned memory while the GPU computes a step.
_BATCHES_PREFETCHED = 3


class BatchSampler(Protocol):
    """Returns for each epoch the rows of the training list that make each batch, in order."""

    def epoch(self, epoch: int) -> list[np.ndarray]: ...


class ShuffledBatchSampler:
    """Shuffles the rows in each epoch and keeps the last, smaller batch."""

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed

    def epoch(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]


class BalancedBatchSampler:
    """Makes batches of ``batch_size`` normal rows followed by as many anomalous ones.

    Both kinds are shuffled and incomplete batches are dropped. The epoch ends with the smaller kind or, with
    ``cycle``, with the larger one, for which the smaller kind is shuffled and used again.
    """

    def __init__(self, normal: np.ndarray, anomalous: np.ndarray, batch_size: int, seed: int, cycle: bool = False):
        self.kinds, self.batch_size, self.seed, self.cycle = (normal, anomalous), batch_size, seed, cycle
        if (fewest := min(len(normal), len(anomalous))) < batch_size:
            raise UserError(
                f"--batch-size {batch_size} takes {batch_size} normal and {batch_size} anomalous rows, but the list "
                f"has {len(normal)} and {len(anomalous)}: give --batch-size {fewest}, or --no-balanced"
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


class PackedBatches:
    """Gathers batches of a store's features on ``device``.

    Where half of a GPU's free memory holds them, they are copied there once; else a thread gathers and copies batches.
    """

    def __init__(self, store: Store, device: torch.device):
        self.lengths, self.starts, self.device, self.mapped = store.lengths, store.starts, device, store.features
        self.prefetches = device.type != "cpu"
        self.on_gpu: Tensor | None = None
        if device.type == "cuda" and self.mapped.nbytes <= _GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
            with warnings.catch_warnings():
                # The map is read-only, and nothing writes to it.
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                self.on_gpu = torch.from_numpy(self.mapped).to(device)
        # Memory for rows before their conversion to float32. It is used again: new memory takes longer than the copy.
        self._buffer = np.empty(0, self.mapped.dtype)

    def gather(self, indices: Iterator[np.ndarray]) -> Iterator[Tensor]:
        """Yield the features at each of the indices into their first dimension, float32 on the device."""
        if self.on_gpu is not None:
            for index in indices:
                chosen = torch.from_numpy(index).to(self.device, non_blocking=True)
                yield self.on_gpu.index_select(0, chosen.flatten()).unflatten(0, chosen.shape).float()
        elif self.prefetches:
            for rows in prefetch((self._pin(index) for index in indices), _BATCHES_PREFETCHED):
                yield rows.to(self.device, non_blocking=True).float()
        else:
            yield from map(self._to_float32, indices)

    def _to_float32(self, index: np.ndarray) -> Tensor:
        shape = (*index.shape, *self.mapped.shape[1:])
        if self._buffer.shape != shape:
            self._buffer = np.empty(shape, self.mapped.dtype)
        self._take(index, self._buffer)
        # numpy asks for huge pages: in memory from torch, page faults would take longer than the copy.
        return torch.from_numpy(np.empty(shape, np.float32)).copy_(torch.from_numpy(self._buffer))

    def _pin(self, index: np.ndarray) -> Tensor:
        """Gather rows in the store's dtype in pinned memory, from which a GPU copies while it works."""
        shape, dtype = (*index.shape, *self.mapped.shape[1:]), getattr(torch, self.mapped.dtype.name)
        rows = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        self._take(index, rows.numpy())
        return rows

    def _take(self, index: np.ndarray, out: np.ndarray) -> None:
        # In the mode "raise", numpy would make a copy before it writes to ``out``.
        self.mapped.take(index, axis=0, out=out, mode="clip")


class BagDataset(TorchDataset[tuple[Tensor, int, Tensor]]):
    """The training list as bags: an input sampled from each video, its valid length, its multi-hot label.

    The index of an item is (row, *draw): equal numbers give the same sample, whatever was loaded before. ``packed``
    gathers the batches of a packed list, unless they are averages of whole videos.
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

    def generator(self, *draw: int) -> np.random.Generator:
        """Return the random numbers of an item."""
        return np.random.default_rng([self.seed, *draw])


def load_batches(
    bags: BagDataset,
    batches: Sequence[np.ndarray],
    workers: int,
    epoch: int = 0,
    start: int = 0,
    part: Part = slice,
    pin: bool = False,
) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
    """Yield the batches of an epoch from batch ``start`` on.

    They are visual (B, T, D) float32, lengths (B,) int64 and targets (B, C). ``part`` does not change the samples of
    the rows. ``workers`` processes read and sample single files, with ``pin`` into pinned memory.
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
        # Ctrl-C and torchrun signal child processes, too, but the step in progress still needs them.
        worker_init_fn=ignore_stop_signals,
        pin_memory=pin,
        # A loader draws a number. With torch's own generator, a resumed epoch would draw it a second time.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except UserError as error:
        # A worker process puts its traceback before the message.
        raise UserError(str(error).rsplit("UserError: ", 1)[-1]) from None


def _gather_batches(
    bags: BagDataset, packed: PackedBatches, batches: Sequence[np.ndarray], epoch: int, start: int, part: Part
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the same batches from packed features, on the device."""
    sampling = bags.sampling
    valid = np.full_like(packed.lengths, sampling.length) if sampling.is_random else packed.lengths
    targets, lengths = (torch.from_numpy(array).to(packed.device) for array in (bags.targets, valid))

    def index(at: int, rows: np.ndarray) -> np.ndarray:
        """Return where the inputs of a batch are in the store: (B,) samples, or (B, T) snippets drawn at random."""
        if sampling.is_random:
            # Drawn for the whole batch: each place in it has its own random numbers.
            counts = enumerate(packed.lengths[rows].tolist())
            drawn = [sampling.draw_rows(count, bags.generator(epoch, at, place)) for place, count in counts]
            rows = packed.starts[rows, None] + np.stack(drawn)
        return rows[part(len(rows))]

    indices = (index(at, rows) for at, rows in enumerate(batches[start:], start))
    for rows, visual in zip(batches[start:], packed.gather(indices), strict=False):
        chosen = torch.from_numpy(rows[part(len(rows))]).to(packed.device, non_blocking=True)
        yield visual, lengths[chosen], targets[chosen]


def prefetch(items: Generator[Any, None, None], size: int = 4) -> Generator[Any, None, None]:
    """Yield the same items, of which a thread makes up to ``size`` in advance; its exception is raised here."""
    pool, end = ThreadPoolExecutor(1, "prefetch"), object()
    try:
        waiting = deque(pool.submit(next, items, end) for _ in range(size))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()
