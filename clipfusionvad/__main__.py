"""python -m clipfusionvad COMMAND: prints the list of commands, or runs one."""

import importlib
import sys

import clipfusionvad
from clipfusionvad.cli import GROUPS, command_names, summary, typed
from clipfusionvad.io.errors import UserError, nearest, run_main


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return run_main(lambda: _dispatch(argv))


def _dispatch(argv: list[str]) -> int:
    names = command_names()
    if not argv or argv[0] in ("-h", "--help"):
        _print_commands()
        return 0
    if argv[0] == "--version":
        print(clipfusionvad.__version__)
        return 0
    name = argv[0].replace("-", "_")
    if name not in names:
        known = [typed(name) for name in names]
        raise UserError(f"unknown command {argv[0]!r}{nearest(argv[0], known)}; the commands are: {', '.join(known)}")
    return importlib.import_module(f"clipfusionvad.cli.{name}").main(argv[1:]) or 0


def _print_commands() -> None:
    print("usage: python -m clipfusionvad COMMAND [options]")
    width = max(map(len, command_names()))
    for title, names in GROUPS.items():
        print(f"\n{title}:")
        for name in names:
            print(f"  {typed(name):{width}} {summary(name)}")
    print("\nCOMMAND --help lists the options of a command; --version prints the version")


if __name__ == "__main__":
    sys.exit(main())
