"""Where batches are gathered from when features are packed: on the GPU if they fit, else in the mapped file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from clipfusionvad.data.packed.store import Store
from clipfusionvad.data.prefetch import prefetch
from clipfusionvad.data.sampling import Sampling

# Of a GPU's free memory, what features may take; the rest is for training.
GPU_SHARE = 0.5
# Batches that wait, in memory that the GPU can copy from, while a step is computed.
_BATCHES_AHEAD = 3
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class PackedBatches:
    """A store's features, and what has to be known to choose from them.

    Batches end up on ``device``. Where that is a GPU and the features take at most half of what is free of its
    memory, they are copied there once; else batches are gathered from the file by a thread of its own and copied
    while the GPU works.
    """

    def __init__(self, store: Store, device: torch.device):
        self.whole, self.lengths, self.starts, self.device = store.whole, store.lengths, store.starts, device
        self.mapped = store.features
        self.reads_ahead = device.type != "cpu"
        self.on_gpu = _tensor(self.mapped).to(device) if _fits(self.mapped, device) else None
        # Where rows of the file go before they are widened, used again: new memory takes longer than the copying.
        self._taken = np.empty(0, self.mapped.dtype)

    def gather(self, indices: Iterator[np.ndarray]) -> Iterator[Tensor]:
        """The features at each of the indices into their first dim, float32 on the device."""
        if self.on_gpu is not None:
            for index in indices:
                chosen = torch.from_numpy(index).to(self.device, non_blocking=True)
                yield self.on_gpu.index_select(0, chosen.flatten()).unflatten(0, chosen.shape).float()
        elif self.reads_ahead:
            for rows in prefetch((self._pin(index) for index in indices), _BATCHES_AHEAD):
                yield rows.to(self.device, non_blocking=True).float()
        else:
            yield from map(self._widen, indices)

    def _widen(self, index: np.ndarray) -> Tensor:
        shape = (*index.shape, *self.mapped.shape[1:])
        if self._taken.shape != shape:
            self._taken = np.empty(shape, self.mapped.dtype)
        self._take(index, self._taken)
        # numpy asks for huge pages: in memory from torch, page faults would take longer than the copying.
        return torch.from_numpy(np.empty(shape, np.float32)).copy_(torch.from_numpy(self._taken))

    def _pin(self, index: np.ndarray) -> Tensor:
        """In the dtype of the store, in memory that a GPU can copy from while it works."""
        shape = (*index.shape, *self.mapped.shape[1:])
        rows = torch.empty(shape, dtype=_DTYPES[self.mapped.dtype.name], pin_memory=self.device.type == "cuda")
        self._take(index, rows.numpy())
        return rows

    def _take(self, index: np.ndarray, out: np.ndarray) -> None:
        # Any mode but "raise" writes straight into ``out``.
        self.mapped.take(index, axis=0, out=out, mode="clip")


def make_packed_batches(store: Store | None, sampling: Sampling, device: torch.device) -> PackedBatches | None:
    """What a sampling's batches can be gathered from; None where there is nothing of the kind.

    Of whole videos a sampling that does not draw makes something else than rows, video by video. Raises
    ``UserError`` where the store holds the samples of another sampling.
    """
    if store is None or (store.whole and not sampling.is_random):
        return None
    store.check_sampling(sampling)
    return PackedBatches(store, device)


def _fits(features: np.ndarray, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return features.nbytes <= GPU_SHARE * free


def _tensor(mapped: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # The map cannot be written to, and nobody does.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(mapped)
