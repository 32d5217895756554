"""Training and testing by several processes that torchrun starts, one for each GPU, or several on CPUs.

Each process takes its rows of a batch through the model. What the model says of them is gathered, so that each
computes the loss of the whole batch, whatever that loss is, and gradients are averaged: the step is that of a single
process. The first process alone writes files and speaks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from clipfusionvad.engine import collective
from clipfusionvad.engine.batchnorm import SharedBatchNorm, share_norms
from clipfusionvad.engine.collective import ProcessLost
from clipfusionvad.engine.device import deterministic, pick_device
from clipfusionvad.io.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_LOST, UserError, error_line
from clipfusionvad.io.rank import Place, launched

#: For how long a process waits for another that lives but does nothing; the first one checks all files meanwhile.
TIMEOUT = timedelta(minutes=30)
#: Seconds that a process has to stop in; torchrun kills it after 30.
PATIENCE = 20.0
STOPS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Team:
    """The processes of one training and which of them this is; alone unless torchrun started several.

    ``store`` is the memory they share. All must call the same methods in the same order.
    """

    place: Place = Place()
    store: Any = None

    @property
    def size(self) -> int:
        return self.place.size

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.place.rank == 0

    def part(self, count: int) -> slice:
        """This process's rows of a batch of ``count``: all of them where there are too few for everyone."""
        return self._parts(count)[self.place.rank]

    def _parts(self, count: int) -> list[slice]:
        if count < self.size:
            return [slice(0, count)] * self.size
        bounds = [rank * count // self.size for rank in range(self.size + 1)]
        return [slice(*ends) for ends in zip(bounds, bounds[1:], strict=False)]

    def prepare(self, model: nn.Module) -> None:
        """Make a model one that processes train together."""
        if self.size > 1:
            share_norms(model)

    def spread(self, model: nn.Module) -> None:
        """Give every process the first one's weights."""
        if self.size > 1:
            collective.broadcast_tensors(model.state_dict().values())

    @contextlib.contextmanager
    def forward(self, model: nn.Module, count: int, step: int) -> Iterator[None]:
        """Around the forward pass of this process's part of a batch of ``count``.

        What it draws at random (dropout) is its own, so that all are at one when losses draw. Of a batch that all
        compute in whole they draw the same.
        """
        if self.size == 1:
            yield
            return
        parted = count >= self.size
        for module in model.modules():
            if isinstance(module, SharedBatchNorm):
                module.parted = parted
        device = next(model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            own = zlib.crc32(f"step {step}, rank {self.place.rank if parted else 0}".encode())
            torch.manual_seed((torch.initial_seed() + own) % 2**63)
            yield

    def gather(self, value: Any, count: int) -> Any:
        """The whole batch's tensors from those of its parts (``collective.gather_rows``)."""
        if self.size == 1 or count < self.size:
            return value
        return collective.gather_rows(value, [part.stop - part.start for part in self._parts(count)])

    def average_gradients(self, model: nn.Module) -> None:
        if self.size > 1:
            collective.average_gradients(model.parameters())

    def agree(self, flag: bool, due: bool = True) -> bool:
        """Whether any process has raised its flag; of several they only ask each other when it is ``due``."""
        if self.size == 1:
            return flag
        return due and bool(collective.largest(int(flag)))

    def wait(self) -> None:
        """Go on when all have come here."""
        self.agree(False)

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """One process of each machine goes first, the others follow: a download is for all of them."""
        first = self.place.local_rank == 0
        if not first:
            self.wait()
        yield
        if first:
            self.wait()

    def tell(self, make: Callable[[], Any]) -> Any:
        """The plain value that the first process makes, for all."""
        value = make() if self.is_main else None
        return value if self.size == 1 else collective.broadcast_value(value)

    def collect(self, value: Any) -> list[Any] | None:
        """All processes' plain values in the first one, None in others."""
        return [value] if self.size == 1 else collective.collect_values(value)

    @contextlib.contextmanager
    def resumable(self, state: Callable[[], str]) -> Iterator[None]:
        """Where a process is lost within, or a stop that was asked for does not come about, end with ``state``.

        torchrun asks the others to stop when it finds one lost. A process that waits for a GPU that waits for the
        lost one runs no signal handler, so it is watched from beside.
        """
        if self.size == 1:
            yield
            return
        ended = threading.Event()
        told, tell = socket.socketpair()
        tell.setblocking(False)

        def watch() -> None:
            while kind := told.recv(1):
                if kind[0] in STOPS and not ended.wait(PATIENCE):
                    self.end(EXIT_LOST, f"error: not stopped in {PATIENCE:.0f} s (is {self.other} lost?): {state()}")

        threading.Thread(target=watch, daemon=True).start()
        fd = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
        # Handlers that do nothing: ``watch`` is not told of signals that are ignored.
        before = {kind: signal.signal(kind, lambda *_: None) for kind in STOPS}
        try:
            yield
        except ProcessLost as error:
            self.end(EXIT_LOST, f"error: {self.other} was lost ({error}): {state()}")
        finally:
            ended.set()
            for kind, handler in before.items():
                signal.signal(kind, handler)
            signal.set_wakeup_fd(fd)
            tell.close()

    @property
    def other(self) -> str:
        """Who must be meant when it is not this process."""
        return f"process {1 - self.place.rank}" if self.size == 2 else "another process"

    def end(self, code: int, line: str) -> NoReturn:
        """End at once, saying ``line`` unless another process has ended before, and then with that one's code.

        An orderly end would wait for processes that wait for this one.
        """
        own = f"{code} {self.place.rank}"
        try:
            first = self.store.compare_set("end", "", own).decode() if self.store else own
        except RuntimeError:
            # Gone with the process that kept it.
            first = own
        if first == own:
            # In one write, even where Python's output is not buffered: torchrun writes to the same place.
            err = sys.stderr if self.is_main else sys.__stderr__
            print(f"{line}\n", end="", file=err, flush=True)
        sys.stdout.flush()
        os._exit(int(first.split()[0]))


@contextlib.contextmanager
def join(device_name: str, exact: bool = False) -> Iterator[tuple[Team, torch.device]]:
    """Join the processes that torchrun started, if it did, and take a device: each process a GPU of its own.

    ``exact`` is for ``--deterministic``.
    """
    place = launched()
    if place.size == 1:
        with deterministic(exact):
            yield Team(), pick_device(device_name)
        return
    try:
        store, *_ = next(rendezvous("env://"))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot meet the other processes: {str(error).splitlines()[0]}") from error
    team = Team(place, store)
    try:
        with deterministic(exact):
            device = _own_device(device_name, place)
            # Plain values and decisions go from CPU to CPU.
            backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=TIMEOUT)
            yield team, device
        # Where one has ended, torchrun might end those that still write.
        team.wait()
    except UserError as error:
        team.end(EXIT_BAD_INPUT, error_line(error))
    except ProcessLost as error:
        team.end(EXIT_LOST, f"error: {team.other} was lost ({error}): start again")
    except KeyboardInterrupt:
        team.end(EXIT_INTERRUPTED, "interrupted")
    except Exception:
        team.end(1, traceback.format_exc())
    dist.destroy_process_group()


def _own_device(name: str, place: Place) -> torch.device:
    if name in ("auto", "cuda") and torch.cuda.is_available():
        if place.local_size > torch.cuda.device_count():
            raise UserError(
                f"{place.local_size} processes on this machine, but {torch.cuda.device_count()} GPUs: "
                f"lower --nproc-per-node"
            )
        torch.cuda.set_device(place.local_rank)
        return pick_device(f"cuda:{place.local_rank}")
    device = pick_device(name)
    if device.type != "cpu":
        raise UserError(f"--device {name} with {place.size} processes: give cuda, of which each takes its own, or cpu")
    return device
