"""Read checkpoints from anywhere (torch, Lightning, TorchScript, safetensors) as tensors and plain values.

No code from a file runs. torch's weights-only loader reads torch files; numpy numbers and arrays in them are data.
Lightning checkpoints also pickle classes of the project that wrote them, and TorchScript archives hold a program: an
inert object replaces each of those. safetensors files that this package writes carry their other values as JSON.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_unpacked_size, must_exist
from clipfusionvad.io.hub import local_path
from clipfusionvad.io.npy import NUMPY_NAMES, RestrictedUnpickler

# torch is imported where it is used: commands that only may read a checkpoint start without it.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

SAFETENSORS = ".safetensors"
# Whose a file with this suffix is.
_OTHER_LIBRARIES = {".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".gguf": "llama.cpp"}
_LFS_POINTER = b"version https://git-lfs"
# Packages whose objects hold the settings of a training.
_SETTINGS = {"addict", "argparse", "collections", "copyreg", "datetime", "easydict", "mmengine", "omegaconf", "pathlib"}
_SETTINGS |= {"types", "yacs"}
# Keys under which people save a state dict.
_WRAPPERS = "model_state_dict state_dict model_state model network net module weights params checkpoint".split()
#: The key of the weights in our own checkpoints (``engine.checkpoint.model_content``).
WEIGHTS = "model_state_dict"
# In a safetensors header: the metadata, our entry in it (JSON), and the hash over that entry and the weights.
# One entry only: the library does not keep the order of several.
_METADATA, _ENTRY, _HASH = "__metadata__", "clipfusionvad", "sha256"


class Damaged(UserError):
    """The file is not what was written."""


def read_checkpoint(path: str | Path, what: str) -> Any:
    """Return the content of a checkpoint on the CPU as tensors and plain values; ``what`` names it in messages.

    A TorchScript archive gives its state dict. Raises ``Damaged`` where a checksum fails (torch's older format has
    none) and ``UserError`` where a file holds more than tensors and plain values, other than objects of Lightning and
    those that hold settings, which are not built.
    """
    path = local_path(path)
    must_exist(path, what)
    suffix = path.suffix.lower()
    if suffix in _OTHER_LIBRARIES:
        raise UserError(f"{what} {path} is a file of {_OTHER_LIBRARIES[suffix]}: give one of torch or safetensors")
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise UserError(f"{what} {path} is only a pointer of Git LFS: run 'git lfs pull' in its folder")
        if suffix == SAFETENSORS:
            return unpack_safetensors(Path(path).read_bytes(), path, what)
        start = start[:2]
        if start not in (b"PK", b"\x80\x02"):
            raise ValueError("neither a zip archive nor a pickle")
        with warnings.catch_warnings():
            # torch warns about old storages, and about what a damaged pickle does to tensors.
            warnings.simplefilter("ignore")
            if start == b"PK" and any(name.endswith("/constants.pkl") for name in _checked_entries(path)):
                return dict(_tensors(_read_archive(path)[0], "", set()))
            return _read_torch(path, what)
    except (MemoryError, UserError):
        raise
    # A pickle is a program: a damaged one can raise any error.
    except Exception as error:
        raise Damaged(f"{what} {path} is not a readable torch file: it is damaged or incomplete") from error


def _read_torch(path: str | Path, what: str) -> Any:
    import torch

    safe: list[Any] = [(value, ".".join(name)) for name, value in NUMPY_NAMES.items()]
    try:
        with torch.serialization.safe_globals(safe):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        content, foreign = _read_archive(path)
        other = min((name for name in foreign if name.partition(".")[0] not in _SETTINGS), default="")
        if _holds_weights(content) and (not other or "pytorch-lightning_version" in content):
            return content
        raise UserError(
            f"{what} {path} holds more than tensors and plain values{other and f' ({other[:80]})'}, so loading it "
            f"could run foreign code; refused"
        ) from error


def _checked_entries(path: str | Path) -> list[str]:
    """Return the names in a zip archive; an error unless every entry is whole, which torch does not check."""
    # torch compresses only the code of TorchScript, so its archives hardly grow.
    check_unpacked_size(path, 10)
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as content:
                # A file written without checksums has zeros there.
                while entry.CRC and content.read(2**22):
                    pass
        return archive.namelist()


def _read_archive(path: str | Path) -> tuple[Any, set[str]]:
    """Return the content of a torch archive and the names of its foreign classes, whose objects are ``_Inert``."""
    if not zipfile.is_zipfile(path):
        return None, set()
    with zipfile.ZipFile(path) as archive:
        program = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if program is None:
            return None, set()
        unpickler = _ArchiveUnpickler(archive, program)
        return unpickler.load(), unpickler.foreign


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a module and its submodules once, with its dotted name."""
    import torch

    if id(module) in seen:
        return
    seen.add(id(module))
    for name, value in getattr(module, "content", {}).items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _tensors(value, f"{prefix}{name}.", seen)


