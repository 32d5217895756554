"""What a sweep trains: cells, each of them a name and the options in which it differs from the others.

A YAML file given to a sweep is either a ``--config`` file, which makes one cell, or says itself what to try::

    options: {max_epoch: 5}               # of every cell of this file
    cells:                                # one by one
      no gate: {gam: false}
    grid:                                 # every combination
      attn_window: [8, 64, 256]
      visual_layers: [1, 2]
    search:                               # Optuna chooses
      lr: {low: 1.0e-6, high: 1.0e-3, log: true}
      separation_weight: {low: 0, high: 1}
      visual_head: [1, 2, 4]
    trials: 20                            # of the search
    maximize: auc1
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfusionvad.errors import UserError, nearest
from clipfusionvad.options import read_config

#: The cell in which nothing is changed; the others are compared with it.
FULL = "full"
_SECTIONS = {"options", "cells", "grid", "search", "trials", "maximize"}
_SPEAKING = {"cells", "grid", "search"}
_RANGE = {"low", "high", "log", "step"}
# Names become folders.
_NAME = re.compile(r"[\w][\w .,=+-]*")


@dataclass(frozen=True)
class Cell:
    """One setting: its ``name``, the ``options`` that are set, and the file ``source`` that says so."""

    name: str
    options: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class Search:
    """A search: what is the same in all its trials (``options``), and the space of the rest.

    ``space`` gives each option a list of choices or a range: ``low``, ``high`` and, if wanted, ``log`` or ``step``.
    """

    name: str
    options: Mapping[str, Any]
    space: Mapping[str, Any]
    trials: int
    maximize: str
    source: str


def read_sweep(paths: Sequence[str], full: bool = True) -> tuple[list[Cell], list[Search]]:
    """The cells and the searches that YAML files name; ``full`` puts the unchanged cell before them."""
    cells = [Cell(FULL, {}, "")] if full else []
    searches: list[Search] = []
    for path in paths:
        content = read_config(path)
        if _SPEAKING & content.keys():
            cells += _cells_of(content, path)
            searches += _search_of(content, path)
        else:
            cells.append(Cell(Path(path).stem, content, path))
    taken: dict[str, str] = {}
    named: list[Cell | Search] = [*cells, *searches]
    for item in named:
        if not _NAME.fullmatch(item.name):
            raise UserError(f"{item.source}: {item.name!r} cannot be the name of a folder; name the cell otherwise")
        # File systems may not tell letters of either case apart.
        if item.name.lower() in taken:
            places = " and ".join(filter(None, (taken[item.name.lower()], item.source)))
            raise UserError(f"two cells are named {item.name!r}: {places}")
        taken[item.name.lower()] = item.source
    return cells, searches


def _cells_of(content: Mapping[str, Any], path: str) -> Iterator[Cell]:
    for key in content.keys() - _SECTIONS:
        known = ", ".join(sorted(_SECTIONS))
        raise UserError(f"sweep {path}: unknown section {key!r}{nearest(key, _SECTIONS)}; it takes {known}")
    shared = _mapping(content, "options", path)
    for name, options in _mapping(content, "cells", path).items():
        if options is not None and not isinstance(options, dict):
            raise UserError(f"sweep {path}: cell {name!r} must hold options and values")
        yield Cell(str(name), shared | _underscored(options or {}), path)
    grid = _mapping(content, "grid", path)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"sweep {path}: grid: {key} must list the values to try")
    if grid:
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            yield Cell(describe(chosen), shared | chosen, path)


def _search_of(content: Mapping[str, Any], path: str) -> Iterator[Search]:
    space = _mapping(content, "search", path)
    for key in {"trials", "maximize"} & content.keys() if not space else ():
        raise UserError(f"sweep {path}: {key} belongs to a search, and there is none")
    if not space:
        return
    for key, values in space.items():
        ranged = isinstance(values, dict) and {"low", "high"} <= values.keys() <= _RANGE and _rising(values)
        if not ranged and not (isinstance(values, list) and values):
            raise UserError(
                f"sweep {path}: search: {key} must list choices or give low and high (a number each), and may give "
                f"log: true or step"
            )
    trials = content.get("trials")
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise UserError(f"sweep {path}: a search needs 'trials: N', the number of settings to try")
    maximize = content.get("maximize")
    if not isinstance(maximize, str):
        raise UserError(f"sweep {path}: a search needs 'maximize: METRIC', such as auc1")
    yield Search(Path(path).stem, _mapping(content, "options", path), space, trials, maximize, path)


def _rising(values: Mapping[str, Any]) -> bool:
    low, high = values["low"], values["high"]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (low, high))
    return numbers and low < high and not (values.get("log") and (low <= 0 or "step" in values))


def describe(options: Mapping[str, Any]) -> str:
    """A name for a setting, made of its options: ``attn_window=8,lr=0.0001``."""
    return ",".join(f"{key}={_shown(value)}" for key, value in options.items())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "+".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value).replace("/", "-")


def _mapping(content: Mapping[str, Any], section: str, path: str) -> dict[str, Any]:
    value = content.get(section) or {}
    if not isinstance(value, dict):
        raise UserError(f"sweep {path}: {section} must hold names and values")
    return _underscored(value) if section != "cells" else value


def _underscored(options: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in options.items()}
