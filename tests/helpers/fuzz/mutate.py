"""Mutations of files and of nested values, drawn from a seeded generator; none knows what a file is for."""

import contextlib
import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

ODD_NUMBERS = [0, -1, 1, 2, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30]
ODD_NUMBERS += [0.5, 1e308, 1e-308, float("nan"), float("inf"), float("-inf")]
ODD_TEXTS = ["", " ", "\t", "a\nb", "\x1b[2J", "none", "nan", "-1", "1e400", "9" * 5000, "x" * 300, "x" * 5000]
ODD_TEXTS += ["../..", "/etc/passwd", "..", ".", "~", "a/../../b", "C:\\x", "http://[::1", "a,b", '"', "'", "a\x00b"]
ODD_TEXTS += ["<script>alert(1)</script>", "{{7*7}}", "%s%n", "é\u202e漢", "$(touch pwned)"]
ODD_VALUES = [None, True, False, [], {}, [1], ["a", 2], {"a": 1}, [[[]]], {"a": {"b": []}}, [None]]
# Pieces that are inserted into files: too deep for a parser, or YAML that means more than it shows.
BOMBS = ["[" * 200_000, '{"a":' * 50_000, "[" * 400 + "]" * 400, "lr: 1\nlr: 2\n", "a: &a {lr: 1}\n<<: *a\n"]
BOMBS += ["? [lr, 2]\n: 3\n", "lr: &a [*a]\n", "&a lr: *a\n", "lr: !!binary abc\n", "lr: !!set {a}\n", "lr: 1:30:30\n"]
BOMBS += ["lr: !!omap [a: 1]\n", "lr: 2001-01-01\n", "lr: !!python/name:os.system\n", "%YAML 9.9\n---\nlr: 1\n"]
BOMBS += ['output_dir: "a\\0b"\n', "lr: 1\n---\nlr: 2\n", "\ufefflr: 1e-4\n", "lr: 1\u2028seed: 2"]
DTYPES = ["<f2", "<f4", "<f8", ">f4", ">f2", "<i4", "|u1", "<f16", "|b1", "<c8", "<U3", "|V4", "<M8[s]", "|S3", "O"]
SHAPES = [(3, 64), (1, 1), (0, 64), (64,), (2, 3, 4), (), (3, 0), (10**12, 64), (2**63, 2), (2, 2**62), (-1, -192)]


def mutate(path: Path, rng: random.Random) -> bytes:
    """Return the content of a file with some bytes, or a part of the value that it holds, changed."""
    content = path.read_bytes()
    kind = rng.random()
    if kind < 0.5:
        # What numpy, YAML or torch cannot read or write is damaged below.
        with contextlib.suppress(Exception):
            suffix = ".pth" if path.suffix in (".pt", ".ckpt", ".bin") else path.suffix
            value = READ[suffix](content)
            for _ in range(rng.choice([1, 1, 3])):
                value = disturb(value, rng)
            return WRITE[suffix](value, rng)
    if kind < 0.8 and zipfile.is_zipfile(io.BytesIO(content)):
        return _damage_archive(content, rng)
    return damage(content, rng)


def damage(content: bytes, rng: random.Random) -> bytes:
    """Make one to four random changes of bytes."""
    for _ in range(rng.choice([1, 1, 1, 2, 2, 4])):
        at, size = _place(len(content), rng), rng.choice([1, 1, 3, 20, 200, 500])
        after, piece = content[at:], content[at : at + size]
        # A number of 1, 2, 4 or 8 bytes, as sizes in headers are.
        number = bytes([rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])]) * rng.choice([1, 2, 4, 8])
        word = rng.choice(BOMBS if rng.random() < 0.2 else ODD_TEXTS)
        tails = {
            "truncated": b"",
            "flipped": bytes([byte ^ 1 << rng.randrange(8) for byte in piece]) + after[size:],
            "overwritten": number + after[len(number) :],
            "inserted": rng.randbytes(rng.choice([1, 3, 40])) + after,
            "removed": after[size:],
            "doubled": piece + after,
            "spliced": content[_place(len(content), rng) :],
            "a word": word.encode() + after,
        }
        content = content[:at] + tails[rng.choice(list(tails))]
    return content


def _place(size: int, rng: random.Random) -> int:
    """Headers and tails, where formats keep their structure, are hit as often as all of the rest."""
    near = rng.randrange(min(size, 200) + 1)
    return rng.choice([near, near, size - near, rng.randrange(size + 1), rng.randrange(size + 1)])


