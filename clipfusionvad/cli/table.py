"""Set runs side by side: mean and deviation over seeds, intervals, paired tests, the papers' figures."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from clipfusionvad.cli.options import Parser
from clipfusionvad.io.argtypes import non_negative_int
from clipfusionvad.io.errors import UserError, nearest, warn
from clipfusionvad.io.files import check_writable, write_text
from clipfusionvad.tools.sweep.plan import FULL
from clipfusionvad.tools.tables.collect import BEST, LAST, Cell, collect
from clipfusionvad.tools.tables.compare import RESAMPLES, Difference, Resampler, compare_cells, explain
from clipfusionvad.tools.tables.grid import Grid, fitted, latex, markdown
from clipfusionvad.tools.tables.statistics import (
    HEADLINE,
    OVERVIEW,
    TITLES,
    Row,
    ablation,
    details,
    differences,
    overview,
    tabulate,
)
from clipfusionvad.tools.tables.store import DATA, add_to_store, merge, read_store, write_into_readme

FORMATS, ROWS = ("markdown", "latex", "csv"), ("method", "dataset", "cell")
# Beyond it nothing changes but the memory.
MOST_RESAMPLES = 10**5


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    if not args.runs and not args.readme:
        raise UserError("give the folders of runs, of several seeds or of sweeps, or --readme with --store")
    if args.readme and not args.store:
        raise UserError("--readme is made from a results store: name it by --store")
    for path in filter(None, (args.output, args.store, args.readme)):
        check_writable(path)
    cells = collect(args.runs) if args.runs else []
    if cells and args.store:
        # What it refuses is refused before anything is written.
        merge(args.store, cells, args.data)
    if cells:
        _show(cells, args)
    if cells and args.store:
        print(f"store         {args.store}: {add_to_store(args.store, cells, args.data)} rows added or replaced")
    if args.readme:
        write_into_readme(args.readme, read_store(args.store))
        print(f"readme        {args.readme}: its tables are those of {args.store}")
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad table", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs, seeds, sweeps or tests")
    group = parser.add_argument_group("what is shown")
    group.add_argument("--rows", choices=ROWS, help="default: cell for several settings of one method, else method")
    group.add_argument("--metrics", nargs="+", metavar="METRIC", help=f"such as {', '.join(HEADLINE)} or map@0.1")
    group.add_argument("--weights", choices=(BEST, LAST, "both"), default="both", help="of which checkpoint")
    group = parser.add_argument_group("statistics")
    what = f"setting (name or folder) to compare with, video by video (with --rows cell: '{FULL}', else the first)"
    group.add_argument("--reference", metavar="RUN", help=what)
    group.add_argument("--bootstrap", type=resamples, default=RESAMPLES, metavar="N", help="resamples; 0: none")
    group.add_argument("--bootstrap-seed", type=non_negative_int, default=0, metavar="N", help="seed of the resamples")
    group = parser.add_argument_group("output")
    group.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="of what is printed and of --output")
    group.add_argument("--output", type=Path, metavar="FILE", help="write it there too")
    group.add_argument("--store", type=Path, metavar="FILE", help="CSV file of results that takes the best weights'")
    group.add_argument("--data", choices=DATA, help="what the runs were tested on, for --store; demo runs know it")
    group.add_argument("--readme", type=Path, metavar="FILE", help="make the tables between its markers from the store")
    return parser


def resamples(text: str) -> int:
    number = non_negative_int(text)
    if number > MOST_RESAMPLES:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_RESAMPLES}, got {text!r}")
    return number


def _show(cells: list[Cell], args: Namespace) -> None:
    """Print the tables, and write them where that is asked for."""
    by = args.rows or ("cell" if _is_ablation(cells) else "method")
    references = _references(cells, args.reference, by)
    single = any(len(cell.results) == 1 for cell in cells)
    metrics = args.metrics or (tuple(TITLES) if single else HEADLINE)
    resampler = Resampler(args.bootstrap, args.bootstrap_seed, metrics)
    rows = _tabulate(cells, references, args, resampler)
    found = _compare(cells, references, resampler, bool(args.reference)) if args.bootstrap else []
    grids = _lay_out(rows, by, found, args)
    width = shutil.get_terminal_size((120, 24)).columns
    whole = _csv(rows, found) if args.format == "csv" else "\n".join(map(_WRITERS[args.format], grids))
    print("\n".join(fitted(grid, width) for grid in grids) if args.format == "markdown" else whole)
    if args.output:
        write_text(args.output, whole)
        print(f"table         {args.output}")


def _is_ablation(cells: Sequence[Cell]) -> bool:
    return len({(cell.method, cell.data) for cell in cells}) < len(cells)


def _references(cells: Sequence[Cell], given: str | None, by: str) -> dict[str, Cell]:
    """By their data, the settings that others are compared with."""
    if given:
        folder = Path(given).resolve()
        own = [cell for cell in cells if given == cell.name or folder in _folders(cell)]
        if not own:
            names = [cell.name for cell in cells]
            raise UserError(
                f"--reference {given} is none of the runs{nearest(given, names)}; there are: {', '.join(names)}"
            )
        return {own[0].data: own[0]}
    # The first of each data, unless a sweep's unchanged cell is there.
    ordered = sorted(cells, key=lambda cell: cell.folder.name != FULL)
    return {cell.data: cell for cell in reversed(ordered)} if by == "cell" else {}


def _folders(cell: Cell) -> set[Path]:
    return {cell.folder.resolve(), *(result.folder.resolve() for result in cell.results)}


def _tabulate(cells: Sequence[Cell], references: dict[str, Cell], args: Namespace, resampler: Resampler) -> list[Row]:
    def over_videos(cell: Cell, metric: str) -> tuple[float, float] | None:
        result = cell.results[0]
        return resampler.interval(result.folder, metric) if args.bootstrap and result.scores else None

    # What was changed for an ablation is not what the paper's figure is of.
    changed = [cell.name for cell in cells if _is_changed(cell, cells, references)]
    weights = (BEST, LAST) if args.weights == "both" else (args.weights,)
    bar = tqdm(cells, "runs", disable=None, leave=False)
    rows = tabulate(bar, weights, args.metrics or tuple(TITLES), over_videos, changed)
    if missing := set(args.metrics or ()) - {row.metric for row in rows}:
        known = sorted({metric for cell in cells for result in cell.results for metric in result.metrics.get(BEST, {})})
        word = sorted(missing)[0]
        raise UserError(f"no run has a metric {word!r}{nearest(word, known)}; there are: {', '.join(known)}")
    return rows


def _is_changed(cell: Cell, cells: Sequence[Cell], references: dict[str, Cell]) -> bool:
    twins = [other for other in cells if (other.method, other.data) == (cell.method, cell.data)]
    return len(twins) > 1 and references.get(cell.data) is not cell


def _compare(
    cells: Sequence[Cell], references: dict[str, Cell], resampler: Resampler, asked: bool
) -> list[tuple[Cell, Cell, Difference]]:
    """Each setting, the one it is compared with, and a metric's difference.

    What cannot be compared is an error where the reference was ``asked`` for; else it is told and left out.
    """
    others = [cell for cell in cells if cell.data in references and cell is not references[cell.data]]
    found = []
    for cell in tqdm(others, "paired bootstrap", disable=None, leave=False):
        reference = references[cell.data]
        try:
            found += [(cell, reference, one) for one in compare_cells(resampler, reference, cell)]
        except UserError as error:
            if asked:
                raise
            warn(f"{cell.name} is not compared with {reference.name}: {error}")
    return found


def _lay_out(
    rows: Sequence[Row], by: str, found: Sequence[tuple[Cell, Cell, Difference]], args: Namespace
) -> list[Grid]:
    headline = args.metrics or HEADLINE
    wanted = args.metrics or (HEADLINE if by == "cell" else OVERVIEW)
    shown = [row for row in rows if row.metric in wanted or (row.paper is not None and "@" not in row.metric)]
    if by == "cell":
        grids = [ablation([row for row in shown if row.weights == kind]) for kind in _kinds(shown)]
    else:
        grids = [overview([row for row in shown if row.weights == kind], by) for kind in _kinds(shown)[:1]]
        grids += details(rows)
    for reference in dict.fromkeys(reference.name for _, reference, _ in found):
        own = [(cell.name, one) for cell, other, one in found if other.name == reference and one.metric in headline]
        grids += differences(reference, own, explain([one for _, one in own]) if own else "")
    return grids


def _kinds(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.weights for row in rows))


def _csv(rows: Sequence[Row], found: Sequence[tuple[Cell, Cell, Difference]]) -> str:
    """A line for each setting, metric and weights; differences beside the best weights, which they are of."""
    text = io.StringIO()
    compared = {(cell.name, one.metric): (reference.name, one) for cell, reference, one in found}
    header = [field.name for field in dataclasses.fields(Row)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*header, "reference", *(f"difference_{name}" for name in _COMPARED)])
    for row in rows:
        reference, one = compared.get((row.cell, row.metric), ("", None)) if row.weights == BEST else ("", None)
        gaps = [getattr(one, name) if one else "" for name in _COMPARED]
        writer.writerow([*dataclasses.astuple(row), reference, *gaps])
    return text.getvalue()


_COMPARED = ("difference", "low", "high", "p", "seeds", "seed_low", "seed_high", "seed_p")
_WRITERS = {"markdown": markdown, "latex": latex}
