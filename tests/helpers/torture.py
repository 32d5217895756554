"""Kill the programs at random moments until they are done, check every file after each kill, compare the results.

    python tests/helpers/torture.py --kills 200 --seed 1

Each command is started again and again with the same arguments and killed (SIGKILL) at a random moment. After every
kill each file must be complete or have the name of a temporary file. At the end no temporary file may be left, and the
results must equal those of an undisturbed run bit for bit. To test another command, add it to ``commands``.
"""

import argparse
import csv
import json
import os
import random
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from made_videos import write_video
from PIL import Image
from tiny import METHOD_FLAGS, make_tiny, package_main, quietly, strings
from warm import warm_context

from clipfusionvad.data.packed import open_store
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import write_text
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.io.npy import read_array

# These record when, where and in how many attempts a result was made.
OWN = {"environment.json", "options.yaml", "report.html", "manifest.jsonl", "done.json", "train.log"}
EXACT = {".csv", ".json", ".jsonl", ".npy"}
#: Returns the arguments of the program that start a command in a folder, or resume it there.
Start = Callable[[Path], list[str]]


@dataclass
class Tally:
    """What happened to a command: kills, complete runs, and everything that was wrong."""

    name: str
    kills: int = 0
    ends: int = 0
    failures: list[str] = field(default_factory=list)


def commands(data: Path) -> dict[str, Start]:
    """All commands under test by name, on data that is generated here."""
    tiny = make_tiny("ucf", data / "tiny")
    (data / "videos").mkdir()
    for name, frames in {"a": 40, "b": 170, "c": 33}.items():
        write_video(data / "videos" / f"{name}.mp4", frames, size=(160, 120))
    plan = {"cells": {"bare": {"gam": False}}, "grid": {"visual_layers": [1, 2]}}
    (data / "plan.yaml").write_text(yaml.safe_dump(plan))
    first, *_ = METHOD_FLAGS

    def train(*more: object, method: str = first) -> Start:
        flags = ["--use-checkpoint", "--eval-every", 6, "--max-epoch", 3, *more]
        return lambda work: ["train", "--dataset", "ucf", *tiny.of(method).at(work).train_flags(*flags)]

    def pack(work: Path) -> list[str]:
        return ["pack", "--dataset", "ucf", *tiny.at(work).train_flags("--output", work / "packed")]

    extract = strings(["extract", "--videos", data / "videos", "--clip=toy", "--embed-dim=64", "--device=cpu"])
    sweep = strings(["sweep", data / "plan.yaml", "--dataset", "ucf", "--seeds", 1])
    assert quietly(package_main, pack(data)).code == 0
    return {
        "extract": lambda work: [*extract, "--output", str(work / "features")],
        "pack": pack,
        **{f"train {method}": train(method=method) for method in METHOD_FLAGS},
        "train packed": train("--packed-dir", data / "packed"),
        "train --seeds": train("--seeds", 3, 5),
        "sweep": lambda work: sweep + tiny.at(work).train_flags("--max-epoch", 1, "--output-dir", work / "sweep"),
    }


def torture(name: str, start: Start, folder: Path, kills: int, seed: int) -> Tally:
    """Kill a command ``kills`` times, each time at a random moment, then let it finish."""
    tally, rng = Tally(name), random.Random(f"{seed} {name}")
    whole, work = (folder / name.replace(" ", "_") / part for part in ("whole", "killed"))
    code, err, longest = _run(start, whole, None)
    if code != 0:
        tally.failures.append(f"undisturbed: exit code {code}: {err}")
        return tally
    while True:
        code, err, seconds = _run(start, work, rng.uniform(0, longest) if tally.kills < kills else None)
        tally.failures += [f"after {tally.kills} kills: {line}" for line in incomplete_files(work)]
        if code is None:
            tally.kills += 1
            continue
        tally.ends, longest = tally.ends + 1, min(longest, seconds)
        wrong = [f"exit code {code}: {err}"] if code else differences(whole, work)
        tally.failures += [f"at the end, after {tally.kills} kills: {line}" for line in wrong]
        if tally.kills >= kills or wrong:
            break
        shutil.rmtree(work)
    print(f"{name:22} {tally.kills:4} kills {tally.ends:4} ends {len(tally.failures):3} failures", flush=True)
    return tally


