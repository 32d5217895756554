"""Model files of ours as safetensors: nothing in them can run, and every program that knows the format reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import must_exist
from clipfusionvad.io.torch_files import Damaged

SUFFIX = ".safetensors"
# The header's own words, and the one among them that holds, as JSON, all that a model file says besides its weights,
# and a hash over that and them. Of several the library would change the order from file to file.
_WORDS, _SAID, _HASH = "__metadata__", "clipfusionvad", "sha256"
#: The weights in what ``checkpoint.model_content`` gives.
WEIGHTS = "model_state_dict"


def pack_safetensors(content: Mapping[str, Any]) -> bytes:
    """What ``checkpoint.model_content`` gives, as the bytes of a file."""
    _, save = _library()
    weights = {key: value.contiguous() for key, value in content[WEIGHTS].items()}
    said = {key: value for key, value in content.items() if key != WEIGHTS}
    try:
        digest = _digest(said, save(weights))
        return save(weights, {_SAID: json.dumps({_HASH: digest, **said})})
    except (TypeError, ValueError) as error:
        raise UserError(f"what the model file says of itself cannot be written as JSON: {error}") from error


def read_safetensors(path: str | Path) -> dict[str, Any]:
    """What ``pack_safetensors`` was given, or the bare tensors of a file that others wrote.

    Raises ``Damaged`` for a file that is not whole, and where it is not what was written.
    """
    must_exist(path, "model file")
    return unpack_safetensors(Path(path).read_bytes(), path)


def unpack_safetensors(written: bytes, path: str | Path) -> dict[str, Any]:
    """``read_safetensors`` of a file's bytes; ``path`` names it in messages."""
    load, _ = _library()
    damaged = f"model file {path} is not a readable safetensors file: it is damaged or incomplete"
    try:
        # Refuses long headers, and tensors that overlap, leave gaps or end beyond the file.
        weights = load(written)
        words = _header(written).get(_WORDS) or {}
        if _SAID not in words:
            return weights
        said = json.loads(words[_SAID])
        if said.pop(_HASH) != _digest(said, written):
            raise Damaged(damaged)
        return {**said, WEIGHTS: weights}
    except (MemoryError, UserError):
        raise
    # The library has errors of its own for some damage, and Python's for other.
    except Exception as error:
        raise Damaged(damaged) from error


def _library() -> tuple[Any, Any]:
    try:
        from safetensors.torch import load, save
    except ImportError as error:
        raise UserError("safetensors files need a package that is not installed: pip install safetensors") from error
    return load, save


def _header(written: bytes) -> dict[str, Any]:
    return json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])


def _digest(said: Mapping[str, Any], written: bytes) -> str:
    """A hash over words and weights, the latter with their names, kinds and places."""
    places = {name: place for name, place in _header(written).items() if name != _WORDS}
    digest = hashlib.sha256(json.dumps([said, places], sort_keys=True).encode())
    digest.update(memoryview(written)[8 + int.from_bytes(written[:8], "little") :])
    return digest.hexdigest()
