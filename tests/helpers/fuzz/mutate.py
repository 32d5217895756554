"""Damage to bytes and to nested values, drawn from a seeded generator."""

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
        content = _change(content, rng, rng.choice(others) if others else content)
    return content


def _change(content: bytes, rng: random.Random, other: bytes) -> bytes:
    at, size = _place(content, rng), rng.choice([1, 3, 20, 200, 500])
    after, piece = content[at:], content[at : at + size]
    # A number of 1, 2, 4 or 8 bytes, as sizes in headers are.
    number = bytes([rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])]) * rng.choice([1, 2, 4, 8])
    tails = {
        "truncated": b"",
        "flipped": bytes([byte ^ 1 << rng.randrange(8) for byte in piece]) + after[size:],
        "one bit": bytes([byte ^ 1 << rng.randrange(8) for byte in piece[:1]]) + after[1:],
        "overwritten": number + after[len(number) :],
        "inserted": rng.randbytes(rng.choice([1, 3, 40])) + after,
        "removed": after[size:],
        "doubled": piece + after,
        "zeroed": bytes(len(piece)) + after[size:],
        "spliced": other[_place(other, rng) :],
        "a word": rng.choice(ODD_TEXTS).encode() + after,
    }
    return content[:at] + tails[rng.choice(list(tails))]


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
    """A zip file whose one member is damaged or missing, its checksum being right again."""
    found = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(found, "w", zipfile.ZIP_STORED) as new:
        members = {name: old.read(name) for name in old.namelist()}
        # The small members are the programs, the large ones the numbers.
        programs = [name for name in members if name.endswith(".pkl")]
        chosen = rng.choice(programs if programs and rng.random() < 0.7 else list(members))
        members[chosen] = damage(members[chosen], rng)
        if rng.random() < 0.1:
            del members[chosen]
        for name, member in members.items():
            new.writestr(name, member)
    return found.getvalue()
