"""Show how much a model trusts image and event, and what happens when one of them is damaged."""

from __future__ import annotations

from pathlib import Path

from clipfusionvad.cli.load import load_model, parse_over_model
from clipfusionvad.cli.option_files import find_option_file
from clipfusionvad.cli.parser import Parser
from clipfusionvad.cli.prepare import prepare_test_set
from clipfusionvad.engine.device import pick_device
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_writable
from clipfusionvad.io.option import add_arguments, declared_options, from_arguments
from clipfusionvad.tools.demo import make_demo
from clipfusionvad.tools.uncertainty import UncertaintyOptions


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("uncertainty", argv)
    parser = make_parser()
    if {"-h", "--help"} & set(rest):
        # The options of testing follow, from its own parser.
        print(parser.format_help())
    own, rest = parser.parse_known_args(rest)
    args, file = parse_over_model(rest, option_file)
    if not args.output_dir:
        raise UserError("--output-dir is needed: the folder for tables and figures")
    check_writable(Path(args.output_dir) / "uncertainty.csv")
    if args.demo:
        make_demo(option_file.DATASET)

    from clipfusionvad.tools.uncertainty.analysis import CURVES, sweep_table, write_analysis

    model, _ = load_model(args, option_file.DATASET, file)
    device = pick_device(args.device)
    videos = prepare_test_set(args, option_file.DATASET)
    options = from_arguments(UncertaintyOptions, vars(own))
    points = write_analysis(Path(args.output_dir), model.to(device), videos, device, args.precision, options)
    print(f"{args.method} on {videos.dataset.title}: {args.model_path}, {len(videos.entries)} test videos\n")
    print(sweep_table(points))
    print(f"\nresults in {args.output_dir}: tables (.csv), figures (.png, and curves/ by class), {CURVES} by snippet")
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad uncertainty", description=__doc__, add_help=False, usage="%(prog)s [options]")
    add_arguments(parser.add_argument_group("analysis"), declared_options(UncertaintyOptions).values())
    return parser
