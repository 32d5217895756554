"""Damaged videos."""

from __future__ import annotations

import contextlib
import random

import numpy as np

from clipfusionvad.extraction.decode import read_frames
from fuzz.case import REFUSED, Case, end, read_or_refuse, require, run_command
from fuzz.mutate import damage


def _video(case: Case) -> tuple[str, bytes]:
    rng = case.rng
    path = rng.choice(sorted((case.seeds / "videos").iterdir()))
    content = path.read_bytes()
    kind = rng.random()
    if kind < 0.03:
        content = b""
    elif kind < 0.06:
        content = content[:64]
    elif kind < 0.3:
        content = _absurd(content, rng)
    else:
        others = [other.read_bytes() for other in (case.seeds / "videos").iterdir()]
        content = damage(content, rng, others)
    name = path.name if rng.random() < 0.9 else rng.choice(["x.mp4", "x.mkv", "x.flv", "x.y4m", "x.m3u8", "x.txt", "x"])
    return name, content


def _absurd(content: bytes, rng: random.Random) -> bytes:
    """Sizes, rates and counts in headers at their limits."""
    content = bytearray(content)
    marks = [*b"tkhd mvhd stsz stts stco avc1 mdhd strh avih strf trun".split(), b"\xb0\x82", b"\xe7"]
    found = [place for mark in marks if (place := bytes(content).find(mark)) >= 0]
    if found:
        place = rng.choice(found) + rng.randrange(4, 100)
        content[place : place + 4] = rng.choice(
            [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\x00\x00\x40\x00"]
        )
    return bytes(content)


def frames(case: Case) -> str:
    name, content = _video(case)
    path = case.put(name, content)

    def read() -> int:
        count = 0
        with contextlib.closing(read_frames(path)) as found:
            for frame in found:
                require(
                    frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 and frame.size, f"{frame.shape}"
                )
                count += 1
        return count

    return read_or_refuse(read, lambda count: require(count > 0, "no frame and no word of it"))


def extraction(case: Case) -> str:
    """The whole command: features of every frame that could be read to the end, or none."""
    name, content = _video(case)
    name = name if "." in name and not name.endswith(("txt", "m3u8")) else "x.mp4"
    path = case.put(name, content)
    flags = ["--clip", "toy", "--embed-dim", 64, "--device", "cpu", "--crops", 1]
    outcome = run_command(case, ["extract", "--videos", path, "--output", case.folder / "out", *flags], codes=(0, 1))
    made = list((case.folder / "out").rglob("*.npy"))
    require(len(made) == (outcome.code == 0), f"{made}")
    if outcome.code == 1:
        require(outcome.err.count("failed: ") == 1 and "Traceback" not in outcome.err, outcome.err)
        return REFUSED
    if made:
        require(np.isfinite(np.load(made[0])).all(), "not finite")
    return end(outcome)
