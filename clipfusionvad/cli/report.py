"""Write the page of a run or a test, and its figures for a paper; compare two; or list the runs below a folder."""

from pathlib import Path

from clipfusionvad.cli.parser import Parser
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_writable
from clipfusionvad.report import FORMATS, PAGE


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    folder, *others = args.run
    if others:
        if len(others) > 1 or args.formats or args.videos or args.csv:
            raise UserError("two runs are compared on one page: give two folders, and no option but --output")
        from clipfusionvad.tools.tables.compare_page import write_comparison

        print(f"page          {write_comparison(folder, others[0], args.output)}")
        return 0

    from clipfusionvad.report.csv_tables import write_tables
    from clipfusionvad.report.figures import draw_figures
    from clipfusionvad.report.page import write_report
    from clipfusionvad.report.results import find_runs, read_run

    runs = find_runs(folder)
    if runs and not (args.output or args.formats or args.csv):
        print(f"runs in {folder}; compare them: python -m clipfusionvad table {folder}")
        for run in runs:
            page = run / PAGE
            print(f"  {page if page.is_file() else f'python -m clipfusionvad report {run}'}")
        return 0
    output = args.output or folder / PAGE
    check_writable(output)
    if args.formats:
        figures = draw_figures(read_run(folder), output.parent / "figures", args.formats, args.videos)
        print("figures       " + "\n              ".join(map(str, figures)))
    if args.csv:
        print("tables        " + "\n              ".join(map(str, write_tables(read_run(folder), snippets=True))))
    print(f"page          {write_report(folder, args.output)}")
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad report", description=__doc__)
    folders = "folder of a run, the --output-dir of a test, or a folder of runs; two runs or tests are compared"
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help=folders)
    parser.add_argument("--output", type=Path, help=f"where to write the page (default: {PAGE} in that folder)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[], help="also draw figures in these formats")
    parser.add_argument("--videos", nargs="+", help="videos whose curves are drawn (default: a dozen of all kinds)")
    parser.add_argument(
        "--csv", action="store_true", help="also write snippets.csv, a row per snippet, beside scores.npz"
    )
    return parser
