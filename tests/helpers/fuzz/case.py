"""One case of the fuzzing: its seed, its folder, and what has to come out of it."""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refusal import snapshot
from tiny import Outcome, Tiny, quietly, strings

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.io.errors import UserError, error_line

RIGHT, REFUSED = "right", "refused"
#: Read although numbers in it were altered: only a checksum could tell.
ALTERED = "altered"
OUTCOMES = (RIGHT, REFUSED, ALTERED)


#: Flags of a command that encodes videos, on the CPU.
TOY_ENCODER = ["--clip", "toy", "--embed-dim", 64, "--device", "cpu", "--crops", 1]


class Failure(Exception):
    """What came out is neither a right answer nor a good refusal."""


@dataclass(frozen=True)
class Case:
    """``rng`` decides all of the case, ``folder`` is empty and its own, ``seeds`` holds valid files of every kind."""

    rng: random.Random
    folder: Path
    seeds: Path

    def put(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))
        return path

    def copy(self, name: str, to: str | None = None) -> Path:
        """A file or folder of the seeds as the case's own."""
        source, target = self.seeds / name, self.folder / (to or name)
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path((shutil.copytree if source.is_dir() else shutil.copyfile)(source, target))

    def run(self, *words: Any, **more: Any) -> str:
        """The outcome of a command."""
        return RIGHT if run_command(self, words, **more).code != 2 else REFUSED

    def test_flags(self, method: str, *flags: Any) -> list[str]:
        """Arguments of a test of ``model.pth`` in the case's folder on the small dataset."""
        home = self.seeds / "data" / "ucf"
        return [
            "--dataset",
            "ucf",
            *Tiny("ucf", home, self.folder, [], method).test_flags("--feature-root", home, *flags),
        ]


def read_or_refuse(read: Callable[[], Any], check: Callable[[Any], str | None]) -> str:
    """What a reader makes of a file: ``check`` fails, or names the outcome, if it reads it."""
    try:
        value = read()
    except UserError as error:
        line = error_line(error)
        require(line.isprintable() and len(line) <= 5000, f"no clear line: {line[:300]!r}")
        return REFUSED
    return check(value) or RIGHT


def run_command(
    case: Case, argv: Sequence[Any], main: Callable[[list[str]], Any] = package_main, codes: Sequence[int] = (0,)
) -> Outcome:
    """Run a command in this process; fails unless it ends as commands have to. ``codes`` are those of success."""
    before = snapshot(case.folder)
    outcome = quietly(main, strings(argv))
    lines = outcome.err.splitlines()
    if outcome.code == 2:
        marks = [line.partition(" ")[0] for line in lines]
        require(marks == ["warning:"] * (len(lines) - 1) + ["error:"], f"no one line: {outcome.err[-500:]!r}")
        require("".join(lines).isprintable(), f"control characters: {outcome.err[-500:]!r}")
        require(snapshot(case.folder) == before, f"files changed by a refusal: {outcome.err[-300:]!r}")
    else:
        require(outcome.code in codes, f"exit code {outcome.code}: {outcome.err[-500:]!r}")
    leftovers = list(case.folder.rglob("*.tmp"))
    require(not leftovers, f"left over: {leftovers}")
    return outcome


def require(condition: Any, what: str) -> None:
    if not condition:
        raise Failure(what)
