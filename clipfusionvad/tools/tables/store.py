"""The results store, a CSV file of what was measured, and the tables in README that are made from it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import clipfusionvad
from clipfusionvad.datasets import DATASETS
from clipfusionvad.engine.run_folder import ENVIRONMENT
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_csv, read_json, read_text, write_csv, write_text
from clipfusionvad.report.table import Figure, published_figures
from clipfusionvad.tools.tables.collect import BEST, Cell
from clipfusionvad.tools.tables.grid import Grid, markdown
from clipfusionvad.tools.tables.statistics import SHORT, TITLES, tabulate

DEMO, CLIPS, FULL = "demo", "real clips", "full"
DATA = (DEMO, CLIPS, FULL)
_KEY = ("method", "dataset", "data", "protocol", "metric")
_COLUMNS = (*_KEY, "mean", "std", "n", "command", "version", "commit", "date")
_WIDTH = 120
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def add_to_store(path: Path, cells: Sequence[Cell], data: str | None) -> int:
    """Put what ``merge`` gives into a store; how many of its rows are of these runs."""
    rows, own = merge(path, cells, data)
    write_csv(path, _COLUMNS, [[row[column] for column in _COLUMNS] for _, row in sorted(rows.items())])
    return own


def merge(path: Path, cells: Sequence[Cell], data: str | None) -> tuple[dict[tuple[str, ...], dict[str, str]], int]:
    """A store's rows with the best weights' metrics (percent) of runs in place of what it says of the same, and how
    many they are.

    ``data`` says what the runs were tested on, unless they are of the demo. ``UserError`` where it is missing or
    wrong, and where two settings would have the same rows.
    """
    old = read_store(path) if path.exists() else []
    rows = {_key(row): row for row in old}
    owner: dict[tuple[str, ...], Cell] = {}
    for cell in cells:
        kind = _kind(cell, data)
        key = (cell.method, cell.dataset, kind, cell.protocol)
        if key in owner:
            raise UserError(f"{owner[key].name} and {cell.name} are two settings of {' '.join(key)}: store one of them")
        owner[key] = cell
        rows = {old_key: row for old_key, row in rows.items() if old_key[:4] != key} | _rows_of(cell, kind)
    return rows, sum(key[:4] in owner for key in rows)


def read_store(path: Path) -> list[dict[str, str]]:
    """The rows of a store; ``UserError`` for a file that is none."""
    rows = [row for _, row in read_csv(path, "results store", _COLUMNS)]
    for row in rows:
        try:
            float(row["mean"]), float(row["std"] or 0), int(row["n"])
        except ValueError as error:
            raise UserError(f"results store {path}: {', '.join(_key(row))} has numbers that are none") from error
        if row["data"] not in DATA:
            raise UserError(f"results store {path}: data is {row['data']!r}; it may be {', '.join(DATA)}")
    return rows


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in _KEY)


def _kind(cell: Cell, data: str | None) -> str:
    if cell.demo and data in (None, DEMO):
        return DEMO
    if cell.demo or data in (None, DEMO):
        what = "is of the demo: it cannot be stored as anything else" if cell.demo else "is not of the demo"
        raise UserError(f"{cell.name} {what}: say by --data what its videos are ({', '.join(DATA)})")
    return data


def _rows_of(cell: Cell, kind: str) -> dict[tuple[str, ...], dict[str, str]]:
    result = cell.results[0]
    about = read_json(result.folder / ENVIRONMENT, "environment") if (result.folder / ENVIRONMENT).is_file() else {}
    measured = datetime.fromtimestamp(max(one.folder.stat().st_mtime for one in cell.results), timezone.utc)
    shared = {
        "method": cell.method,
        "dataset": cell.dataset,
        "data": kind,
        "protocol": cell.protocol,
        "command": " ".join(map(str, about.get("command", []))).replace("__main__.py", "python -m clipfusionvad"),
        "version": str(about.get("version", clipfusionvad.__version__)),
        "commit": str(about.get("commit") or ""),
        "date": measured.date().isoformat(),
    }
    rows = {}
    for row in tabulate([cell], [BEST], tuple(TITLES), lambda cell, metric: None):
        std = "" if row.std is None else f"{row.std:.4f}"
        own = shared | {"metric": row.metric, "mean": f"{row.mean:.4f}", "std": std, "n": str(row.n)}
        rows[_key(own)] = own
    return rows


def write_into_readme(path: Path, store: Sequence[dict[str, str]]) -> None:
    """Put the tables of a store between the markers of a page; ``UserError`` for a page without them."""
    text = read_text(path, "page")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{path} needs one line '{BEGIN}' and below it one line '{END}': the tables go between them")
    before, rest = text.split(BEGIN)
    write_text(path, f"{before}{BEGIN}\n{results_text(store)}{END}{rest.split(END)[1]}")


def results_text(store: Sequence[dict[str, str]]) -> str:
    """Published figures beside what was measured here, and, apart from them, what the demo gave. In percent.

    Of the protocols, only that by which the figures were obtained.
    """
    store = [row for row in store if row["protocol"] == "paper"]
    figures = [figure for figure in published_figures() if "@" not in figure.metric]
    real = [row for row in store if row["data"] != DEMO]
    intro = (
        "Published figures in percent and, beside them, what was measured with this repository by the same protocol. "
        + ("" if real else "**None of them was measured here yet.** ")
        + "*unverified*: no public source could be checked."
    )
    parts = [textwrap.fill(intro, _WIDTH), "", _table(_published_grid(figures, store))]
    demo = [row for row in store if row["data"] == DEMO]
    if demo:
        parts += [textwrap.fill(_DEMO, _WIDTH), "", _table(_demo_grid(demo, figures))]
    return "\n".join(parts)


_DEMO = (
    "**Made-up demo data**, which is easy and has nothing but class names in common with the benchmarks: the numbers "
    "below say that training works, and cannot be set beside those above. AUC / AP of the main branch, mean ± standard "
    "deviation over (n) seeds."
)


def _table(grid: Grid) -> str:
    """Without the title, which the text before it stands for."""
    return markdown(grid).split("\n", 2)[2]


def _published_grid(figures: Sequence[Figure], store: Sequence[dict[str, str]]) -> Grid:
    measured = {(row["method"], row["dataset"], row["metric"], row["data"]): row for row in store}
    rows = tuple(
        (
            figure.method,
            DATASETS[figure.dataset].title,
            _name(figure.metric),
            f"{figure.percent:.2f}" + (" *unverified*" if "unverified" in figure.source else ""),
            figure.source.replace(" (unverified)", ""),
            *(_measured(measured.get((figure.method, figure.dataset, figure.metric, kind))) for kind in (FULL, CLIPS)),
        )
        for figure in figures
    )
    header = ("method", "dataset", "metric", "published", "source", "here: full test set", "here: some real clips")
    return Grid("", header, rows, labels=3)


def _demo_grid(demo: Sequence[dict[str, str]], figures: Sequence[Figure]) -> Grid:
    names = [name for name in DATASETS if any(row["dataset"] == name for row in demo)]
    there = {row["method"] for row in demo}
    methods = [*dict.fromkeys(figure.method for figure in figures if figure.method in there)]
    methods += sorted(there - set(methods))
    by_place = {(row["method"], row["dataset"], row["metric"]): row for row in demo}
    rows = tuple(
        (
            method,
            *(
                " / ".join(_measured(by_place.get((method, name, metric)), "-") for metric in ("auc1", "ap1"))
                if (method, name, "auc1") in by_place
                else "not run"
                for name in names
            ),
        )
        for method in methods
    )
    return Grid("", ("made-up data shaped like", *(DATASETS[name].title for name in names)), rows)


def _name(metric: str) -> str:
    """As the papers call it; which branch it is taken from is ours to say."""
    return "detection mAP, average" if metric == "map_average" else SHORT[metric].removesuffix(" fine")


def _measured(row: dict[str, str] | None, missing: str = "not measured") -> str:
    if row is None:
        return missing
    std = f" ± {float(row['std']):.2f}" if row["std"] else ""
    return f"{float(row['mean']):.2f}{std} ({row['n']})"
