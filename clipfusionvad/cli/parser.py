"""The argument parser of every command: errors in one line, no abbreviated flags, old names of renamed flags."""

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NoReturn

from clipfusionvad.io.errors import EXIT_BAD_INPUT, error_line, nearest, warn


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and that takes no abbreviated flags."""

    #: Printed before an error: where the arguments come from, if it is not the command line.
    context = ""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str) -> NoReturn:
        print(error_line(f"{self.context}{message}"), file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        args = sys.argv[1:] if args is None else list(args)
        for word in args:
            # Bytes that are not UTF-8 arrive as surrogates, which can be neither printed nor recorded.
            if not word.isascii() and word != word.encode("utf-8", "replace").decode("utf-8") or "\0" in word:
                self.error(f"{word!r} is not text in UTF-8")
            flag = word.partition("=")[0]
            action = self._option_string_actions.get(flag)
            if action and flag in old_names(action):
                warn(f"{flag} is now called {action.option_strings[0]}")
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Namespace:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.unknown(unknown[0]))
        return parsed

    def unknown(self, flag: str) -> str:
        """Return the error for an unknown flag."""
        return f"unknown argument {flag!r}{nearest(flag, self._option_string_actions)}"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Prints the defaults that say something, once."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, [], argparse.SUPPRESS) or isinstance(action, argparse._StoreTrueAction)
        return action.help if silent or "(default" in (action.help or "") else super()._get_help_string(action)


def old_names(action: argparse.Action) -> list[str]:
    """The former flags of an option, which come after its name."""
    flag, *others = action.option_strings or ["-"]
    return [other for other in others if flag.startswith("--") and not other.startswith("--no-")]
