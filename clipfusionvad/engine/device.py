"""Where and in what precision a model runs."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from clipfusionvad.io.errors import UserError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def pick_device(name: str) -> torch.device:
    """``auto`` takes the first GPU if there is one; anything that torch cannot use here is a ``UserError``.

    Also flushes denormals: saturated gates give gradients below 1e-38, which slow a CPU tens of times.
    """
    torch.set_flush_denormal(True)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            device = torch.device(name)
            torch.zeros(1, device=device).item()
    # Each kind of device fails in its own way.
    except Exception as error:
        usable = ["auto", "cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        usable += ["mps"] * torch.backends.mps.is_available()
        # What torch says of other devices is about its operators.
        reason = f" ({str(error).splitlines()[0].split('. ')[0]})" if name.startswith("cuda") else ""
        raise UserError(f"--device {name} cannot be used here{reason}: give one of {', '.join(usable)}") from error
    return device


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within, if ``wanted``, torch only uses operations that give the same bits every time; before CUDA starts.

    An operation that has no such form is a ``UserError``.
    """
    if not wanted:
        yield
        return
    # cuBLAS reads it when it starts; other sizes let its streams share memory, and then results vary.
    workspace = os.environ.setdefault(_WORKSPACE, ":4096:8")
    if workspace not in (":4096:8", ":16:8"):
        raise UserError(f"--deterministic needs {_WORKSPACE}=:4096:8 or :16:8, but it is set to {workspace!r}")
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "determinis" not in str(error):
            raise
        said = next(line for line in str(error).splitlines() if "determinis" in line).split(". ")[0]
        raise UserError(f"--deterministic: {said}; go without it, or with --device cpu") from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast for ``precision`` "bf16", nothing for "fp32"."""
    return contextlib.nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=torch.bfloat16)


def compile_model(model: nn.Module, mode: str | None) -> None:
    """Have ``torch.compile`` make a model's forward pass when it is first run, in one of its modes, if one is given."""
    if mode:
        model.compile(mode=mode)
