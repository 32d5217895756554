"""python -m clipfusionvad COMMAND: the list of commands, and the way to each."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import clipfusionvad
from clipfusionvad import commands
from clipfusionvad.errors import UserError, nearest, run_main

# Modules of the package that are no commands of their own.
_INNER = {"load", "prepare", "task"}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return run_main(lambda: _dispatch(argv))


def _dispatch(argv: list[str]) -> int:
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__) if module.name not in _INNER)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m clipfusionvad COMMAND [options]\n\ncommands:")
        width = max(map(len, names))
        for name in names:
            print(f"  {_typed(name):{width}} {_summary(name)}")
        print("\n--help after a command lists its options; --version says which clipfusionvad this is")
        return 0
    if argv[0] == "--version":
        print(clipfusionvad.__version__)
        return 0
    name = argv[0].replace("-", "_")
    if name not in names:
        typed = [_typed(name) for name in names]
        raise UserError(f"unknown command {argv[0]!r}{nearest(argv[0], typed)}; there are: {', '.join(typed)}")
    return importlib.import_module(f"clipfusionvad.commands.{name}").main(argv[1:]) or 0


def _typed(name: str) -> str:
    """A command as it is typed: its module cannot have the dash in its name."""
    return name.replace("_", "-")


def _summary(name: str) -> str:
    return (importlib.import_module(f"clipfusionvad.commands.{name}").__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
