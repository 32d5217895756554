"""Read what a sweep trains: cells, each a name and the options in which it differs from the others.

A YAML file of a sweep is either a ``--config`` file, which becomes one cell, or lists what to try, with the published
figures of a paper's table where it repeats one: docs/sweeps.md shows both forms.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from clipfusionvad.datasets import DATASETS
from clipfusionvad.io.errors import UserError, nearest
from clipfusionvad.models import method_names, read_options
from clipfusionvad.report.table import RANKING
from clipfusionvad.tools.tables import FULL

_LISTS = {"cells", "grid", "search"}
_SECTIONS = _LISTS | {"options", "trials", "maximize", "method", "dataset", "source", "published"}
#: Metrics that papers print, named as in results.csv; all in percent there.
PRINTED = tuple(f"{metric}{branch}" for branch in (1, 2) for metric in RANKING)
PRINTED += ("mauc", "mean_ap", *(f"map@0.{iou}" for iou in range(1, 6)), "map_average")
# Names become folders.
_NAME = re.compile(r"[\w][\w .,=+-]*")


@dataclass(frozen=True)
class Published:
    """Published ``figures`` of a cell, in percent by metric, of a ``method`` on a ``dataset``, and their ``source``."""

    figures: Mapping[str, float]
    method: str
    dataset: str
    source: str


@dataclass(frozen=True)
class Cell:
    """One setting: its ``name``, the ``options`` that it sets, and the file ``source`` that defines it."""

    name: str
    options: Mapping[str, Any]
    source: str
    published: Published | None = None


@dataclass(frozen=True)
class Search:
    """A search: the ``options`` that all its trials share, and the ``space`` of the others.

    The space maps each option to a list of choices or a range: ``low``, ``high``, optionally ``log`` or ``step``.
    """

    name: str
    options: Mapping[str, Any]
    space: Mapping[str, Any]
    trials: int
    maximize: str
    source: str


@dataclass(frozen=True)
class Plan:
    """The cells and searches of a sweep, and the ``method`` of all that do not name another one."""

    cells: list[Cell]
    searches: list[Search]
    method: str | None


def read_sweep(paths: Sequence[str], full: bool = True) -> Plan:
    """Read YAML files; with ``full``, the unchanged cell comes first, unless every cell of a table names its method."""
    contents = {path: read_options(path) for path in paths}
    tables = {path: content for path, content in contents.items() if _LISTS & content.keys()}
    methods = {path: content["method"] for path, content in tables.items() if "method" in content}
    for path, method in methods.items():
        if method not in method_names():
            raise UserError(f"sweep {path}: unknown method {method!r}{nearest(str(method), method_names())}")
    if len(set(methods.values())) > 1:
        raise UserError(f"{' and '.join(methods)} name different methods: sweep them one after the other")
    # The figures of the unchanged method from all files, for the dataset of the first.
    found = [one for path, content in tables.items() if (one := _published(content, content, path, "the file"))]
    alike = [one for one in found if one.dataset == found[0].dataset]
    figures = {metric: value for one in reversed(alike) for metric, value in one.figures.items()}
    of_full = replace(alike[0], figures=figures) if alike else None
    cells, searches = list[Cell](), list[Search]()
    for path, content in contents.items():
        if path in tables:
            cells += _cells_of(content, path)
            searches += _search_of(content, path)
        else:
            cells.append(Cell(Path(path).stem, content, path))
    if full and not (tables and not searches and all("method" in cell.options for cell in cells)):
        cells.insert(0, Cell(FULL, {}, "", of_full))
    taken: dict[str, str] = {}
    items: list[Cell | Search] = [*cells, *searches]
    for item in items:
        if not _NAME.fullmatch(item.name):
            raise UserError(f"{item.source}: {item.name!r} cannot be the name of a folder; name the cell otherwise")
        # A file system may ignore the case of letters.
        if item.name.lower() in taken:
            places = " and ".join(filter(None, (taken[item.name.lower()], item.source)))
            raise UserError(f"two cells are named {item.name!r}: {places}")
        taken[item.name.lower()] = item.source
    return Plan(cells, searches, next(iter(methods.values()), None))


def _published(content: Mapping[str, Any], part: Mapping[str, Any], path: str, what: str) -> Published | None:
    """Return the figures in ``part`` of a file, with the method, dataset and source of the file."""
    if "published" not in part:
        return None
    figures, where = part["published"], f"sweep {path}: published of {what}"
    if not isinstance(figures, dict) or not figures:
        raise UserError(f"{where} must hold metrics and percentages")
    for metric, value in figures.items():
        if metric not in PRINTED:
            raise UserError(f"{where}: unknown metric {metric!r}{nearest(str(metric), PRINTED)}")
        if type(value) not in (int, float) or not 0 <= value <= 100:
            raise UserError(f"{where}: {metric} must be a percentage, not {value!r}")
    dataset, source = content.get("dataset"), content.get("source")
    if "method" not in content:
        raise UserError(f"sweep {path}: published figures need 'method: NAME', whose they are")
    if dataset not in DATASETS:
        raise UserError(f"sweep {path}: published figures need 'dataset: NAME', one of {', '.join(DATASETS)}")
    if not isinstance(source, str) or not source.strip():
        raise UserError(f"sweep {path}: published figures need 'source: …', the paper and its table")
    return Published(figures, str(content["method"]), str(dataset), source)


def _cells_of(content: Mapping[str, Any], path: str) -> Iterator[Cell]:
    for key in content.keys() - _SECTIONS:
        known = ", ".join(sorted(_SECTIONS))
        raise UserError(f"sweep {path}: unknown section {key!r}{nearest(key, _SECTIONS)}; it takes {known}")
    shared, grid = (_mapping(content, section, path) for section in ("options", "grid"))
    for name, options in _mapping(content, "cells", path).items():
        if not isinstance(options, dict | NoneType):
            raise UserError(f"sweep {path}: cell {name!r} must hold options and values")
        own = _underscored(options or {})
        published = _published(content, own, path, f"cell {name!r}")
        own.pop("published", None)
        yield Cell(str(name), shared | own, path, published)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"sweep {path}: grid: {key} must list the values to try")
    for values in itertools.product(*grid.values()) if grid else ():
        chosen = dict(zip(grid, values, strict=True))
        yield Cell(cell_name(chosen), shared | chosen, path)


def _search_of(content: Mapping[str, Any], path: str) -> Iterator[Search]:
    space, trials, maximize = _mapping(content, "search", path), content.get("trials"), content.get("maximize")
    if not space:
        for key in {"trials", "maximize"} & content.keys():
            raise UserError(f"sweep {path}: {key} belongs to a search, and there is none")
        return
    for key, values in space.items():
        if not (isinstance(values, list) and values) and not (isinstance(values, dict) and _is_range(values)):
            raise UserError(
                f"sweep {path}: search: {key} must list choices or give low and high (a number each), and may give "
                f"log: true or step"
            )
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise UserError(f"sweep {path}: a search needs 'trials: N', the number of settings to try")
    if not isinstance(maximize, str):
        raise UserError(f"sweep {path}: a search needs 'maximize: METRIC', such as auc1")
    yield Search(Path(path).stem, _mapping(content, "options", path), space, trials, maximize, path)


def _is_range(values: dict[str, Any]) -> bool:
    if not {"low", "high"} <= values.keys() <= {"low", "high", "log", "step"}:
        return False
    low, high = values["low"], values["high"]
    rising = {type(low), type(high)} <= {int, float} and low < high
    return rising and not (values.get("log") and (low <= 0 or "step" in values))


def cell_name(options: Mapping[str, Any]) -> str:
    """Return a name for a setting from its options: ``attn_window=8,lr=0.0001``."""
    return ",".join(f"{key}={_value_name(value)}" for key, value in options.items())


def _value_name(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_value_name, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value).replace("/", "-")


def _mapping(content: Mapping[str, Any], section: str, path: str) -> dict[str, Any]:
    value = content.get(section) or {}
    if not isinstance(value, dict):
        raise UserError(f"sweep {path}: {section} must hold names and values")
    return _underscored(value) if section != "cells" else value


def _underscored(options: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in options.items()}
