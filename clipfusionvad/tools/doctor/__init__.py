"""Checks for mistakes that raise no error: in the installation, in data, in runs.

A check is a public generator function of a module: what is checked → findings. Its name and docstring are printed.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from types import ModuleType
from typing import Any

from clipfusionvad.io.errors import UserError

#: The result is wrong, or the program will fail; worth a look; good to know.
ERROR, WARNING, NOTE = LEVELS = ("error", "warning", "note")
# Findings of one check and level that are printed; a mistake made once is often in every row.
SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """One finding: its level, what it is, what to do, and in which file and row."""

    level: str
    what: str
    advice: str = ""
    file: str = ""
    row: int | None = None
    check: str = ""

    def __str__(self) -> str:
        place = f"{self.file}, row {self.row}: " if self.row else f"{self.file}: " if self.file else ""
        text = f"{place}{self.what}" + (f"; {self.advice}" if self.advice else "")
        return f"{self.level:7}  {self.check}: {' '.join(text.split())}"


Check = Callable[[Any], Iterator[Finding]]


def checks_in(*modules: ModuleType) -> dict[str, Check]:
    """Return the checks that modules define, by name, in the order of their definition."""
    return {
        name.replace("_", "-"): function
        for module in modules
        for name, function in vars(module).items()
        if inspect.isgeneratorfunction(function) and function.__module__ == module.__name__ and name[0] != "_"
    }


def run_checks(checks: dict[str, Check], subject: Any) -> list[Finding]:
    """Return the findings of all checks; a check that cannot continue on bad input reports that as its finding."""
    findings = []
    for name, check in checks.items():
        try:
            for finding in check(subject):
                findings.append(replace(finding, check=name))
        except UserError as error:
            findings.append(Finding(ERROR, str(error), check=name))
    return findings


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield the findings as text, errors first; beyond the first few of a check, only their number."""
    order = list(dict.fromkeys(finding.check for finding in findings))
    ranked = sorted(findings, key=lambda finding: (LEVELS.index(finding.level), order.index(finding.check)))
    for (level, check), group in groupby(ranked, key=lambda finding: (finding.level, finding.check)):
        alike = list(group)
        yield from map(str, alike[:SHOWN])
        if len(alike) > SHOWN:
            yield f"{level:7}  {check}: … and {len(alike) - SHOWN} more (--json FILE writes all)"


def some(items: Iterable[object]) -> str:
    """Return the first few items as text."""
    first = list(map(str, items))
    return ", ".join(first[:4]) + (", …" if len(first) > 4 else "")
