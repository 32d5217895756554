"""Open a page in the browser that detects anomalies in the videos that are dropped on it."""

from dataclasses import dataclass, replace
from typing import Annotated

from clipfusionvad.cli.detect import load
from clipfusionvad.cli.parser import HelpFormatter, Parser
from clipfusionvad.io.option import Option, add_arguments, declared_options, from_arguments
from clipfusionvad.metrics.segments import Thresholds
from clipfusionvad.tools.detect.config import ModelOptions, SegmentOptions


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where the page is."""

    host: Annotated[str, Option("address to listen on; 0.0.0.0 admits everybody on the network")] = "127.0.0.1"
    port: Annotated[int, Option("port of the page", minimum=1, maximum=65535)] = 7860


def main(argv: list[str]) -> None:
    args = vars(make_parser().parse_args(argv))
    own, server = from_arguments(SegmentOptions, args), from_arguments(ServerOptions, args)
    thresholds = Thresholds.of(own.threshold, own.low_threshold, own.min_seconds, own.merge_seconds)
    from clipfusionvad.tools.app import serve  # after the parser: torch takes a second to load

    models = [from_arguments(ModelOptions, args | {"checkpoint": path}) for path in dict.fromkeys(args["checkpoint"])]
    serve(models, load, thresholds, (server.host, server.port))


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad app", description=__doc__, formatter_class=HelpFormatter)
    add_arguments(parser.add_argument_group("server"), declared_options(ServerOptions).values())
    model = declared_options(ModelOptions)
    several = replace(model["checkpoint"].option, help="model files to choose from, as for 'detect'", nonempty=True)
    model["checkpoint"] = replace(model["checkpoint"], count=0, option=several)
    add_arguments(parser.add_argument_group("models"), model.values())
    add_arguments(parser.add_argument_group("segments, to begin with"), declared_options(SegmentOptions).values())
    return parser
