"""Several trainings side by side in one process, each with the numbers that it would have alone."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clipfusionvad.engine.trainer import Trainer, stop_on_signals

#: How much of the free memory further trainings may fill; what evaluations take is not known when they start.
MEMORY_SHARE = 0.8


class Lane:
    """What a training has to itself in a process: torch's random numbers and, on a GPU, a stream.

    On streams of their own, small kernels of several trainings run at the same time. What shares memory that it
    writes to, as CUDA graphs do, must not: then ``own_stream`` is False.
    """

    def __init__(self, device: torch.device, own_stream: bool = True):
        self._gpus = [device] if device.type == "cuda" else []
        self._stream = torch.cuda.Stream(device) if self._gpus and own_stream else None
        self._states: list[Tensor] = []

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Within, random numbers go on where this lane left off; outside, nothing has been drawn."""
        with torch.random.fork_rng(self._gpus), torch.cuda.stream(self._stream):
            if self._states:
                torch.set_rng_state(self._states[0])
                for gpu, state in zip(self._gpus, self._states[1:], strict=True):
                    torch.cuda.set_rng_state(state, gpu)
            yield
            self._states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._gpus)]


@dataclass
class Member:
    """A training ready to go in its folder, all of whose work is done in its lane; ``finish`` follows its last step."""

    trainer: Trainer
    folder: Path
    lane: Lane
    finish: Callable[[], object]

    def step(self) -> bool:
        """Make a step; False where none was left."""
        with self.lane.taken():
            return next(self._steps, StopIteration) is None

    def end(self) -> None:
        with self.lane.taken():
            self.finish()

    @cached_property
    def _steps(self) -> Iterator[None]:
        return self.trainer.steps(self.folder)


def fit_together(members: Iterator[Member], total: int, stop: threading.Event, device: torch.device) -> None:
    """Train ``total`` members or fewer, a step each in turn, as many at once as there is memory for.

    The others wait in the iterator. ``stop`` is the ``stop`` of all their trainers. Once a signal has set it, each
    of those at work makes at most one more step and saves its state; then ``Stopped`` is raised. An error of one
    has the others stop in the same way before it is raised.
    """
    running: deque[Member] = deque()
    room, before = 0, _memory_held(device)
    with stop_on_signals(stop):
        try:
            while True:
                running.extend(islice(members, max(room, 1) - len(running)))
                if not running:
                    return
                if running[0].step():
                    room = room or _find_room(total, before, device)
                    running.rotate(-1)
                else:
                    running.popleft().end()
        except Exception:
            stop.set()
            # What ended the first is told; where another cannot save now, its last state is still there.
            for member in running:
                with contextlib.suppress(Exception):
                    member.step()
            raise


def share_frozen(model: nn.Module, kept: dict[str, Tensor]) -> None:
    """Let ``model`` use the frozen weights in ``kept`` in place of equal ones of its own; add those not kept yet.

    Afterwards nothing may change them.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            shared = kept.setdefault(name, parameter.data)
            if shared is not parameter.data and torch.equal(shared, parameter.data):
                parameter.data = shared
    if torch.cuda.is_initialized():
        # Other streams are going to read them.
        torch.cuda.synchronize()


def _find_room(total: int, before: int, device: torch.device) -> int:
    """How many trainings fit at once, by what the first one holds after a step; all where that cannot be told."""
    room, free = total, _memory_free(device)
    if free is not None:
        each = max(_memory_held(device) - before, 1)
        room = min(total, 1 + int(MEMORY_SHARE * free / each))
    tqdm.write(f"memory for {room} of {total} seeds at once")
    return room


def _memory_held(device: torch.device) -> int:
    """Bytes that this process holds on the device; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _memory_free(device: torch.device) -> int | None:
    """Bytes that more trainings could take; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        known = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return 1024 * int(known.group(1)) if known else None
