"""Set runs side by side: mean and deviation over seeds, intervals, paired tests, the papers' figures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from clipfusionvad.cli.parser import Parser
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_writable, write_text
from clipfusionvad.io.option import add_arguments, declared_options, from_arguments
from clipfusionvad.tools.tables import DATA, TableOptions

if TYPE_CHECKING:
    from clipfusionvad.tools.tables.collect import Setting


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    if not args.runs and not args.readme:
        raise UserError("give the folders of runs, of several seeds or of sweeps, or --readme with --store")
    if args.readme and not args.store:
        raise UserError("--readme is generated from a results store: give it by --store")
    for path in filter(None, (args.output, args.store, args.readme)):
        check_writable(path)

    from clipfusionvad.tools.tables.collect import collect
    from clipfusionvad.tools.tables.store import add_to_store, merge, read_store, write_into_page

    settings = collect(args.runs) if args.runs else []
    if settings and args.store:
        # Refuse what cannot be stored before anything is written.
        merge(args.store, settings, args.data)
    if settings:
        options = from_arguments(TableOptions, vars(args))
        printed, written = _render(settings, options)
        print(printed)
        if args.output:
            write_text(args.output, written)
            print(f"table         {args.output}")
    if settings and args.store:
        print(f"store         {args.store}: {add_to_store(args.store, settings, args.data)} rows added or replaced")
    if args.readme:
        write_into_page(args.readme, read_store(args.store))
        print(f"readme        {args.readme}: its tables are those of {args.store}")
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad table", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs, seeds, sweeps or tests")
    add_arguments(parser.add_argument_group("what is shown"), declared_options(TableOptions).values())
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, metavar="FILE", help="also write the tables to this file")
    group.add_argument("--store", type=Path, metavar="FILE", help="CSV file to add the best weights' metrics to")
    group.add_argument("--data", choices=DATA, help="what the runs were tested on, for --store; demo runs know it")
    group.add_argument("--readme", type=Path, metavar="FILE", help="write the store's tables between its markers")
    return parser


def _render(settings: list[Setting], options: TableOptions) -> tuple[str, str]:
    """Return the tables as they are printed and as they are written: Markdown is split to fit the terminal."""
    from clipfusionvad.report.formatting import to_latex, to_markdown
    from clipfusionvad.tools.tables.build import build_tables

    tables, csv = build_tables(settings, options)
    if options.format == "csv":
        return csv, csv
    if options.format == "latex":
        text = "\n".join(map(to_latex, tables))
        return text, text
    width = shutil.get_terminal_size((120, 24)).columns
    return "\n".join(to_markdown(table, width) for table in tables), "\n".join(map(to_markdown, tables))
