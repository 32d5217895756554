"""Training and testing by the processes that torchrun starts: one for each GPU, or several on a CPU.

Each process runs the model on its rows of a batch. The outputs are gathered, so each process computes the losses of
the whole batch, and ``DistributedDataParallel`` averages the gradients: a step equals that of a single process.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipfusionvad.engine.device import pick_device
from clipfusionvad.io.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_LOST, UserError, error_line
from clipfusionvad.io.rank import is_main, rank_info
from clipfusionvad.io.signals import STOP_SIGNALS, stop_on_signals

#: How long a process waits for the others: rank 0 checks all feature files meanwhile.
TIMEOUT = timedelta(minutes=30)
#: Seconds in which a process must stop after a signal; torchrun kills it after 30.
STOP_SECONDS = 20.0


@contextlib.contextmanager
def distributed_context(device_name: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did, and yield a device: each process takes its own GPU."""
    if rank_info().world_size == 1:
        yield pick_device(device_name)
        return
    try:
        # Objects and decisions travel from CPU to CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot meet the other processes: {str(error).splitlines()[0]}") from error
    try:
        yield _pick_rank_device(device_name)
        # torchrun would end processes that still write.
        barrier()
    except UserError as error:
        _exit(EXIT_BAD_INPUT, error_line(error))
    except KeyboardInterrupt:
        _exit(EXIT_INTERRUPTED, "interrupted")
    except Exception as error:
        lost = _lost_rank(error)
        _exit(EXIT_LOST if lost else 1, f"error: {lost}: start again" if lost else traceback.format_exc())
    dist.destroy_process_group()


def _pick_rank_device(name: str) -> torch.device:
    info = rank_info()
    if name in ("auto", "cuda") and torch.cuda.is_available():
        if info.local_world_size > torch.cuda.device_count():
            raise UserError(
                f"{info.local_world_size} processes on this machine, but {torch.cuda.device_count()} GPUs: "
                f"lower --nproc-per-node"
            )
        torch.cuda.set_device(info.local_rank)
        return pick_device(f"cuda:{info.local_rank}")
    device = pick_device(name)
    if device.type != "cpu":
        raise UserError(f"--device {name} with {info.world_size} processes: give cuda (a GPU for each process) or cpu")
    return device


def gather_objects(value: Any) -> list[Any]:
    """Return in every process the plain values of all processes, by rank. All processes must call this."""
    values = [value] * rank_info().world_size
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast_object(make: Callable[[], Any]) -> Any:
    """Return in every process the plain value that ``make`` returns in rank 0."""
    return gather_objects(make() if is_main() else None)[0]


def any_rank(flag: bool) -> bool:
    return any(gather_objects(flag))


def barrier() -> None:
    gather_objects(None)


@contextlib.contextmanager
def local_main_first() -> Iterator[None]:
    """Let one process of each machine run the block first: the others find what it has downloaded."""
    first = rank_info().local_rank == 0
    if not first:
        barrier()
    yield
    if first:
        barrier()


def rank_slices(count: int, world_size: int) -> list[slice]:
    """Return the rows of a batch that each process takes: all rows where there are fewer than processes."""
    if count < world_size:
        return [slice(0, count)] * world_size
    return [slice(rank * count // world_size, (rank + 1) * count // world_size) for rank in range(world_size)]


def rank_slice(count: int) -> slice:
    """Return this process's rows of a batch of ``count``."""
    return rank_slices(count, rank_info().world_size)[rank_info().rank]


def gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Return the rows of all processes, ``sizes`` of them each; gradients of all processes flow back."""
    joined: Tensor = _GatherRows.apply(rows, sizes)  # type: ignore[no-untyped-call]  # torch gives apply no types
    return joined


class _GatherRows(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather does this for equal sizes, but is deprecated.
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.split(ctx.sizes)[rank_info().rank], None


class CpuSyncBatchNorm(nn.BatchNorm1d):
    """``nn.SyncBatchNorm`` for CPUs, where torch's own does not run: it normalises the gathered rows."""

    process_group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) or (N, C, L) → the same shape."""
        if not self.training or self.process_group is not None:
            return super().forward(x)
        sizes = gather_objects(len(x))
        return super().forward(gather_rows(x, sizes)).split(sizes)[rank_info().rank]


def find_sync_batchnorms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm | CpuSyncBatchNorm)]


def sync_batchnorm(model: nn.Module, device: torch.device) -> None:
    """Replace every BatchNorm of a model by one over the rows of all processes; the names of parameters stay."""
    if device.type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = CpuSyncBatchNorm
    for module in find_sync_batchnorms(model):
        # torch.compile does not trace collectives.
        module.forward = torch.compiler.disable(module.forward)


@contextlib.contextmanager
def resumable(state: Callable[[], str]) -> Iterator[None]:
    """Exit with code 75 and the line ``state()`` where a process is lost, or does not stop after a signal.

    torchrun signals the other processes when it finds one lost. A process that waits for a GPU runs no signal handler,
    so a thread waits for the signal, too.
    """
    if rank_info().world_size == 1:
        yield
        return
    ended = threading.Event()
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)

    def watch() -> None:
        while kind := os.read(receiver, 1):
            if kind[0] in STOP_SIGNALS and not ended.wait(STOP_SECONDS):
                _exit(EXIT_LOST, f"error: not stopped in {STOP_SECONDS:.0f} s (is another process lost?): {state()}")

    threading.Thread(target=watch, daemon=True).start()
    previous = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    try:
        # Only signals that have a handler are written to the pipe. The handler stays while ``_exit`` runs: torchrun's
        # SIGTERM comes at the same time.
        with stop_on_signals(threading.Event(), second_interrupts=False):
            try:
                yield
            except RuntimeError as error:
                if lost := _lost_rank(error):
                    _exit(EXIT_LOST, f"error: {lost}: {state()}")
                raise
    finally:
        ended.set()
        signal.set_wakeup_fd(previous)
        os.close(sender)


def _lost_rank(error: Exception) -> str | None:
    """Return how torch noticed that a process was lost; None for other errors."""
    if not isinstance(error, dist.DistError) and "gloo" not in str(error):
        return None
    # "[a source file of gloo:its line] what happened. Advice"
    reason = re.sub(r"^\[\S+\] ", "", str(error)).splitlines()[0].split(". ")[0]
    return f"another process was lost ({reason})"


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
