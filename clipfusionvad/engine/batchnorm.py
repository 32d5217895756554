"""BatchNorm over a batch that several processes have parts of, on any device (torch's own needs a GPU)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipfusionvad.engine.collective import reduce_sum


class SharedBatchNorm(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` whose training statistics are those of the rows of all processes, however many each has."""

    #: Whether each process has rows of its own; else all have the same ones.
    parted = True

    # torch also has BatchNorms without them, which no model here uses.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) or (N, C, L), N of this process → the same shape."""
        if not (self.training and self.parted):
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        others = [dim for dim in range(x.dim()) if dim != 1]
        shape = [1 if dim in others else -1 for dim in range(x.dim())]
        total = _sum(torch.cat([wide.sum(others), wide.new_full((1,), x.numel() // x.shape[1])]))
        mean, count = total[:-1] / total[-1], total[-1].detach()
        # Deviations from the common mean: a difference of squares would lose digits.
        centred = wide - mean.view(shape)
        variance = _sum(centred.square().sum(others)) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        normed = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normed = normed * self.weight.view(shape) + self.bias.view(shape)
        return normed.to(x.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


class _Sum(torch.autograd.Function):
    """The sum over all processes, each of which goes on to a loss of its own: gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return reduce_sum(values.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return reduce_sum(gradient.clone())


def _sum(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]  # torch gives apply no types
    return total


def share_norms(model: nn.Module) -> None:
    """Make every BatchNorm of a model one of all processes; names, parameters and state stay as they are."""
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = SharedBatchNorm
            # Other processes are waited for between graphs, not in them.
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise NotImplementedError(f"{name}: {type(module).__name__} cannot be shared by several processes")
