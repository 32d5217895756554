"""Files that are shorter than they say: copies and recordings that were cut off."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067


def missing_bytes(path: str | Path) -> int:
    """Bytes that a file lacks by what its own outermost structure says; 0 where that is whole, or says nothing.

    Knows MP4 and QuickTime (boxes), AVI (RIFF) and Matroska with WebM (EBML); other containers, such as MPEG
    streams, may end anywhere.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        head = file.read(12)
        file.seek(0)
        if head[:4] == b"RIFF":
            end = 8 + int.from_bytes(head[4:8], "little")
        elif head[:4] == _EBML.to_bytes(4, "big"):
            end = _matroska_end(file)
        elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            end = _boxes_end(file, size)
        else:
            end = size
    return max(0, end - size)


def _boxes_end(file: BinaryIO, size: int) -> int:
    """Where the last box that starts within the file ends; a last box without a size ends with the file."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1 and len(head) == 16:
            (length,) = struct.unpack(">Q", head[8:])
        if length < 8:
            return size
        position += length
    return position


def _matroska_end(file: BinaryIO) -> int:
    """Where the segment behind the header ends; 0 where that is unknown, as in a live recording."""
    position = 0
    for wanted in (_EBML, _SEGMENT):
        file.seek(position)
        head = file.read(12)
        if len(head) < 12 or int.from_bytes(head[:4], "big") != wanted or not head[4]:
            return 0
        width = 9 - head[4].bit_length()
        length = int.from_bytes(head[4 : 4 + width], "big") & ((1 << 7 * width) - 1)
        if length == (1 << 7 * width) - 1:
            return 0
        position += 4 + width + length
    return position
