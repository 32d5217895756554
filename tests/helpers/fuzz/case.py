"""One case of the fuzzing: its seed, its folder, and what has to come out of it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refusal import snapshot
from tiny import Outcome, quietly, strings

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.io.errors import UserError, error_line

RIGHT, REFUSED = "right", "refused"
#: Read although numbers in it were altered: only a checksum could tell.
ALTERED = "altered"
OUTCOMES = (RIGHT, REFUSED, ALTERED)


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


def read_or_refuse(read: Callable[[], Any], check: Callable[[Any], str | None]) -> str:
    """What a reader makes of a file: ``check`` fails, or names the outcome, if it reads it."""
    try:
        value = read()
    except UserError as error:
        line = error_line(error)
        if "\n" in line or not line.isprintable() or len(line) > 5000:
            raise Failure(f"no clear line: {line[:300]!r}") from error
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
        errors = [line for line in lines if line.startswith("error: ")]
        if (
            len(errors) != 1
            or lines[-1] != errors[0]
            or any(not line.startswith(("error: ", "warning: ")) for line in lines)
        ):
            raise Failure(f"no one line: {outcome.err[-500:]!r}")
        if not outcome.err.rstrip("\n").replace("\n", "").isprintable():
            raise Failure(f"control characters: {outcome.err[-500:]!r}")
        if snapshot(case.folder) != before:
            raise Failure(f"files changed by a refusal: {outcome.err[-300:]!r}")
    elif outcome.code not in codes:
        raise Failure(f"exit code {outcome.code}: {outcome.err[-500:]!r}")
    if leftovers := list(case.folder.rglob("*.tmp")):
        raise Failure(f"left over: {leftovers}")
    return outcome


def end(outcome: Outcome) -> str:
    return REFUSED if outcome.code == 2 else RIGHT


def require(condition: Any, what: str) -> None:
    if not condition:
        raise Failure(what)
