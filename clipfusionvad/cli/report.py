"""Write the page of a run or a test, and its figures for a paper; or list the runs below a folder."""

from pathlib import Path

from clipfusionvad.cli.parser import Parser
from clipfusionvad.io.files import check_writable
from clipfusionvad.report import FORMATS, PAGE


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    from clipfusionvad.report.figures import draw_figures
    from clipfusionvad.report.page import write_report
    from clipfusionvad.report.results import find_runs, read_run

    runs = find_runs(args.run)
    if runs and not (args.output or args.formats):
        print(f"runs in {args.run}; compare them: python -m clipfusionvad table {args.run}")
        for run in runs:
            page = run / PAGE
            print(f"  {page if page.is_file() else f'python -m clipfusionvad report {run}'}")
        return 0
    output = args.output or args.run / PAGE
    check_writable(output)
    if args.formats:
        figures = draw_figures(read_run(args.run), output.parent / "figures", args.formats, args.videos)
        print("figures       " + "\n              ".join(map(str, figures)))
    print(f"page          {write_report(args.run, output)}")
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad report", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, the --output-dir of a test, or a folder of runs")
    parser.add_argument("--output", type=Path, help=f"where to write the page (default: {PAGE} in that folder)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[], help="also draw figures in these formats")
    parser.add_argument("--videos", nargs="+", help="videos whose curves are drawn (default: a dozen of all kinds)")
    return parser
