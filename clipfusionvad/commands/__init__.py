"""One file per command: options → calls → where the results are."""

from __future__ import annotations

import importlib

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
    """What a command does, in a line."""
    return (importlib.import_module(f"clipfusionvad.commands.{name}").__doc__ or "").splitlines()[0]
