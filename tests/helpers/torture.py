"""Kill the programs at random moments until they are done, look at every file in between, compare the end.

    python tests/helpers/torture.py --kills 200 --seed 1

Each command is started again and again with the same words and killed (SIGKILL) after a random part of the time that
it takes. After every kill all files that it has written must be whole, or have the name of a file being written; at
the end none of the latter may be left, and the results must be those of a run that nothing disturbed, to the last bit.
A further command is a further entry of ``commands``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from made_videos import write_video
from PIL import Image
from tiny import METHOD_FLAGS, make_tiny, package_main, quietly, strings

from clipfusionvad.data.packed.store import open_store
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import write_text
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.io.npy import read_array

ROOT = Path(__file__).resolve().parents[2]
# What differs between two runs of one command: when, where and in how many goes it was made.
OWN = {"environment.json", "options.yaml", "report.html", "manifest.jsonl", "done.json", "train.log"}
EXACT = {".csv", ".json", ".jsonl", ".npy"}
AT_ONCE = 2


@dataclass(frozen=True)
class Command:
    """``argv`` makes the words, after ``python -m clipfusionvad``, that start it in a folder and let it go on there."""

    name: str
    argv: Callable[[Path], list[str]]


@dataclass
class Tally:
    """What became of a command: how often it was killed, how often it came to its end, and what was wrong then."""

    name: str
    kills: int = 0
    ends: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def commands(data: Path) -> list[Command]:
    """All that is tortured, on data that is made here."""
    tiny = make_tiny("ucf", data / "tiny")
    (data / "videos").mkdir()
    for name, frames in {"a": 40, "b": 170, "c": 33}.items():
        write_video(data / "videos" / f"{name}.mp4", frames, size=(160, 120))

    def train(method: str, *more: object) -> Callable[[Path], list[str]]:
        flags = ["--use-checkpoint", "--eval-every", 6, "--max-epoch", 3, *more]
        return lambda work: strings(["train", "--dataset", "ucf"], tiny.of(method).at(work).train_flags(*flags))

    def pack(work: Path) -> list[str]:
        return strings(["pack", "--dataset", "ucf"], tiny.at(work).train_flags("--output", work / "packed"))

    def extract(work: Path) -> list[str]:
        toy = ["--clip", "toy", "--embed-dim", "64", "--device", "cpu"]
        return strings(["extract", "--videos", data / "videos", "--output", work / "features", *toy])

    plan = {"cells": {"bare": {"gam": False}}, "grid": {"visual_layers": [1, 2]}}
    (data / "plan.yaml").write_text(yaml.safe_dump(plan))

    def sweep(work: Path) -> list[str]:
        flags = tiny.at(work).train_flags("--max-epoch", 1, "--output-dir", work / "sweep")
        return strings(["sweep", data / "plan.yaml", "--dataset", "ucf", "--seeds", 1], flags)

    assert quietly(package_main, pack(data)).code == 0
    first = next(iter(METHOD_FLAGS))
    return [
        Command("extract", extract),
        Command("pack", pack),
        *(Command(f"train {method}", train(method)) for method in METHOD_FLAGS),
        Command("train packed", train(first, "--packed-dir", data / "packed")),
        Command("train --seeds", train(first, "--seeds", 3, 5)),
        Command("sweep", sweep),
    ]


def torture(command: Command, folder: Path, kills: int, seed: int) -> Tally:
    """Kill a command so many times, each time at a random moment, and let it come to its end."""
    tally, rng, start = Tally(command.name), random.Random(f"{seed} {command.name}"), time.perf_counter()
    whole, work = folder / command.name.replace(" ", "_") / "whole", folder / command.name.replace(" ", "_") / "killed"
    end = _run(command, whole, None)
    if end.code != 0:
        tally.failures.append(f"undisturbed: exit code {end.code}: {end.said}")
        return tally
    longest = end.seconds
    while True:
        end = _run(command, work, rng.uniform(0, longest) if tally.kills < kills else None)
        tally.failures += [f"after {tally.kills} kills: {line}" for line in _unwhole(work)]
        if end.code is None:
            tally.kills += 1
            continue
        tally.ends, longest = tally.ends + 1, min(longest, end.seconds)
        wrong = [f"exit code {end.code}: {end.said}"] if end.code else _differences(whole, work)
        tally.failures += [f"at the end, after {tally.kills} kills: {line}" for line in wrong]
        if tally.kills >= kills or wrong:
            break
        shutil.rmtree(work)
    tally.seconds = time.perf_counter() - start
    print(
        f"{tally.name:22} {tally.kills:4} kills {tally.ends:4} ends {len(tally.failures):3} failures "
        f"{tally.seconds:5.0f} s, {longest:.1f} s undisturbed",
        flush=True,
    )
    return tally


@dataclass(frozen=True)
class _End:
    """How a process ended: ``code`` None if it was killed."""

    code: int | None
    said: str
    seconds: float


def _run(command: Command, work: Path, kill_after: float | None) -> _End:
    """Run a command in a process that has imported everything before."""
    work.mkdir(parents=True, exist_ok=True)
    said = work.with_suffix(".txt")
    said.unlink(missing_ok=True)
    start = time.perf_counter()
    process = _start(_child, command.argv(work), str(said))
    process.join(kill_after)
    killed = process.is_alive()
    process.kill()
    process.join()
    seconds = time.perf_counter() - start
    if said.is_file():
        # Its own word counts: it may have come to its end while it was killed, or multiprocessing lost its exit code.
        code, _, text = said.read_text().partition("\n")
        return _End(int(code), text, seconds)
    return _End(None if killed else process.exitcode, "", seconds)


def _start(target: Callable[..., object], *arguments: object) -> multiprocessing.Process:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded", "__main__"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def _child(argv: list[str], said: str) -> None:
    outcome = quietly(package_main, argv)
    write_text(said, f"{outcome.code}\n{outcome.err}")


def _unwhole(work: Path) -> list[str]:
    """What is wrong with the files of a folder, but for those that were being written."""
    wrong = []
    for path in sorted(work.rglob("*")):
        if any(part.endswith(".tmp") for part in path.relative_to(work).parts):
            continue
        try:
            if path.suffix == ".pack":
                open_store(path).check_data()
            elif path.is_file():
                _READ.get(path.suffix, Path.read_bytes)(path)
        except (UserError, ValueError, OSError, SyntaxError, yaml.YAMLError, zipfile.BadZipFile) as error:
            wrong.append(f"{path.relative_to(work)}: {error}")
    return wrong


def _read_lines(path: Path) -> None:
    """Records that grow; the last line may be under way."""
    for line in _whole_lines(path):
        json.loads(line)


def _read_table(path: Path) -> None:
    rows = list(csv.reader(io.StringIO("".join(_whole_lines(path)))))
    if len({len(row) for row in rows}) > 1:
        raise ValueError("rows of several lengths")


def _whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _read_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if bad := archive.testzip():
            raise ValueError(f"{bad} is damaged")


def _read_picture(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def _read_page(path: Path) -> None:
    if not path.read_text().rstrip().endswith("</html>"):
        raise ValueError("half a page")


_READ: dict[str, Callable[[Path], object]] = {
    ".pt": lambda path: read_checkpoint(path, "state"),
    ".pth": lambda path: read_checkpoint(path, "model"),
    ".npy": lambda path: read_array(path, "array"),
    ".npz": _read_zip,
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": _read_lines,
    ".csv": _read_table,
    ".yaml": lambda path: yaml.safe_load(path.read_text()),
    ".png": _read_picture,
    ".html": _read_page,
}


def _differences(whole: Path, work: Path) -> list[str]:
    """Files that only one of two folders has, and those that are not the same in both."""
    names = [{path.relative_to(folder) for path in folder.rglob("*") if _is_result(path)} for folder in (whole, work)]
    wrong = [f"{name} is there in one only" for name in sorted(names[0] ^ names[1])]
    wrong += [f"{path.relative_to(work)} is left" for path in work.rglob(".*")]
    for name in sorted(names[0] & names[1]):
        if name.suffix in (".pt", ".pth"):
            one, other = (torch.load(folder / name, weights_only=True) for folder in (whole, work))
            same = _equal(one, other, {"run"})
        else:
            same = name.suffix not in EXACT or (whole / name).read_bytes() == (work / name).read_bytes()
        wrong += [] if same else [f"{name} is another one"]
    return wrong


def _is_result(path: Path) -> bool:
    return path.is_file() and path.name not in OWN and not path.name.startswith((".", "events."))


def _equal(one: object, other: object, but: set[str] = frozenset()) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one if key not in but)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def torture_all(chosen: Sequence[Command], folder: Path, kills: int, seed: int) -> list[Tally]:
    """Share so many kills among commands, two at a time."""
    share = -(-kills // len(chosen))
    # The first process waits for all imports.
    _start(os.getpid).join()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda command: torture(command, folder, share, seed), chosen))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="of all commands together, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", help="commands whose names hold this")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "data").mkdir()
        chosen = [command for command in commands(Path(place) / "data") if (args.only or "") in command.name]
        tallies = torture_all(chosen, Path(place), args.kills, args.seed)
    for line in (f"{tally.name}: {failure}" for tally in tallies for failure in tally.failures):
        print(line)
    kills, ends = sum(tally.kills for tally in tallies), sum(tally.ends for tally in tallies)
    print(f"{kills} kills, {ends} runs that came to their end, {sum(len(t.failures) for t in tallies)} failures")
    return int(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
