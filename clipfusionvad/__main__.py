"""python -m clipfusionvad COMMAND: prints the list of commands, or runs one."""

import importlib
import sys

import clipfusionvad
from clipfusionvad.cli import GROUPS, command_names, summary, typed
from clipfusionvad.io.errors import UserError, nearest, run_main


def main(argv: list[str] | None = None) -> int:
    return run_main(lambda: _dispatch(sys.argv[1:] if argv is None else argv))


def _dispatch(argv: list[str]) -> int:
    known = {typed(name): name for name in command_names()}
    command, *rest = argv or ["--help"]
    if command == "--version":
        print(clipfusionvad.__version__)
    elif command in ("-h", "--help"):
        print("usage: python -m clipfusionvad COMMAND [options]")
        width = max(map(len, known))
        for title, names in GROUPS.items():
            print(f"\n{title}:", *(f"{typed(name):{width}} {summary(name)}" for name in names), sep="\n  ")
        print("\nCOMMAND --help lists the options of a command; --version prints the version")
    elif name := known.get(typed(command)):
        return importlib.import_module(f"clipfusionvad.cli.{name}").main(rest) or 0
    else:
        raise UserError(f"unknown command {command!r}{nearest(command, known)}; the commands are: {', '.join(known)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
