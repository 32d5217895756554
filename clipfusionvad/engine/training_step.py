"""From a batch to its losses, in one process or in several."""

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipfusionvad.engine.device import autocast
from clipfusionvad.engine.distributed import find_sync_batchnorms, gather_rows, rank_slices, sync_batchnorm
from clipfusionvad.io.rank import rank_info
from clipfusionvad.models import Method


class TrainingStep(nn.Module):
    """Compute the losses of a batch, of which each process holds some rows."""

    def __init__(self, model: Method, device: torch.device, precision: str):
        super().__init__()
        self.device, self.precision = device, precision
        if rank_info().world_size > 1:
            sync_batchnorm(model, device)
            self.group_of_one, _ = dist.new_subgroups(1)
            # DistributedDataParallel warns on stderr where it finds no unused parameter.
            self.unused = nn.Parameter(torch.zeros(1, device=device))
        self.model = model.to(device)

    def forward(self, visual: Tensor, lengths: Tensor, targets: Tensor, count: int, step: int) -> Mapping[str, Tensor]:
        """Return the loss terms of the whole batch of ``count`` rows."""
        info = rank_info()
        if info.world_size == 1:
            with autocast(self.device, self.precision):
                output = self.model(visual, lengths)
            return self.model.losses(output, targets, lengths)
        # Where there are fewer rows than processes, each process computes the whole batch as a single process would.
        shared = count >= info.world_size
        for norm in find_sync_batchnorms(self.model):
            norm.process_group = None if shared else self.group_of_one
        # Dropout differs between the processes, but their losses draw the same random numbers.
        seed = torch.initial_seed() + 1 + step * info.world_size + (info.rank if shared else 0)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed % 2**63)
            with autocast(self.device, self.precision):
                output = self.model(visual, lengths)
        if shared:
            sizes = [rows.stop - rows.start for rows in rank_slices(count, info.world_size)]
            parts = {field.name: getattr(output, field.name) for field in fields(output)}
            per_row = {name: part for name, part in parts.items() if name not in output.replicated and part is not None}
            output = replace(output, **{name: gather_rows(part, sizes) for name, part in per_row.items()})
            lengths, targets = gather_rows(lengths, sizes), gather_rows(targets, sizes)
        return self.model.losses(output, targets, lengths)
