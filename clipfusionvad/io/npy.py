"""Read .npy files, and pickles of numpy values, without running code from the file.

Released ground truth comes as arrays of objects, which numpy stores as a pickle. The unpickler here knows only the
names that numpy writes, and builds dtypes and arrays itself: numpy's own functions trust a pickle with raw memory.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import must_exist


def read_array(path: str | Path, what: str) -> np.ndarray:
    """Return the array of a .npy file; ``what`` names it in messages. ``UserError`` for one that would run code."""
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
    except ForbiddenName as error:
        raise UserError(f"{what} {path} would run foreign code ({error}); refused") from error
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{what} {path} is not a readable .npy file: {error}") from error


# numpy parses headers with ``ast``, which in CPython 3.11 sometimes fails when two threads use it.
_PARSING = threading.Lock()


def read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, Fortran order and dtype of an open .npy file and leave it at the first data byte.

    Raises ``ValueError`` for a damaged header.
    """
    version, form = np.lib.format.read_magic(file), np.lib.format
    read = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"unsupported .npy format version {version}")
    try:
        with _PARSING:
            return read(file)
    except OSError:
        raise
    # numpy evaluates the header as Python text, so a damaged one can raise any of a parser's errors.
    except Exception as error:
        raise ValueError(f"damaged header: {error}") from error


class ForbiddenName(pickle.UnpicklingError):
    """A pickle names a class or function that is not in the list of known ones."""


class _Dtype:
    """Takes the place of ``numpy.dtype``: numbers, text and objects only."""

    def __init__(self, code: str, *flags: Any):
        if not re.fullmatch(r"[biufUO]\d*", code):
            raise ValueError(f"dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array as a pickle builds it: made empty, then filled with checked content."""

    def __new__(cls, *ignored: Any) -> _Array:
        return super().__new__(cls, (0,), np.int8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        if dtype.dtype.hasobject:
            if not isinstance(content, list) or len(content) != math.prod(shape):
                raise ValueError(f"shape {shape} does not fit the number of objects")
        elif not isinstance(content, bytes):
            raise ValueError("the bytes of its numbers are missing")
        super().__setstate__((1, shape, dtype.dtype, bool(fortran), content))  # type: ignore[arg-type]

    def __reduce__(self) -> Any:
        return np.asarray(self).__reduce__()


#: What the names that numpy writes into pickles stand for here.
NUMPY_NAMES: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    NUMPY_NAMES[_module, "_reconstruct"] = _Array
    NUMPY_NAMES[_module, "scalar"] = lambda dtype, content: np.frombuffer(content, dtype.dtype)[0]


# The unpickler written in C allocates gigabytes for a memo index that takes a few bytes of the file.
class RestrictedUnpickler(pickle._Unpickler):
    """An unpickler that raises ``ForbiddenName`` for every class and function that is not among its names."""

    # Old pickles hold bytes as encoded text.
    names: Mapping[tuple[str, str], Any] = NUMPY_NAMES | {("_codecs", "encode"): lambda text, _: text.encode("latin1")}
    # A bytearray takes the memory that it announces before it is read; no file of arrays or tensors has one.
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.names:
            raise ForbiddenName(f"{module}.{name}")
        return self.names[module, name]


def _read_objects(file: BinaryIO, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = RestrictedUnpickler(file).load()
    except ForbiddenName:
        raise
    # A pickle is a program: a damaged one can raise any error.
    except Exception as error:
        raise ValueError(f"damaged pickle: {error}") from error
    if not isinstance(array, np.ndarray) or array.shape != shape:
        raise ValueError("the pickled value is not the array that the header announces")
    return np.asarray(array)
