"""What a check finds, and how checks are run: a check is a function of a subject, its name is that of the function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar

from clipfusionvad.io.errors import UserError

#: The result is wrong, or the program will fail; somebody should look at this; good to know.
ERROR, WARNING, NOTE = LEVELS = ("error", "warning", "note")
# Lines of one check and level that are printed; a mistake made once is often in every row.
SHOWN = 8

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Finding:
    """One thing found: how bad, what it is, in which file and row of it, and what to do."""

    level: str
    what: str
    file: str = ""
    row: int | None = None
    advice: str = ""
    check: str = ""

    def __str__(self) -> str:
        place = f"{self.file}, row {self.row}: " if self.row else f"{self.file}: " if self.file else ""
        text = f"{place}{self.what}" + (f"; {self.advice}" if self.advice else "")
        return f"{self.level:7}  {self.check}: {' '.join(text.split())}"


Check = Callable[[Subject], Iterable[Finding]]


def name_of(check: Callable[..., Any]) -> str:
    return check.__name__.replace("_", "-")


def describe(check: Callable[..., Any]) -> str:
    """The first paragraph of a check's docstring."""
    return " ".join((check.__doc__ or "").split("\n\n")[0].split())


def examine(checks: Sequence[Check[Subject]], subject: Subject) -> list[Finding]:
    """What all checks find; one that cannot go on for bad input has found just that."""
    return [replace(finding, check=name_of(check)) for check in checks for finding in _guarded(check, subject)]


def _guarded(check: Check[Subject], subject: Subject) -> Iterator[Finding]:
    try:
        yield from check(subject)
    except UserError as error:
        yield Finding(ERROR, str(error))


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """The findings, the worst first, those of a check beyond the first few counted only."""
    order = list(dict.fromkeys(finding.check for finding in findings))
    ranked = sorted(findings, key=lambda finding: (LEVELS.index(finding.level), order.index(finding.check)))
    for (level, check), group in groupby(ranked, key=lambda finding: (finding.level, finding.check)):
        alike = list(group)
        yield from map(str, alike[:SHOWN])
        if len(alike) > SHOWN:
            yield f"{level:7}  {check}: … and {len(alike) - SHOWN} more (--json FILE writes all)"
