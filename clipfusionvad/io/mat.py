"""Read MATLAB files of format 5 to 7.2: numbers, text, cells and structures.

scipy's reader crashes the process on damaged files.
"""

import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import must_exist

# Types of elements: numbers, and encodings of text.
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin1", 2: "latin1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_MATRIX, _COMPRESSED = 14, 15
# Classes of matrices; those from 6 to 15 are numbers.
_CELL, _STRUCT, _TEXT, _FIRST, _LAST = 1, 2, 4, 6, 15


def read_mat(path: str | Path, what: str) -> dict[str, Any]:
    """Return the variables of a .mat file by name; ``what`` names the file in messages.

    Text and numeric arrays stay what they are. A cell array becomes a list in MATLAB's order, a structure array a list
    of dicts, and any other type None.
    """
    must_exist(path, what)
    content = Path(path).read_bytes()
    if content.startswith(b"MATLAB 7.3"):
        raise UserError(f"{what} {path} is in MATLAB's format 7.3: save it with '-v7' in MATLAB")
    try:
        reader, variables = _Reader(content[128:], {b"IM": "<", b"MI": ">"}[content[126:128]]), {}
        while reader.at < len(reader.data):
            name, value = reader.matrix()
            variables[name] = value
        return variables
    # A damaged file can raise the errors of struct, zlib, numpy and decoding.
    except Exception as error:
        raise UserError(f"{what} {path} is damaged, or not of MATLAB's format 5 to 7.2") from error


class _Reader:
    """Reads elements of a byte order one after the other."""

    def __init__(self, data: bytes, order: str) -> None:
        self.data, self.order, self.at = data, order, 0

    def element(self) -> tuple[int, bytes]:
        """Return the type and the data of the next element."""
        kind, size = struct.unpack_from(f"{self.order}II", self.data, self.at)
        start = self.at + 8
        if kind >> 16:  # the size is in the upper half, up to four bytes of data in place of the size
            kind, size, start = kind & 0xFFFF, kind >> 16, self.at + 4
        end = start + size
        if end > len(self.data):
            raise ValueError("the file is truncated")
        self.at = end if kind == _COMPRESSED else end + -end % 8
        return kind, self.data[start:end]

    def numbers(self) -> np.ndarray:
        kind, data = self.element()
        return np.frombuffer(data, np.dtype(self.order + _NUMBERS[kind]))

    def text(self) -> str:
        kind, data = self.element()
        ending = {"<": "-le", ">": "-be"}[self.order] if _TEXTS[kind] in ("utf-16", "utf-32") else ""
        return data.decode(_TEXTS[kind] + ending)

    def matrix(self) -> tuple[str, Any]:
        """Return the name and the value of the next element, a matrix."""
        kind, data = self.element()
        if kind == _COMPRESSED:
            return _Reader(zlib.decompress(data), self.order).matrix()
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} in place of a matrix")
        if not data:
            return "", np.empty((0, 0))
        inner = _Reader(data, self.order)
        flags, shape, name = int(inner.numbers()[0]), inner.numbers().tolist(), inner.text()
        kind = flags & 0xFF
        value: Any = None
        if kind == _CELL:
            value = [inner.matrix()[1] for _ in range(math.prod(shape))]
        elif kind == _STRUCT:
            length = int(inner.numbers()[0])
            names = inner.element()[1]
            fields = [names[at : at + length].split(b"\0")[0].decode() for at in range(0, len(names), length)]
            # Without fields, a damaged shape would make any number of empty structures.
            count = math.prod(shape) if fields else 0
            value = [{field: inner.matrix()[1] for field in fields} for _ in range(count)]
        elif kind == _TEXT:
            value = inner.text()
        elif _FIRST <= kind <= _LAST:
            value = inner.numbers().reshape(shape, order="F")
        return name, value
