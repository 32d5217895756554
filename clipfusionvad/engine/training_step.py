"""From a batch to its losses, in one process or in several."""

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipfusionvad.engine.device import autocast
from clipfusionvad.engine.distributed import gather_rows, rank_slices, sync_batchnorm
from clipfusionvad.io.rank import rank_info
from clipfusionvad.models import Method
from clipfusionvad.models.base import VADOutput


class TrainingStep(nn.Module):
    """Compute the losses of a batch, of which each process holds some rows."""

    def __init__(self, model: Method, device: torch.device, precision: str):
        super().__init__()
        self.device, self.precision = device, precision
        if rank_info().world_size > 1:
            self.norms = sync_batchnorm(model, device)
            self.group_of_one, _ = dist.new_subgroups(1)
            # DistributedDataParallel warns on stderr where it finds no unused parameter.
            self.unused = nn.Parameter(torch.zeros(1, device=device))
        self.model = model.to(device)

    def forward(self, visual: Tensor, lengths: Tensor, targets: Tensor, count: int, step: int) -> Mapping[str, Tensor]:
        """Return the loss terms of the whole batch of ``count`` rows."""
        rank, size = rank_info()[:2]
        if size == 1:
            return self.model.losses(self._forward(visual, lengths), targets, lengths)
        # Where there are fewer rows than processes, each process computes the whole batch as a single process would.
        shared = count >= size
        for norm in self.norms:
            norm.process_group = None if shared else self.group_of_one
        # Dropout differs between the processes, but their losses draw the same random numbers.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed((torch.initial_seed() + 1 + step * size + rank * shared) % 2**63)
            output = self._forward(visual, lengths)
        if shared:
            sizes = [rows.stop - rows.start for rows in rank_slices(count, size)]
            parts = {field.name: getattr(output, field.name) for field in fields(output)}
            per_row = {name: part for name, part in parts.items() if name not in output.replicated and part is not None}
            output = replace(output, **{name: gather_rows(part, sizes) for name, part in per_row.items()})
            lengths, targets = gather_rows(lengths, sizes), gather_rows(targets, sizes)
        return self.model.losses(output, targets, lengths)

    def _forward(self, visual: Tensor, lengths: Tensor) -> VADOutput:
        with autocast(self.device, self.precision):
            return self.model(visual, lengths)
