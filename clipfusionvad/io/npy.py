"""Reading .npy files without running code that they may hold.

Released ground truth comes as object arrays, which numpy stores as a pickle: a program. Here such a program may only
name the few functions that numpy itself writes, and even those are stand-ins: they note what they are given, and the
array is then built from plain lists and bytes. numpy's own functions would trust a damaged pickle with raw memory.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import must_exist

# Items for each byte of a pickle; one that holds nothing twice has fewer items than bytes.
_LARGEST_SHARE = 16


def read_array(path: str | Path, what: str) -> np.ndarray:
    """Read a .npy file; ``what`` names it in messages. A file that would run code is a ``UserError``."""
    must_exist(path, what)
    try:
        with open(path, "rb") as file:
            shape, _, dtype = read_npy_header(file)
            if dtype.hasobject:
                return _read_objects(file, shape)
            present = os.fstat(file.fileno()).st_size - file.tell()
            if min(shape, default=0) < 0 or dtype.itemsize * math.prod(shape) > present:
                raise ValueError(f"shape {shape} {dtype} does not fit {present} bytes of data")
            file.seek(0)
            return np.load(file, allow_pickle=False)
    except _ForbiddenGlobal as error:
        raise UserError(f"{what} {path} would run foreign code ({error}); refused") from error
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{what} {path} is not a readable .npy file: {error}") from error


def read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an open .npy file; the file is left at the first data byte.

    A damaged header is a ``ValueError``.
    """
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"unsupported .npy format version {version}")
    try:
        with _PARSING:
            return read_header(file)
    except OSError:
        raise
    # numpy evaluates the header as Python text, so a damaged one can fail in every way that a parser has.
    except Exception as error:
        raise ValueError(f"damaged header: {error}") from error


# numpy reads headers with Python's own parser, which in CPython 3.11 now and then breaks if two threads use it.
_PARSING = threading.Lock()


def _read_objects(file: BinaryIO, shape: tuple[int, ...]) -> np.ndarray:
    try:
        size = os.fstat(file.fileno()).st_size
        array = _Builder(_LARGEST_SHARE * size).build(_ArrayUnpickler(file).load())
    except _ForbiddenGlobal:
        raise
    # A pickle is a program, so a damaged one can fail in every way that a program has.
    except Exception as error:
        raise ValueError(f"damaged pickle: {error}") from error
    if not isinstance(array, np.ndarray) or array.shape != shape:
        raise ValueError("the pickled value is not the array that the header announces")
    return array


class _ForbiddenGlobal(pickle.UnpicklingError):
    pass


class _DtypeNote:
    """Stands for ``numpy.dtype``; only numbers, text and objects are known."""

    def __init__(self, code: str, *flags: Any):
        if not re.fullmatch(r"[biufUO]\d*", code):
            raise ValueError(f"dtype {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">", "|") else "="

    def dtype(self) -> np.dtype:
        return np.dtype("O" if self.code.startswith("O") else self.order.replace("|", "=") + self.code)


class _ArrayNote:
    """Stands for an array under construction: shape, dtype and content are told by its state."""

    def __init__(self, *ignored: Any):
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self, builder: _Builder) -> np.ndarray:
        _, shape, dtype, fortran, content = self.state
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError(f"shape {shape!r}")
        if isinstance(content, list):
            if len(content) != math.prod(shape):
                raise ValueError(f"{len(content)} objects for shape {shape}")
            flat = np.empty(len(content), dtype=object)
            for index, item in enumerate(content):
                flat[index] = builder.build(item)
            # Objects are listed row by row, whatever the order in memory was.
            return flat.reshape(shape)
        return _from_bytes(content, dtype).reshape(shape, order="F" if fortran else "C")


def _from_bytes(content: Any, dtype: _DtypeNote) -> np.ndarray:
    if not isinstance(content, bytes | bytearray):
        raise ValueError("numbers without their bytes")
    return np.frombuffer(bytes(content), dtype=dtype.dtype())


def _scalar(dtype: _DtypeNote, content: bytes) -> Any:
    return _from_bytes(content, dtype)[0]


class _Builder:
    """Builds the noted arrays, wherever they stand in nested lists, up to so many items.

    Lists may hold one another many times over: a few bytes of pickle can stand for more than any memory.
    """

    def __init__(self, most: int):
        self.left = most

    def build(self, value: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("far more items than the file has bytes")
        if isinstance(value, _ArrayNote):
            return value.array(self)
        if isinstance(value, list | tuple):
            return type(value)(self.build(item) for item in value)
        return value


def _encode(text: str, encoding: str) -> bytes:
    """Stands for ``codecs.encode``, by which old pickles hold bytes."""
    if encoding != "latin1":
        raise ValueError(f"encoding {encoding!r}")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy", "ndarray"): _ArrayNote,
    ("numpy", "dtype"): _DtypeNote,
    ("_codecs", "encode"): _encode,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _STAND_INS[_module, "_reconstruct"] = _ArrayNote
    _STAND_INS[_module, "scalar"] = _scalar


# The one in C makes room for whatever place in its memory a pickle names: gigabytes, for a few bytes.
class _ArrayUnpickler(pickle._Unpickler):
    """Unpickles with the stand-ins and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise _ForbiddenGlobal(f"{module}.{name}")
        return _STAND_INS[module, name]
