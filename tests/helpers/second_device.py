"""A device "elsewhere" that stands in for a GPU where there is none, and a program that runs commands on it.

    python tests/helpers/second_device.py '[["train", "--dataset", "ucf", "--device", "elsewhere"]]'

The CPU computes for it, so that numbers can be compared. But as with a GPU, a tensor there mixes with none on the CPU,
and a value from there has to be waited for, which is counted. For a process of its own: torch cannot forget a device.

With TEST_DEVICE=cuda in the environment, commands run on a GPU. It would draw other random numbers than the CPU: the
CPU draws for both, and attention is not fused, so that its dropout is drawn too. Convolutions are those of float32.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections import Counter

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from clipfusionvad.__main__ import main as run
from clipfusionvad.cli import training
from clipfusionvad.engine.trainer import Trainer

NAME = "elsewhere"
DEVICE = os.environ.get("TEST_DEVICE", NAME)
aten = torch.ops.aten
#: What cannot go on before the device has caught up.
WAITS = {aten._local_scalar_dense.default: "reads a number", aten.nonzero.default: "asks how many are not zero"}
# Torch itself takes an index to where it is needed.
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}

waits: Counter[str] = Counter()


class Elsewhere(torch.Tensor):
    """A tensor on the device; ``held`` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        strides, device = held.stride(), torch.device(NAME, 0)
        # Where a view is made in inference mode, torch wants a tensor of the ordinary kind.
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls, held.size(), strides, held.storage_offset(), dtype=held.dtype, device=device
            )
        made.held = held
        return made

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.detach().cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # In inference mode they come in one piece.
        if (done := operation.decompose(*args, **kwargs)) is not NotImplemented:
            return done
        if operation in WAITS:
            waits[WAITS[operation]] += 1
        if operation is aten.copy_.default:
            return cls._copy(*args)
        if operation is aten._to_copy.default:
            return cls._moved(*args, **kwargs)
        if operation not in INDEXING:
            _refuse_strangers(operation, args, kwargs)
        elif any(isinstance(value, torch.Tensor) and value.dtype == torch.bool for value in tree_leaves(args[1])):
            waits["asks how many a mask takes"] += 1
        here = {name: "cpu" if name == "device" else value for name, value in kwargs.items()}
        done = operation(*tree_map(_held, args), **tree_map(_held, here))
        wrapped = tree_map(lambda value: cls(value) if isinstance(value, torch.Tensor) else value, done)
        return return_and_correct_aliasing(operation, args, kwargs, wrapped)

    @classmethod
    def _copy(cls, target, source, non_blocking=False):
        if not isinstance(target, cls):
            waits["copies to the CPU"] += 1
        elif not (isinstance(source, cls) or non_blocking):
            waits["copies from the CPU"] += 1
        _held(target).copy_(_held(source))
        return target

    @classmethod
    def _moved(cls, source, device=None, **kwargs):
        done = aten._to_copy(source.held, **kwargs)
        if device is None or device.type == NAME:
            return cls(done)
        waits["copies to the CPU"] += 1
        return done


def _held(value):
    return value.held if isinstance(value, Elsewhere) else value


def _refuse_strangers(operation, args, kwargs):
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, torch.Tensor) and not isinstance(value, Elsewhere) and value.dim():
            raise RuntimeError(f"{operation} takes {tuple(value.shape)} from the CPU beside what is {NAME}")


def register() -> torch.library.Library:
    """Make the device known to torch, for as long as the result lives."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")

    def empty(size, *, dtype=None, **kwargs):
        return Elsewhere(torch.empty(size, dtype=dtype))

    def empty_strided(size, stride, *, dtype=None, **kwargs):
        return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))

    def copy(source, target, non_blocking=False):
        return Elsewhere._copy(target, source, non_blocking)

    library.impl("_copy_from", copy, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    return library


class DrawOnCPU(TorchDispatchMode):
    """Within, the CPU draws the random numbers of operations on a GPU: dropout, noise, weights."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = _device_of(args, kwargs)
        if torch.Tag.nondeterministic_seeded not in operation.tags or device.type in ("cpu", "meta"):
            return operation(*args, **kwargs)
        with sync_warnings("default"):
            drawn = operation(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
            moved = tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, drawn)
            return args[0].copy_(moved) if operation._schema.is_mutable else moved


def _device_of(args, kwargs):
    """The device that an operation works on."""
    values = [kwargs.get("device"), *tree_leaves((args, kwargs))]
    known = (value.device if isinstance(value, torch.Tensor) else value for value in values)
    return next((value for value in known if isinstance(value, torch.device)), torch.device("cpu"))


def _on_cpu(value):
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.cpu() if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def sync_warnings(mode):
    """Within, what waits for a GPU gives a warning, or with "default" none."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def count_waits_of_steps() -> Counter[str]:
    """What training steps are going to wait for, filled in as they do; but for the first, which may look around."""
    of_steps: Counter[str] = Counter()
    step = Trainer._step

    def counted(self, *args):
        before = waits.copy()
        with warnings.catch_warnings(record=True) as warned, sync_warnings("warn"):
            warnings.simplefilter("always")
            losses = step(self, *args)
        if self.progress.step:
            of_steps.update(waits - before)
            of_steps.update(str(one.message) for one in warned if "synchroniz" in str(one.message))
        return losses

    Trainer._step = counted
    return of_steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Pictures take longer than all the rest.
    training.draw_score_curves = training.draw_training = lambda *args: None
    torch.backends.cudnn.allow_tf32 = False
    with contextlib.ExitStack() as stack:
        if DEVICE == NAME:
            library = register()
        else:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(DrawOnCPU())
        of_steps = count_waits_of_steps()
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        codes = [run(command) for command in json.loads(sys.argv[1])]
    print(json.dumps({"codes": codes, "waits": of_steps}))
