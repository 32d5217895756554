"""Ray's workers as a test meets them: whether there is Ray at all, and which process works on what."""

import contextlib
import importlib.util
import os
from pathlib import Path

import pytest

WITHOUT = importlib.util.find_spec("ray") is None
needs_ray = pytest.mark.skipif(WITHOUT, reason="Ray is not installed (pip install ray)")
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds workers in /proc")


def working_processes(task):
    """Process numbers of this process's Ray workers that are at a task, by its name."""
    parents, working = {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number = int(stat.parent.name)
            parents[number] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            if (stat.parent / "cmdline").read_bytes().startswith(f"ray::{task}".encode()):
                working.append(number)

    def ours(number):
        while number in parents and number != os.getpid():
            number = parents[number]
        return number == os.getpid()

    return [number for number in working if ours(number)]