def _damage_archive(content: bytes, rng: random.Random) -> bytes:
    """Damage or drop one member of a zip file; the checksums are right again."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new:
        members = {name: old.read(name) for name in old.namelist()}
        # The program (data.pkl) as often as all the numbers.
        chosen = rng.choice([list(members)[0], rng.choice(list(members))])
        members[chosen] = damage(members[chosen], rng)
        if rng.random() < 0.1:
            del members[chosen]
        for name, member in members.items():
            new.writestr(name, member)
    return file.getvalue()


def odd_value(rng: random.Random) -> Any:
    """Return a plain value that nobody expects."""
    return rng.choice(rng.choice([ODD_NUMBERS, ODD_TEXTS, ODD_VALUES]))


def disturb(value: Any, rng: random.Random) -> Any:
    """Return a copy of nested values with one part changed, dropped, doubled or renamed; also JSON within a text."""
    kind = rng.random()
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        rest = {name: item for name, item in value.items() if name != key}
        if kind < 0.15:
            return rest
        if kind < 0.25:
            return rest | {rng.choice(["x", "clipmodel.x", "", "é", 3, None]): value[key]}
        return value | {key: disturb(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        part = [] if kind < 0.15 else [value[at]] * 2 if kind < 0.25 else [disturb(value[at], rng)]
        return value[:at] + part + value[at + 1 :]
    if isinstance(value, str) and value[:1] == "{" and rng.random() < 0.9:
        return json.dumps(disturb(json.loads(value), rng))
    if isinstance(value, np.ndarray) and rng.random() < 0.9:
        return _odd_array(value, rng)
    if isinstance(value, torch.Tensor) and rng.random() < 0.9:
        return _odd_tensor(value, rng)
    return odd_value(rng)


def _odd_array(array: np.ndarray, rng: random.Random) -> np.ndarray:
    if array.dtype == object or array.ndim == 0:
        return np.array(disturb(array.tolist(), rng), dtype=object if array.ndim else None)
    if array.size and rng.random() < 0.5:
        changed = array.copy()
        odd = [0, -1, 1, 10**6, 10**12, 2**62, 0.5] + ([np.nan, np.inf, 1e30] if array.dtype.kind == "f" else [])
        changed.flat[rng.randrange(array.size)] = rng.choice(odd) if array.dtype.kind in "if" else "</script>\n"
        return changed
    dtype = rng.choice(DTYPES)
    changes = [array[None], array[:-1], array[..., :0], array.flatten(), np.asfortranarray(array), array * 2, -array]
    return rng.choice([*changes, *[np.zeros(3, dtype) if dtype[1:2] in "VMS" else array.astype(dtype)] * 4])


def _odd_tensor(value: torch.Tensor, rng: random.Random) -> Any:
    """Return one of other type, value, shape or layout; torch refuses some of these for some tensors."""
    first, number = value.flatten()[:1], value.float()
    dtype = rng.choice([torch.double, torch.complex64, torch.half, torch.bool, torch.long])
    changes = [number * torch.nan, number * torch.inf, number * 1e38, value[None], value.flatten(), value.to(dtype)]
    if rng.random() < 0.5:
        return rng.choice(changes)
    changes = [value.to_sparse(), first.expand(2**40), first.expand(value.shape), value.to("meta"), torch.empty(0)]
    changes += [torch.quantize_per_tensor(number, 0.1, 0, torch.qint8), torch.tensor(1.0)]
    return rng.choice([*changes, "text", None])


def _joined(separator: str, rows: Any) -> bytes:
    lines = [separator.join(map(str, row)) if isinstance(row, list) else str(row) for row in rows]
    return "\n".join(lines).encode("utf-8", "replace")


def _saved(save: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def _array_file(array: np.ndarray, rng: random.Random) -> bytes:
    """Return a .npy file; the shape in its header is a lie at times."""
    if array.dtype == object or rng.random() < 0.8:
        return _saved(lambda file: np.save(file, array, allow_pickle=True))
    header = {"descr": array.dtype.str, "fortran_order": rng.random() < 0.3, "shape": rng.choice(SHAPES)}
    return _saved(lambda file: np.lib.format.write_array_header_2_0(file, header)) + array.tobytes()


def _header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


#: How a file becomes nested values, arrays and tensors, by its suffix.
READ: dict[str, Callable[[bytes], Any]] = {
    ".json": json.loads,
    ".jsonl": lambda content: [json.loads(line) for line in content.splitlines()],
    ".yaml": yaml.safe_load,
    ".csv": lambda content: [line.split(",") for line in content.decode().splitlines()],
    ".txt": lambda content: [line.split(" ") for line in content.decode().splitlines()],
    ".npy": lambda content: np.load(io.BytesIO(content), allow_pickle=True),
    ".npz": lambda content: dict(np.load(io.BytesIO(content))),
    ".safetensors": lambda content: [json.loads(content[8 : _header_size(content)]), content[_header_size(content) :]],
    ".pth": lambda content: torch.load(io.BytesIO(content), weights_only=True),
}
WRITE: dict[str, Callable[[Any, random.Random], bytes]] = {
    ".json": lambda value, _: json.dumps(value).encode(),
    ".jsonl": lambda value, _: "\n".join(map(json.dumps, value)).encode(),
    ".yaml": lambda value, rng: yaml.safe_dump(value, default_flow_style=rng.choice([True, False, None])).encode(),
    ".csv": lambda value, _: _joined(",", value),
    ".txt": lambda value, _: _joined(" ", value),
    ".npy": _array_file,
    ".npz": lambda value, _: _saved(lambda file: np.savez(file, **{str(key): value[key] for key in value})),
    ".safetensors": lambda value, _: len(head := json.dumps(value[0]).encode()).to_bytes(8, "little") + head + value[1],
    ".pth": lambda value, _: _saved(lambda file: torch.save(value, file)),
}
