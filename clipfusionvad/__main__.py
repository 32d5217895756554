"""python -m clipfusionvad COMMAND: the list of commands, and the way to each."""

from __future__ import annotations

import importlib
import pkgutil
import sys

from clipfusionvad import commands
from clipfusionvad.errors import UserError, nearest, run_main

# Modules of the package that are no commands of their own.
_INNER = {"load", "prepare"}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return run_main(lambda: _dispatch(argv))


def _dispatch(argv: list[str]) -> int:
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__) if module.name not in _INNER)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m clipfusionvad COMMAND [options]\n\ncommands:")
        for name in names:
            print(f"  {name:10} {_summary(name)}")
        print("\n--help after a command lists its options")
        return 0
    if argv[0] not in names:
        raise UserError(f"unknown command {argv[0]!r}{nearest(argv[0], names)}; there are: {', '.join(names)}")
    return importlib.import_module(f"clipfusionvad.commands.{argv[0]}").main(argv[1:]) or 0


def _summary(name: str) -> str:
    return (importlib.import_module(f"clipfusionvad.commands.{name}").__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