class _Inert:
    """Replaces any foreign class, function or object: accepts every call and content, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    __setitem__ = append = add = extend = __call__

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.content = state


def _rebuild_tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *ignored: Any) -> Tensor:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # Strides of 0 could let a few numbers fill the memory.
    too_large = prod(size) > max(len(storage), 2**20)
    if offset < 0 or any(n < 0 for n in (*size, *stride)) or (0 not in size and last >= len(storage)) or too_large:
        raise ValueError(f"a tensor of shape {tuple(size)} does not fit its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset).clone()


class _ArchiveUnpickler(RestrictedUnpickler):
    """Unpickles the program of a torch archive; reads storages as the program names them."""

    names = {
        **RestrictedUnpickler.names,
        ("collections", "OrderedDict"): OrderedDict,
        **{
            (module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (dict, float, int, list)
        },
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *ignored: tensor,
    }

    def __init__(self, archive: zipfile.ZipFile, program: str):
        super().__init__(io.BytesIO(archive.read(program)))
        self.archive, self.folder = archive, program.removesuffix("data.pkl") + "data/"
        self.foreign: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name).dtype
        if (module, name) not in self.names:
            self.foreign.add(f"{module}.{name}")
        return self.names.get((module, name), _Inert)

    def persistent_load(self, pid: Any) -> Tensor:
        import torch

        _, dtype, key, _, _ = pid
        content = bytearray(self.archive.read(f"{self.folder}{key}"))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def find_state_dict(content: Any, path: str | Path, what: str) -> dict[str, Tensor]:
    """Return the state dict in what ``read_checkpoint`` gave, out of wrappers such as {"model": …}; arrays as tensors.

    A dict under an unknown key is used if it is the only one that holds weights. Raises ``UserError`` if the content
    lacks a state dict or holds several, or if one of its values is not a tensor of real numbers.
    """
    import torch

    state = content
    while isinstance(state, dict) and (inner := {key: state[key] for key in state if _holds_weights(state[key])}):
        wrapper = next((key for key in _WRAPPERS if key in inner), None)
        if wrapper is None and any(is_plain_tensor(value) for value in state.values()):
            break
        if wrapper is None and len(inner) > 1:
            raise UserError(f"{what} {path} holds several state dicts: save one of {', '.join(map(str, inner))}")
        state = state[wrapper or next(iter(inner))]
    names = [key for key in state if isinstance(key, str)] if isinstance(state, dict) else []
    if not names or len(names) < len(state) or not _holds_weights(state):
        found = f": its keys are {', '.join(names[:8])}" if names else f": it is a {type(state).__name__}"
        raise UserError(f"{what} {path} holds no state dict{found}")
    arrays = {key: value.astype(value.dtype.newbyteorder("=")) for key, value in state.items() if _is_array(value)}
    state = state | {key: torch.from_numpy(array) for key, array in arrays.items()}
    odd = next((key for key, value in state.items() if not is_plain_tensor(value)), None)
    if odd is not None:
        raise UserError(f"{what} {path} holds no state dict of tensors: {odd} is not a tensor of plain numbers")
    return state


def _holds_weights(value: Any, depth: int = 4) -> bool:
    """Return whether a value is a dict by names that holds tensors or arrays, or such dicts, ``depth`` levels down."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return False
    parts = value.values()
    return any(
        is_plain_tensor(part) or _is_array(part) or (depth and _holds_weights(part, depth - 1)) for part in parts
    )


def _is_array(value: Any) -> bool:
    """Return whether a value is an array of numbers that torch has, too."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.itemsize <= 8


def without_prefix(state: Mapping[str, Tensor], fits: Callable[[Mapping[str, Tensor]], bool]) -> dict[str, Tensor]:
    """Return a state dict without the words that all of its keys begin with, as many as it takes until it ``fits``.

    ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile, also within keys) and names of attributes are such words.
    Where it never fits, it is returned as it is.
    """
    shorter = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while not fits(shorter):
        if len({key.partition(".")[0] for key in shorter}) != 1 or not all("." in key for key in shorter):
            return dict(state)
        shorter = {key.partition(".")[2]: value for key, value in shorter.items()}
    return shorter


def is_plain_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    """Return whether a value is a dense tensor of real numbers that owns the memory of each of them."""
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return not value.is_complex() and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def pack_safetensors(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of a safetensors file for what ``engine.checkpoint.model_content`` gives."""
    _, save = _safetensors()
    weights = {key: value.contiguous() for key, value in content[WEIGHTS].items()}
    values = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in content.items()}
    del values[WEIGHTS]
    try:
        digest = _digest(values, save(weights))
        return save(weights, {_ENTRY: json.dumps({_HASH: digest, **values})})
    except (TypeError, ValueError) as error:
        raise UserError(f"the values beside the weights cannot be written as JSON: {error}") from error


def unpack_safetensors(written: bytes, path: str | Path, what: str = "model file") -> dict[str, Any]:
    """Return what ``pack_safetensors`` was given, or the tensors of another's file; ``path`` is for messages."""
    load, _ = _safetensors()
    try:
        # Refuses long headers, and tensors that overlap, leave gaps or end beyond the file.
        weights = load(written)
        metadata = _header(written).get(_METADATA) or {}
        if _ENTRY not in metadata:
            return weights
        values = json.loads(metadata[_ENTRY])
        if values.pop(_HASH) != _digest(values, written):
            raise ValueError("another hash")
        return {**values, WEIGHTS: weights}
    except MemoryError:
        raise
    # The library raises errors of its own for some damage, and Python's for other.
    except Exception as error:
        raise Damaged(f"{what} {path} is not a readable safetensors file: it is damaged or incomplete") from error


def _safetensors() -> tuple[Any, Any]:
    try:
        from safetensors.torch import load, save
    except ImportError as error:
        raise UserError("safetensors files need a package that is not installed: pip install safetensors") from error
    return load, save


def _header(written: bytes) -> dict[str, Any]:
    return json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])


def _digest(values: Mapping[str, Any], written: bytes) -> str:
    """Return a SHA-256 over the values and over the weights with their names, dtypes and places."""
    places = {name: place for name, place in _header(written).items() if name != _METADATA}
    digest = hashlib.sha256(json.dumps([values, places], sort_keys=True).encode())
    digest.update(memoryview(written)[8 + int.from_bytes(written[:8], "little") :])
    return digest.hexdigest()
