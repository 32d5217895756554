"""Processes as torchrun starts them, but from one that has imported everything: in tenths of a second, not tens."""

import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from warm import warm_context

ROOT = Path(__file__).resolve().parents[2]
WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate")


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def start(target, arguments, folder, size=2):
    """Start ``target(rank, *arguments)`` in ``size`` processes that print into files in ``folder``."""
    context = warm_context()
    # As torchrun's, it outlives the processes.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    places = [(rank, size, store.port, str(folder)) for rank in range(size)]
    processes = [context.Process(target=_member, args=(place, target, arguments)) for place in places]
    for process in processes:
        process.start()
        process.store = store
    return processes


def finish(processes, folder, timeout=300):
    """How they ended, by rank."""
    for process in processes:
        process.join(timeout)
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    said = [[Path(folder, f"{kind}{rank}").read_text() for kind in ("out", "err")] for rank in range(len(processes))]
    assert not late, f"processes {late} do not end: {said}"
    return [Ended(process.exitcode, *texts) for process, texts in zip(processes, said, strict=True)]


def run(target, arguments, folder, size=2):
    return finish(start(target, arguments, folder, size), folder)


def _member(place, target, arguments):
    rank, size, port, folder = place
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    # Of what this process starts in turn, as in any program.
    multiprocessing.set_start_method("fork", force=True)
    # Signals to a process and its children reach no others.
    os.setsid()
    for kind, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, f"{stream}{rank}"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), kind)
    sys.stdout, sys.stderr = (open(kind, "w", buffering=1, closefd=False) for kind in (1, 2))
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    sys.exit(target(rank, *arguments))


def forbid_writing():
    """From now on a file that this process opens to write, moves or removes is an error."""
    # Finds out by writing.
    tempfile.gettempdir()

    def allowed(path):
        # Devices, shared memory, and where loading processes meet theirs.
        return not isinstance(path, str) or path.startswith("/dev/") or "/pymp-" in path

    def hook(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            assert not writes or allowed(path), f"{path} is opened with {mode}"
        assert event not in WRITES or allowed(arguments[0]), f"{event}{arguments}"

    sys.addaudithook(hook)
