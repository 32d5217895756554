"""Check whether two sets of features agree, and name what makes them differ."""

from pathlib import Path

from clipfusionvad.cli.parser import Parser
from clipfusionvad.io.option import add_arguments, declared_options
from clipfusionvad.tools.features.folders import compare_features


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    return compare_features(Path(args.a), Path(args.b), output=args.output, limit=args.limit)


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad compare-features", description=__doc__)
    parser.add_argument("a", metavar="A", help="feature file (.npy), folder of them, or a centroid (D,)")
    parser.add_argument("b", metavar="B", help="the same, to compare with; files are paired by path, else by NAME__k")
    add_arguments(parser, declared_options(compare_features).values())
    return parser
