"""Torch files and other zip archives from anywhere: nothing in them is run, and what is damaged is told."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import must_exist

# Read at a time when a file is checked.
_PIECE = 2**22
# Bytes of code in a TorchScript file; OpenAI's CLIP has less than a hundredth.
_MOST_CODE = 2**26
# What compressed entries may grow to, in sizes of the file; weights are not compressed.
_MOST_GROWTH = 10


class ForeignObjects(UserError):
    """The file pickles objects of classes that only its author's code has."""


class Damaged(UserError):
    """The file is not what was written."""


def read_torch(path: str | Path, what: str) -> Any:
    """Load a torch file on the CPU without running pickled code; ``what`` names it in messages.

    Raises ``Damaged`` where a byte that counts is not what was written, as far as the file has checksums (those of
    torch's older format have none), and for a file that would take more memory than it has bytes.
    """
    must_exist(path, what)
    damaged = f"{what} {path} is not a readable torch file: it is damaged or incomplete"
    try:
        with open(path, "rb") as file:
            start = file.read(2)
            if start not in (b"PK", b"\x80\x02"):
                raise Damaged(damaged)
            if start == b"PK":
                check_archive(path)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ForeignObjects(
            f"{what} {path} holds more than tensors and plain values, so loading it could run foreign code; refused"
        ) from error
    except UserError:
        raise
    # A pickle is a program, so a damaged one can fail in every way that a program has.
    except Exception as error:
        raise Damaged(damaged) from error


def check_archive(path: str | Path) -> None:
    """Raise ``ValueError`` unless every entry of a zip that torch wrote is whole, which torch itself does not ask.

    torch compresses nothing but TorchScript's code, so what unpacks to more than that is refused before it is unpacked.
    """
    try:
        size = os.path.getsize(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_sizes(entries, size)
            for entry in entries:
                with archive.open(entry) as content:
                    # torch can be told to write without checksums; then they are zero.
                    while entry.CRC and content.read(_PIECE):
                        pass
    except (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _check_sizes(entries: Sequence[zipfile.ZipInfo], size: int) -> None:
    stored = [entry for entry in entries if entry.compress_type == zipfile.ZIP_STORED]
    packed = [entry for entry in entries if entry.compress_type == zipfile.ZIP_DEFLATED]
    if len(stored) + len(packed) < len(entries) or len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("entries that torch does not write")
    if any(entry.file_size != entry.compress_size for entry in stored):
        raise ValueError("two sizes of one entry")
    most_code = min(_MOST_CODE, _MOST_GROWTH * size)
    if sum(entry.file_size for entry in stored) > size or sum(entry.file_size for entry in packed) > most_code:
        raise ValueError("entries larger than the file")


def refuse_bomb(path: str | Path, share: float) -> None:
    """Raise ``ValueError`` for a zip archive that would grow to more than ``share`` times its size."""
    path = Path(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > share * path.stat().st_size:
            raise ValueError(f"{path} would grow to {size} bytes")


def is_plain_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor of real numbers, each with its place in memory: no sparse, quantised or endless one."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return not value.is_complex() and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
