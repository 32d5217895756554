"""Make CLIP features of videos: one file NAME__k.npy for each crop of each video."""

from clipfusionvad.cli.parser import HelpFormatter, Parser
from clipfusionvad.extraction.jobs import EncoderConfig, ExtractConfig
from clipfusionvad.extraction.snippets import ExtractOptions
from clipfusionvad.io.option import add_arguments, declared_options, from_arguments


def main(argv: list[str]) -> int:
    args = vars(make_parser().parse_args(argv))
    from clipfusionvad.extraction.extract import extract  # after the parser: torch takes a second to load

    options, encoder = from_arguments(ExtractOptions, args), from_arguments(EncoderConfig, args)
    return extract(from_arguments(ExtractConfig, args, options=options, encoder=encoder))


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad extract", description=__doc__, formatter_class=HelpFormatter)
    for title, config in (("command", ExtractConfig), ("features", ExtractOptions), ("encoder", EncoderConfig)):
        add_arguments(parser.add_argument_group(title), declared_options(config).values())
    return parser
