"""Batches of packed features: from GPU memory where the features fit there, else from the memory-mapped file."""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from clipfusionvad.data.packed.store import Store
from clipfusionvad.data.prefetch import prefetch
from clipfusionvad.data.sampling import Sampling

# The share of a GPU's free memory that features may take; training needs the rest.
_GPU_SHARE = 0.5
# Batches that wait in pinned memory while the GPU computes a step.
_BATCHES_PREFETCHED = 3
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class PackedBatches:
    """Gathers batches of a store's features on ``device``.

    Features that take at most half of the free memory of a GPU are copied there once. Else a thread gathers batches
    from the file, and they are copied while the GPU works.
    """

    def __init__(self, store: Store, device: torch.device):
        self.whole, self.lengths, self.starts, self.device = store.whole, store.lengths, store.starts, device
        self.mapped = store.features
        self.prefetches = device.type != "cpu"
        self.on_gpu = _as_tensor(self.mapped).to(device) if _fits(self.mapped, device) else None
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
        shape = (*index.shape, *self.mapped.shape[1:])
        rows = torch.empty(shape, dtype=_DTYPES[self.mapped.dtype.name], pin_memory=self.device.type == "cuda")
        self._take(index, rows.numpy())
        return rows

    def _take(self, index: np.ndarray, out: np.ndarray) -> None:
        # In the mode "raise", numpy would make a copy before it writes to ``out``.
        self.mapped.take(index, axis=0, out=out, mode="clip")


def make_packed_batches(store: Store | None, sampling: Sampling, device: torch.device) -> PackedBatches | None:
    """Return the packed batches of a sampling, or None where batches must be made video by video.

    That is the case without a store, and for averages of whole videos. Raises ``UserError`` where the store holds the
    samples of another sampling.
    """
    if store is None or (store.whole and not sampling.is_random):
        return None
    store.check_sampling(sampling)
    return PackedBatches(store, device)


def _fits(features: np.ndarray, device: torch.device) -> bool:
    return device.type == "cuda" and features.nbytes <= _GPU_SHARE * torch.cuda.mem_get_info(device)[0]


def _as_tensor(mapped: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # The map is read-only, and nothing writes to it.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(mapped)
