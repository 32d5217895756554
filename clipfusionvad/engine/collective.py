"""What processes of one training do together; any of it may find that one of them is lost."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")


class ProcessLost(Exception):
    """Another process of this training is gone."""


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # "[a file of gloo's:its line] what happened. Advice"
        said = re.sub(r"^\[\S+\] ", "", str(error))
        raise ProcessLost(said.splitlines()[0].split(". ")[0]) from error


def reduce_sum(values: Tensor) -> Tensor:
    """Replace values by their sum over the processes."""
    with _collective():
        dist.all_reduce(values)
    return values


def largest(value: int) -> int:
    """The largest of the processes' values, known to all once all have asked."""
    values = torch.tensor([value])
    with _collective():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of the first process."""
    for tensor in tensors:
        sent = tensor.contiguous()
        with _collective():
            dist.broadcast(sent, src=0)
        if sent is not tensor:
            tensor.copy_(sent)


def broadcast_value(value: Any) -> Any:
    """The first process's plain value."""
    values = [value]
    with _collective():
        dist.broadcast_object_list(values, src=0, device=CPU)
    return values[0]


def collect_values(value: Any) -> list[Any] | None:
    """The values of all processes by rank, in the first process; None in others."""
    found = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    with _collective():
        dist.gather_object(value, found, dst=0)
    return found


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their mean over the processes.

    One flat message after the backward pass: models are small, and unlike ``DistributedDataParallel`` it lets losses
    use parameters, ablations leave some unused and evaluations come in between.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) / dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def gather_rows(value: Any, sizes: Sequence[int]) -> Any:
    """Join the processes' parts of a batch, of ``sizes`` rows each, in every tensor of nested tuples and dataclasses.

    Fields that a dataclass names in ``replicated`` have no rows and stay. Gradients flow back for the mean over the
    processes of equal losses: what a part gets of its own process's loss counts for those of all.
    """
    if isinstance(value, Tensor):
        return _Gather.apply(value, list(sizes))  # type: ignore[no-untyped-call]  # torch gives apply no types
    if isinstance(value, tuple):
        return tuple(gather_rows(part, sizes) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        parted = [field.name for field in fields(value) if field.name not in getattr(value, "replicated", ())]
        return replace(value, **{name: gather_rows(getattr(value, name), sizes) for name in parted})
    return value


class _Gather(torch.autograd.Function):
    """Rows of all processes, each of which goes on to the same loss, so that no gradient need be sent back."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        # Collectives want equal shapes; what a smaller part lacks is cut off again.
        sent = own.new_zeros(max(sizes), *own.shape[1:])
        sent[: len(own)] = own
        parts = [torch.empty_like(sent) for _ in sizes]
        with _collective():
            dist.all_gather(parts, sent)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return len(ctx.sizes) * gradient.split(ctx.sizes)[dist.get_rank()], None
