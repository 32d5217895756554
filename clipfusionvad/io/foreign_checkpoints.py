"""Tensors out of a torch file that holds foreign objects as well, none of which is created.

PyTorch Lightning's checkpoints pickle the classes of the project that wrote them, and TorchScript archives hold a
program, parts of which run as they are loaded. Here every name in such a pickle but those of tensors stands for an
inert object that swallows what it is given, so nothing of the file runs.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.torch_files import check_archive

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

# Numbers in a tensor that has more of them than its storage.
_MOST_REPEATED = 2**20


def read_lightning(path: str | Path) -> dict[str, Any] | None:
    """The content of a Lightning checkpoint with inert objects for whatever is not a tensor or a plain value.

    None where the file is another kind of torch file; ``UserError`` where it is damaged.
    """
    try:
        if not zipfile.is_zipfile(path):
            return None
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            program = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if program is None:
                return None
            content = _TensorUnpickler(archive, program).load()
    # A pickle is a program, so a damaged one can fail in every way that a program has.
    except Exception as error:
        raise UserError(f"model file {path} is not a readable torch file: {error}") from error
    is_lightning = isinstance(content, dict) and {"state_dict", "pytorch-lightning_version"} <= content.keys()
    return content if is_lightning else None


def is_torchscript(path: str | Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    # A damaged archive is told by who reads it.
    except Exception:
        return False


def read_torchscript(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive by the names of its state dict; ``UserError`` where it is damaged."""
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            program = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            return dict(_tensors(_TensorUnpickler(archive, program).load(), "", set()))
    # A pickle is a program, so a damaged one can fail in every way that a program has.
    except Exception as error:
        raise UserError(f"CLIP file {path} is a damaged TorchScript archive ({error}): download it again") from error


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a module and of the modules in it, each of them once, by its name with dots."""
    if id(module) in seen:
        return
    seen.add(id(module))
    for name, value in getattr(module, "content", {}).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _tensors(value, f"{prefix}{name}.", seen)


class _Inert:
    """Stands for any foreign class, function or object: takes every call and content, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.content = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    add = extend = append


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *ignored: Any
) -> Tensor:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # Strides of 0 could make a few numbers fill the memory.
    too_large = prod(size) > max(len(storage), _MOST_REPEATED)
    if offset < 0 or any(n < 0 for n in (*size, *stride)) or (0 not in size and last >= len(storage)) or too_large:
        raise ValueError(f"a tensor of shape {tuple(size)} does not fit its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset).clone()


def _rebuild_parameter(data: Tensor, *ignored: Any) -> Tensor:
    return data


_KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
} | {("torch", name): dtype for name, dtype in _DTYPES.items()}


# The one in C makes room for whatever place in its memory a pickle names: gigabytes, for a few bytes.
class _TensorUnpickler(pickle._Unpickler):
    """Unpickles the program of a torch archive; storages are read from the archive as they are named."""

    def __init__(self, archive: zipfile.ZipFile, program: str):
        super().__init__(io.BytesIO(archive.read(program)))
        self.archive, self.folder = archive, program.removesuffix("data.pkl") + "data/"

    def load(self) -> Any:
        # torch warns of what a damaged program does to tensors; the error that follows says enough.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().load()

    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN.get((module, name), _Inert)

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        if not isinstance(dtype, torch.dtype):
            raise ValueError("a storage of an unknown type")
        content = bytearray(self.archive.read(f"{self.folder}{key}"))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
