"""Damage to bytes and to nested values, drawn from a seeded generator."""

from __future__ import annotations

import io
import random
import zipfile
from typing import Any

ODD_NUMBERS = [0, -1, 1, 2, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30]
ODD_NUMBERS += [0.5, 1e308, 1e-308]
ODD_FLOATS = [float("nan"), float("inf"), float("-inf")]
ODD_TEXTS = ["", " ", "\t", "a\nb", "\x1b[2J", "none", "nan", "-1", "1e400", "9" * 5000, "x" * 300, "x" * 5000]
ODD_TEXTS += ["../..", "/etc/passwd", "..", ".", "~", "a/../../b", "C:\\x", "http://[::1", "a,b", '"', "'"]
ODD_TEXTS += ["<script>alert(1)</script>", "{{7*7}}", "%s%n", "é\u202e漢", "$(touch pwned)"]


def damage(content: bytes, rng: random.Random, others: list[bytes] | None = None) -> bytes:
    """One to four random changes of a file; ``others`` are files that pieces are taken from."""
    for _ in range(rng.choice([1, 1, 1, 2, 2, 4])):
        content = rng.choice(_CHANGES)(content, rng, rng.choice(others) if others else content)
    return content


def _truncate(content: bytes, rng: random.Random, other: bytes) -> bytes:
    return content[: _place(content, rng)]


def _flip(content: bytes, rng: random.Random, other: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        if changed:
            changed[_place(content, rng) % len(changed)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(content: bytes, rng: random.Random, other: bytes) -> bytes:
    """A whole number of 1, 2, 4 or 8 bytes, as sizes in headers are."""
    size, at = rng.choice([1, 2, 4, 8]), _place(content, rng)
    value = rng.choice([0, 1, 0x7F, 0xFF]) if rng.random() < 0.5 else rng.randrange(256)
    return content[:at] + bytes([value]) * size + content[at + size :]


def _insert(content: bytes, rng: random.Random, other: bytes) -> bytes:
    at = _place(content, rng)
    return content[:at] + rng.randbytes(rng.choice([1, 3, 40])) + content[at:]


def _remove(content: bytes, rng: random.Random, other: bytes) -> bytes:
    start, size = _place(content, rng), rng.choice([1, 5, 200])
    return content[:start] + content[start + size :]


def _duplicate(content: bytes, rng: random.Random, other: bytes) -> bytes:
    start, size = _place(content, rng), rng.choice([1, 20, 500])
    return content[: start + size] + content[start:]


def _zero(content: bytes, rng: random.Random, other: bytes) -> bytes:
    start, size = _place(content, rng), rng.choice([1, 20, 500])
    return content[:start] + bytes(len(content[start : start + size])) + content[start + size :]


def _splice(content: bytes, rng: random.Random, other: bytes) -> bytes:
    return content[: _place(content, rng)] + other[_place(other, rng) :]


def _word(content: bytes, rng: random.Random, other: bytes) -> bytes:
    at = _place(content, rng)
    return content[:at] + rng.choice(ODD_TEXTS).encode() + content[at:]


_CHANGES = [_truncate, _flip, _flip, _overwrite, _insert, _remove, _duplicate, _zero, _splice, _word]


def _place(content: bytes, rng: random.Random) -> int:
    """Headers and tails, where formats keep their structure, are hit as often as all of the rest."""
    size, kind = len(content), rng.random()
    if kind < 0.35:
        return rng.randrange(min(size, 200) + 1)
    return size - rng.randrange(min(size, 200) + 1) if kind < 0.5 else rng.randrange(size + 1)


def odd_value(rng: random.Random) -> Any:
    """A plain value that nobody expects."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(ODD_NUMBERS)
    if kind < 0.4:
        return rng.choice(ODD_FLOATS)
    if kind < 0.7:
        return rng.choice(ODD_TEXTS)
    return rng.choice(
        [None, True, False, [], {}, [1], ["a", 2], {"a": 1}, [[[]]], {"a": {"b": []}}, [None], rng.random()]
    )


def disturb(value: Any, rng: random.Random) -> Any:
    """A copy of nested plain values with one part changed, dropped, doubled or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key, kind = rng.choice(list(value)), rng.random()
        rest = {name: item for name, item in value.items() if name != key}
        if kind < 0.15:
            return rest
        if kind < 0.25:
            return rest | {rng.choice(["x", "", "é", 3, None]): value[key]}
        return value | {key: disturb(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at, kind = rng.randrange(len(value)), rng.random()
        if kind < 0.15:
            return value[:at] + value[at + 1 :]
        if kind < 0.25:
            return value[:at] + [value[at]] + value[at:]
        return [*value[:at], disturb(value[at], rng), *value[at + 1 :]]
    return odd_value(rng)


def damage_archive(content: bytes, rng: random.Random) -> bytes:
    """A zip file whose one member is damaged, its checksum being right again."""
    found = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(found, "w", zipfile.ZIP_STORED) as new:
        names = old.namelist()
        # The small members are the programs, the large ones the numbers.
        chosen = (
            rng.choice(names)
            if rng.random() < 0.3
            else min(names, key=lambda n: (not n.endswith(".pkl"), rng.random()))
        )
        for name in names:
            member = old.read(name)
            if name == chosen:
                member = damage(member, rng)
                if rng.random() < 0.1:
                    continue
            new.writestr(name, member)
    return found.getvalue()
