"""Where batches are gathered from when features are packed: on the GPU if they fit, else in the mapped file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from clipfusionvad.data.ahead import ahead
from clipfusionvad.data.sampling import Sampling
from clipfusionvad.data.store import Store

# Of a GPU's free memory, what features may take; the rest is for training.
GPU_SHARE = 0.5
# Batches that wait, in memory that the GPU can copy from, while a step is computed.
_BATCHES_AHEAD = 3


class Shelf:
    """A store's features as a tensor, and what has to be known to choose from them.

    Batches end up on ``device``. Where that is a GPU and the features take at most half of what is free of its
    memory, they are copied there once; else batches are gathered from the file by a thread of its own and copied
    while the GPU works.
    """

    def __init__(self, store: Store, device: torch.device):
        self.whole, self.lengths, self.starts, self.device = store.whole, store.lengths, store.starts, device
        with warnings.catch_warnings():
            # The map cannot be written to, and nobody does.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.features = torch.from_numpy(store.features)
        if _fits(self.features, device):
            self.features = self.features.to(device)

    def gather(self, indices: Iterator[np.ndarray]) -> Iterator[Tensor]:
        """The features at each of the indices into their first dim, float32 on the device."""
        taken = (self._take(index) for index in indices)
        for rows in taken if self.features.device.type == self.device.type else ahead(taken, _BATCHES_AHEAD):
            yield rows.to(self.device, non_blocking=True).float()

    def _take(self, index: np.ndarray) -> Tensor:
        """In the dtype of the store; in pinned memory if they are yet to be copied to a GPU."""
        flat = torch.from_numpy(index.ravel()).to(self.features.device)
        pinned = self.device.type == "cuda" and self.features.device.type == "cpu"
        rows = torch.empty(
            (len(flat), *self.features.shape[1:]),
            dtype=self.features.dtype,
            device=self.features.device,
            pin_memory=pinned,
        )
        torch.index_select(self.features, 0, flat, out=rows)
        return rows.unflatten(0, index.shape)


def make_shelf(store: Store | None, sampling: Sampling, device: torch.device) -> Shelf | None:
    """What a sampling's batches can be gathered from; None where there is nothing of the kind.

    Of whole videos a sampling that does not draw makes something else than rows, video by video. Raises
    ``UserError`` where the store holds the samples of another sampling.
    """
    if store is None or (store.whole and not sampling.draws):
        return None
    store.check_sampling(sampling)
    return Shelf(store, device)


def _fits(features: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return features.numel() * features.element_size() <= GPU_SHARE * free
