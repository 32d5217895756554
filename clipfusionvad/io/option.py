"""Declare an option once, where it is used: a typed keyword with its help and limits beside it.

    def __init__(self, *, attn_window: Annotated[int, Option("snippets in an attention window", minimum=1)] = 8): ...

The command line, the check of YAML files, ``--help``, shell completion and the tables in docs/ all read this one
declaration. A frozen dataclass declares its fields in the same way.
"""

import argparse
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from clipfusionvad.io.errors import UserError, check_choice

Made = TypeVar("Made")
# Beyond these, a value is a typing mistake that would only exhaust the memory.
LARGEST, LARGEST_SIZE, MOST_LAYERS = 2**31 - 1, 2**16, 1000
#: The default of a keyword that has none.
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Option:
    """What a declaration adds to a keyword's type and default; ``help`` is one line for a person.

    ``minimum`` and ``maximum`` are allowed values, ``above`` and ``below`` are not. ``const`` is the value of the flag
    without a value. ``aliases`` are older flags of the same option. ``recorded`` is False for an option of one
    invocation, which a run's record must not repeat. ``required`` demands the flag, ``nonempty`` refuses a list without
    values.
    """

    help: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Sequence[Any] | None = None
    const: Any = None
    metavar: str | None = None
    aliases: tuple[str, ...] = ()
    recorded: bool = True
    required: bool = False
    nonempty: bool = False


def size(help: str, **more: Any) -> Option:
    """A length of a tensor's axis."""
    return Option(help, minimum=1, maximum=LARGEST_SIZE, **more)


def layers(help: str, **more: Any) -> Option:
    """A number of layers, or of other things that are built one by one; 0 for none."""
    return Option(help, minimum=0, maximum=MOST_LAYERS, **more)


def non_negative(help: str, **more: Any) -> Option:
    return Option(help, minimum=0, **more)


@dataclass(frozen=True)
class Declared:
    """An option as it was declared: ``kind`` is int, float, str or bool; ``count`` None for one value, 0 for a list of
    any length, n for exactly n values."""

    name: str
    kind: type
    count: int | None
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> None:
        """Raise ``UserError`` for one value that the declaration does not allow."""
        if value is None:
            return
        if self.option.choices is not None:
            check_choice(self.flag, value, self.option.choices)
        elif self.kind in (int, float) and self.count is None and not _within(value, self.option):
            raise UserError(f"{self.flag} must be {_expected(self.kind, self.option)}, got {value!r}")


def declared_options(target: Any) -> dict[str, Declared]:
    """Return the options that a dataclass or a callable declares, by name; keywords without ``Option`` are left out."""
    # A dataclass holds the hints itself, any other class in its initialiser.
    plain_class = isinstance(target, type) and not is_dataclass(target)
    hints = get_type_hints(target.__init__ if plain_class else target, include_extras=True)
    return {
        name: _declared(name, hints[name], parameter.default)
        for name, parameter in inspect.signature(target).parameters.items()
        if get_origin(hints.get(name)) is Annotated
    }


def add_arguments(group: Any, options: Iterable[Declared]) -> None:
    """Add a flag for each option to an argparse parser or group."""
    for declared in options:
        option, flags = declared.option, [declared.flag, *declared.option.aliases]
        settings: dict[str, Any] = {"help": option.help, "dest": declared.name}
        if option.required:
            settings["required"] = True
        if declared.default is not REQUIRED:
            settings["default"] = list(declared.default) if isinstance(declared.default, tuple) else declared.default
        if declared.kind is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, **settings)
            continue
        if declared.count is not None:
            settings["nargs"] = declared.count or ("+" if option.nonempty else "*")
        elif option.const is not None:
            settings |= {"nargs": "?", "const": option.const}
        if option.choices is not None:
            settings["choices"] = list(option.choices)
        group.add_argument(*flags, type=_reader(declared), metavar=option.metavar, **settings)


def from_arguments(target: type[Made], args: Mapping[str, Any], **more: Any) -> Made:
    """Make a dataclass from parsed arguments by name, and from ``more`` for its fields that are not options."""
    values = {name: args[name] for name in declared_options(target)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return target(**values, **more)


def _declared(name: str, hint: Any, default: Any) -> Declared:
    kind, *notes = get_args(hint)
    option = next(note for note in notes if isinstance(note, Option))
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    count = None
    if get_origin(kind) is list:
        kind, count = get_args(kind)[0], 0
    elif get_origin(kind) is tuple:
        parts = get_args(kind)
        kind, count = parts[0], 0 if parts[-1] is Ellipsis else len(parts)
    return Declared(name, kind, count, default, option)


def _reader(declared: Declared) -> Callable[[str], Any]:
    """The argparse type of an option: text → value, or one line that says what is expected."""
    kind, option = declared.kind, declared.option
    if kind is str:
        return str

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not _within(value, option):
            raise argparse.ArgumentTypeError(f"must be {_expected(kind, option)}, got {text!r}")
        largest = option.maximum if option.maximum is not None else LARGEST if kind is int else None
        if largest is not None and value > largest:
            raise argparse.ArgumentTypeError(f"must be at most {largest}, got {text!r}")
        return value

    return read


def _within(value: float, option: Option) -> bool:
    """Whether a number keeps every limit but ``maximum``; infinity and NaN never do."""
    return (
        abs(value) < float("inf")
        and (option.minimum is None or value >= option.minimum)
        and (option.above is None or value > option.above)
        and (option.below is None or value < option.below)
    )


def _expected(kind: type, option: Option) -> str:
    noun = "whole number" if kind is int else "number"
    low, high = option.minimum, option.maximum if kind is float else None
    if option.above == 0 and option.below is not None:
        return f"a {noun} between 0 and {option.below}"
    if (kind is int and low == 1) or option.above == 0:
        return f"a positive {noun}"
    if low is not None and option.below is not None:
        return f"a {noun} from {low} to less than {option.below}"
    if low is not None and high is not None:
        return f"a {noun} from {low} to {high}"
    return f"a {noun}, {low} or more" if low is not None else f"a {noun}"
