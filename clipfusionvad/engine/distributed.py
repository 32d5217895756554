"""Training and testing by the processes that torchrun starts: one for each GPU, or several on a CPU.

Each runs the model on its rows of a batch and, of gathered outputs, computes the losses of the whole batch;
``DistributedDataParallel`` averages the gradients: a step equals that of a single process.
"""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipfusionvad.engine.device import pick_device
from clipfusionvad.io.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_LOST,
    UserError,
    error_line,
    ignore_stop_signals,
)
from clipfusionvad.io.rank import is_main, rank_info

#: How long a process waits for the others: rank 0 checks all feature files meanwhile.
TIMEOUT = timedelta(minutes=30)


@contextlib.contextmanager
def distributed_context(device_name: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did, and yield a device: each process takes its own GPU."""
    info = rank_info()
    if info.world_size == 1:
        yield pick_device(device_name)
        return
    try:
        # Objects and decisions travel from CPU to CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot meet the other processes: {str(error).splitlines()[0]}") from error
    try:
        # A process that ended before all have met would look like one that cannot be reached.
        barrier()
        if device_name not in ("auto", "cuda", "cpu"):
            raise UserError(f"--device {device_name} with several processes: give cuda (a GPU for each) or cpu")
        if device_name != "cpu" and (gpus := torch.cuda.device_count()):
            if info.local_world_size > gpus:
                raise UserError(f"{info.local_world_size} processes, but {gpus} GPUs here: lower --nproc-per-node")
            device_name = f"cuda:{info.local_rank}"
            torch.cuda.set_device(device_name)
        yield pick_device(device_name)
        # torchrun would end processes that still write.
        barrier()
    except UserError as error:
        _exit(EXIT_BAD_INPUT, error_line(error))
    except KeyboardInterrupt:
        _exit(EXIT_INTERRUPTED, "interrupted")
    except Exception as error:
        exit_if_lost(error, lambda: "start again")
        _exit(1, traceback.format_exc())
    # gloo's thread frees its last tensors under Python's lock, which the group's end holds while it waits for it.
    time.sleep(0.3)
    dist.destroy_process_group()


def gather_objects(value: Any) -> list[Any]:
    """Return in every process the plain values of all processes, by rank. All processes must call this."""
    values = [value] * rank_info().world_size
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    gather_objects(None)


@contextlib.contextmanager
def local_main_first() -> Iterator[None]:
    """Let one process of each machine run the block first: the others find what it has downloaded."""
    if rank_info().local_rank:
        barrier()
    yield
    if not rank_info().local_rank:
        barrier()


def rank_slice(count: int) -> slice:
    """Return this process's rows of a batch of ``count``: all where there are fewer than processes."""
    rank, size = rank_info()[:2]
    return slice(rank * count // size, (rank + 1) * count // size) if count >= size else slice(0, count)


def gather_rows(rows: Tensor, own: slice, count: int) -> Tensor:
    """Return the ``count`` rows of all processes, of which ``rows`` are ``own``; all gradients flow back."""
    padded = nn.functional.pad(rows, [0, 0] * (rows.ndim - 1) + [own.start, count - own.stop])
    return _SumRanks.apply(padded)  # type: ignore[no-untyped-call]  # torch gives apply no types


class _SumRanks(torch.autograd.Function):
    # all_reduce of torch.distributed.nn.functional is deprecated.
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumRanks.forward(ctx, gradient)


class CpuSyncBatchNorm(nn.BatchNorm1d):
    """``nn.SyncBatchNorm`` for CPUs, where torch's own does not run: it normalises the gathered rows."""

    process_group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) or (N, C, L) → the same shape."""
        if not self.training or self.process_group is not None:
            return super().forward(x)
        sizes = gather_objects(len(x))
        start = sum(sizes[: rank_info().rank])
        own = slice(start, start + len(x))
        return super().forward(gather_rows(x, own, sum(sizes)))[own]


def sync_batchnorm(model: nn.Module, device: torch.device) -> list[Any]:
    """Replace every BatchNorm of a model by one over the rows of all processes, under the same names; return these."""
    if device.type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = CpuSyncBatchNorm
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm | CpuSyncBatchNorm)]
    for norm in norms:
        # torch.compile does not trace collectives.
        norm.forward = torch.compiler.disable(norm.forward)
    return norms


def exit_if_lost(error: Exception, advice: Callable[[], str]) -> None:
    """Exit with code 75 and one line if ``error`` is how torch notices that another process was lost."""
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        # torchrun sends SIGTERM at the same time.
        ignore_stop_signals()
        # "[a source file of gloo:its line] what happened. Advice"
        reason = re.sub(r"^\[\S+\] ", "", str(error)).splitlines()[0].split(". ")[0]
        _exit(EXIT_LOST, f"error: another process was lost ({reason}): {advice()}")


def _exit(code: int, message: str) -> NoReturn:
    """End at once: an orderly end would wait for processes that wait for this one.

    The first process that ends prints its message, and its code becomes that of all.
    """
    mine = f"{code} {rank_info().rank}"
    try:
        first = dist.distributed_c10d._get_default_store().compare_set("end", "", mine).decode()
    except RuntimeError:
        # The store has ended with the process that kept it.
        first = mine
    if first == mine:
        # sys.stderr of other ranks is silenced. One write: torchrun writes to the same place.
        print(f"{message}\n", end="", file=sys.stderr if is_main() else sys.__stderr__, flush=True)
    sys.stdout.flush()
    os._exit(int(first.split()[0]))
