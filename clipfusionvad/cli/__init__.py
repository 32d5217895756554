"""One file per command: it reads the options, calls the package, and prints where the results are."""

import ast
from pathlib import Path

#: The commands by purpose, in the order of their use.
GROUPS = {
    "first steps": ("demo", "matrix", "doctor", "clip", "completion"),
    "features and lists": ("extract", "convert_features", "compare_features", "lists", "pack"),
    "training and testing": ("train", "test", "sweep", "reproduce", "rerun"),
    "results": ("report", "table", "evaluate", "insight", "uncertainty"),
    "use": ("detect", "app", "export"),
}


def command_names() -> list[str]:
    """Return the names of the commands' modules."""
    return [name for names in GROUPS.values() for name in names]


def typed(name: str) -> str:
    """Return a command's name as it is typed, with dashes."""
    return name.replace("_", "-")


def summary(name: str) -> str:
    """Return the first line of a command's docstring, without the seconds that importing all commands takes."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
