"""What a check finds, and how checks are run.

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

Check = Callable[[Any], Iterator["Finding"]]


@dataclass(frozen=True)
class Finding:
    """One finding: its level, what it is, in which file and row, and what to do."""

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


def checks_in(*modules: ModuleType) -> list[Check]:
    """Return the checks that modules define, in the order of their definition."""
    return [
        function
        for module in modules
        for name, function in vars(module).items()
        if inspect.isgeneratorfunction(function) and function.__module__ == module.__name__ and name[0] != "_"
    ]


def name_of(check: Check) -> str:
    return check.__name__.replace("_", "-")


def summary(check: Check) -> str:
    """Return the first paragraph of a check's docstring."""
    return " ".join((check.__doc__ or "").split("\n\n")[0].split())


def run_checks(checks: Iterable[Check], subject: Any) -> list[Finding]:
    """Return the findings of all checks; a check that cannot continue on bad input reports that as its finding."""
    findings = []
    for check in checks:
        try:
            for finding in check(subject):
                findings.append(replace(finding, check=name_of(check)))
        except UserError as error:
            findings.append(Finding(ERROR, str(error), check=name_of(check)))
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
