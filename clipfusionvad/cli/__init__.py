"""One file per command: options → calls → where the results are."""

from __future__ import annotations

import ast
from pathlib import Path

#: The commands by what they are for, in the order in which one needs them.
GROUPS = {
    "first steps": ("demo", "matrix", "doctor", "completion"),
    "features and lists": ("extract", "compare_features", "lists", "pack"),
    "training and testing": ("train", "test", "sweep", "rerun"),
    "results": ("report", "table", "insight", "uncertainty"),
    "use": ("detect", "export"),
}


def command_names() -> list[str]:
    """The commands' modules."""
    return [name for names in GROUPS.values() for name in names]


def typed(name: str) -> str:
    """A command as it is typed: its module cannot have the dash in its name."""
    return name.replace("_", "-")


def summary(name: str) -> str:
    """What a command does, in a line: read from its file, since loading all commands takes seconds."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
