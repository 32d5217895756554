"""Declare an option once, where it is used; read YAML files of options.

A declaration is a typed keyword of a callable or field of a dataclass, with its help and limits beside it:
``attn_window: Annotated[int, Option("snippets in an attention window", minimum=1)] = 8``. The command line, the check
of YAML files, ``--help``, shell completion and the tables in docs/ all read it.
"""

import argparse
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from clipfusionvad.io.errors import UserError, closest, nearest
from clipfusionvad.io.files import read_yaml

Made = TypeVar("Made")
# Beyond these, a value is a typing mistake that would only exhaust the memory.
LARGEST, LARGEST_SIZE, MOST_LAYERS = 2**31 - 1, 2**16, 1000
# Snippets of 16 frames: an hour and a half.
MOST_SMOOTH = 10_000


@dataclass(frozen=True)
class Option:
    """What a declaration adds to a keyword's type and default; ``help`` is one line for a person.

    Values lie in [``minimum``, ``maximum``], or strictly between ``above`` and ``below``. ``word`` is also allowed as
    the value of a number.
    ``const`` is the value of the bare flag, ``aliases`` are older flags. ``recorded`` is False for an option of one
    invocation, which no record must repeat.
    """

    help: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    word: str | None = None
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
    """An option as it was declared: ``kind`` is its type; ``count`` None for one value, 0 for any number, else n."""

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
        if (choices := self.option.choices) is not None:
            if value not in choices:
                raise UserError(f"{self.flag} {value!r}{nearest(value, choices)}: choose from {', '.join(choices)}")
        elif self.kind not in (int, float) or self.count is not None or value == self.option.word:
            return
        elif not _within(value, self.option):
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
        settings: dict[str, Any] = {"help": option.help, "dest": declared.name, "required": option.required}
        if declared.default is not inspect.Parameter.empty:
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
    return target(**{key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}, **more)


def _declared(name: str, hint: Any, default: Any) -> Declared:
    kind, *notes = get_args(hint)
    option = next(note for note in notes if isinstance(note, Option))
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    count, parts = None, get_args(kind)
    if parts:
        count = len(parts) if get_origin(kind) is tuple and parts[-1] is not Ellipsis else 0
    return Declared(name, parts[0] if parts else kind, count, default, option)


def _reader(declared: Declared) -> Callable[[str], Any]:
    """The argparse type of an option: text → value, or one line that says what is expected."""
    kind, option = declared.kind, declared.option
    if kind is str:
        return str
    largest = option.maximum if option.maximum is not None else LARGEST if kind is int else math.inf

    def read(text: str) -> Any:
        if text == option.word:
            return text
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not _within(value, option):
            raise argparse.ArgumentTypeError(f"must be {_expected(kind, option)}, got {text!r}")
        if value > largest:
            raise argparse.ArgumentTypeError(f"must be at most {largest}, got {text!r}")
        return value

    return read


def _within(value: float, option: Option) -> bool:
    """Whether a number keeps every limit but ``maximum``; infinity and NaN never do."""
    return (
        abs(value) < math.inf
        and (option.minimum is None or value >= option.minimum)
        and (option.above is None or value > option.above)
        and (option.below is None or value < option.below)
    )


def _expected(kind: type, option: Option) -> str:
    if option.word:
        return f"{_expected(kind, replace(option, word=None))}, or {option.word}"
    noun = "whole number" if kind is int else "number"
    low, high = option.minimum, option.maximum if kind is float else None
    if option.above == 0 and option.below is not None:
        return f"a {noun} between 0 and {option.below}"
    if (kind is int and low == 1) or option.above == 0:
        return f"a positive {noun}"
    if low is None:
        return f"a {noun}"
    if option.below is not None:
        return f"a {noun} from {low} to less than {option.below}"
    return f"a {noun}, {low} or more" if high is None else f"a {noun} from {low} to {high}"


# Inside the package where it is installed, beside it in the repository.
_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(filter(Path.is_dir, (_PACKAGE / "configs", _PACKAGE.parent / "configs")), _PACKAGE / "configs")


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML file, found by ``find_config``, of ``option: value`` lines; dashes in names are underscores."""
    content = read_yaml(find_config(path), "config")
    if content is not None and not isinstance(content, dict):
        raise UserError(f"config {path} must hold lines of the form 'option: value'")
    return {str(key).replace("-", "_"): value for key, value in (content or {}).items()}


def find_config(path: str | Path) -> Path:
    """Return the file that ``configs/NAME`` names: in the current folder, else in the package.

    Raises ``UserError`` for a missing file, with a near one of its folder and of ``configs``.
    """
    path = Path(path)
    top, *inner = path.parts or [""]
    own = CONFIGS.joinpath(*inner)
    if path.exists():
        return path
    if top == "configs" and own.is_file():
        return own
    places = {file.stem: Path("configs", file.relative_to(CONFIGS)) for file in sorted(CONFIGS.rglob("*.yaml"))}
    places |= {file.stem: file for file in path.parent.glob("*.y*ml")}
    near = closest(path.stem, places)
    hint = f"did you mean {places[near]}?" if near else "published pairs have configs/METHOD_DATASET.yaml"
    raise UserError(f"config not found: {path} ({hint})")
