"""Set runs side by side: mean and deviation over seeds, intervals, paired tests, the papers' figures."""

import shutil
from pathlib import Path

from clipfusionvad.cli.parser import Parser
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_writable, write_text
from clipfusionvad.io.option import add_arguments, declared_options, from_arguments
from clipfusionvad.tools.tables import DATA, TableOptions


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    if not args.runs and not args.readme:
        raise UserError("give the folders of runs, of several seeds or of sweeps, or --readme with --store")
    if args.readme and not args.store:
        raise UserError("--readme is generated from a results store: give it by --store")
    for path in filter(None, (args.output, args.store, args.readme)):
        check_writable(path)

    from clipfusionvad.report.formatting import to_latex, to_markdown
    from clipfusionvad.tools.tables.build import build_tables
    from clipfusionvad.tools.tables.collect import collect
    from clipfusionvad.tools.tables.store import merge, read_store, write_into_page, write_store

    if args.runs:
        settings, options = collect(args.runs), from_arguments(TableOptions, vars(args))
        # What cannot be stored is refused before anything is written.
        stored, own = merge(args.store, settings, args.data) if args.store else ([], 0)
        tables, written = build_tables(settings, options)
        if options.format != "csv":
            label = args.output.stem if args.output else "results"
            in_latex = options.format == "latex"
            written = to_latex(tables[0], label) if in_latex else "\n".join(map(to_markdown, tables))
        width = shutil.get_terminal_size((120, 24)).columns
        fits = options.format == "markdown"
        print("\n".join(to_markdown(table, width) for table in tables) if fits else written)
        if args.output:
            write_text(args.output, written)
            print(f"table         {args.output}")
        if args.store:
            write_store(args.store, stored)
            print(f"store         {args.store}: {own} rows added or replaced")
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