def _run(start: Start, work: Path, kill_after: float | None) -> tuple[int | None, str, float]:
    """Run a command; return its exit code (None if it was killed), its errors, and the seconds it took."""
    work.mkdir(parents=True, exist_ok=True)
    outcome = work.with_suffix(".txt")
    outcome.unlink(missing_ok=True)
    began = time.perf_counter()
    # It has imported everything, so that a kill meets the program at work.
    process = warm_context().Process(target=_child, args=(start(work), str(outcome)))
    process.start()
    process.join(kill_after)
    killed = process.is_alive()
    process.kill()
    process.join()
    seconds = time.perf_counter() - began
    if outcome.is_file():
        # It may have finished just before the kill; multiprocessing can also lose an exit code.
        code, _, err = outcome.read_text().partition("\n")
        return int(code), err, seconds
    return None if killed else process.exitcode, "", seconds


def _child(argv: list[str], path: str) -> None:
    outcome = quietly(package_main, argv)
    write_text(path, f"{outcome.code}\n{outcome.err}")


def incomplete_files(work: Path) -> list[str]:
    """Name the files of a folder that cannot be read, apart from temporary ones."""
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


def _complete_lines(path: Path) -> list[str]:
    """Lines of a record that grows: the last one may be incomplete."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _check(whole: bool) -> None:
    if not whole:
        raise ValueError("incomplete")


_READ: dict[str, Callable[[Path], object]] = {
    ".pt": lambda path: read_checkpoint(path, "state"),
    ".pth": lambda path: read_checkpoint(path, "model"),
    ".npy": lambda path: read_array(path, "array"),
    ".npz": lambda path: dict(np.load(path)),
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": lambda path: [json.loads(line) for line in _complete_lines(path)],
    ".csv": lambda path: _check(len({len(row) for row in csv.reader(_complete_lines(path))}) <= 1),
    ".yaml": lambda path: yaml.safe_load(path.read_text()),
    ".png": lambda path: Image.open(path).load(),
    ".html": lambda path: _check(path.read_text().rstrip().endswith("</html>")),
}


def differences(whole: Path, work: Path) -> list[str]:
    """Name files that only one folder has, temporary files, and results that are not equal."""
    names = [{path.relative_to(folder) for path in folder.rglob("*") if _is_result(path)} for folder in (whole, work)]
    wrong = [f"{name} is in one folder only" for name in sorted(names[0] ^ names[1])]
    wrong += [f"{path.relative_to(work)} is left" for path in work.rglob(".*")]
    for name in sorted(names[0] & names[1]):
        if name.suffix in (".pt", ".pth"):
            same = _equal(*(torch.load(folder / name, weights_only=True) for folder in (whole, work)))
        else:
            same = name.suffix not in EXACT or (whole / name).read_bytes() == (work / name).read_bytes()
        wrong += [] if same else [f"{name} differs"]
    return wrong


def _is_result(path: Path) -> bool:
    return path.is_file() and path.name not in OWN and not path.name.startswith((".", "events."))


def _equal(one: object, other: object) -> bool:
    """Whether two contents of checkpoints are equal, except for the folder of the run."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one if key != "run")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def torture_all(chosen: dict[str, Start], folder: Path, kills: int, seed: int) -> list[Tally]:
    """Share the kills among commands, two commands at a time."""
    # The first process waits for all imports.
    first = warm_context().Process(target=os.getpid)
    first.start()
    first.join()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda name: torture(name, chosen[name], folder, -(-kills // len(chosen)), seed), chosen))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="of all commands together, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default="", help="commands whose names contain this")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "data").mkdir()
        chosen = {name: start for name, start in commands(Path(place) / "data").items() if args.only in name}
        tallies = torture_all(chosen, Path(place), args.kills, args.seed)
    failures = [f"{tally.name}: {failure}" for tally in tallies for failure in tally.failures]
    kills, ends = sum(tally.kills for tally in tallies), sum(tally.ends for tally in tallies)
    print(*failures, f"{kills} kills, {ends} complete runs, {len(failures)} failures", sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
