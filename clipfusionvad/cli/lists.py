"""Build a dataset's CSV lists and ground truth for a folder of features."""

from clipfusionvad.cli.parser import HelpFormatter, Parser
from clipfusionvad.datasets import DATASETS, find_dataset
from clipfusionvad.io.option import add_arguments, declared_options, from_arguments
from clipfusionvad.tools.lists import ListsConfig, build_lists


def main(argv: list[str]) -> None:
    args = vars(make_parser().parse_args(argv))
    print(build_lists(find_dataset(args["dataset"]), from_arguments(ListsConfig, args)))


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad lists", description=__doc__, formatter_class=HelpFormatter)
    names = f"one of {', '.join(DATASETS)}, or a YAML file of your own"
    parser.add_argument("--dataset", required=True, metavar="NAME", help=names)
    add_arguments(parser, declared_options(ListsConfig).values())
    return parser
