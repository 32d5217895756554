"""Convert features of other programs (.npy with crops, .npz, .pt, .h5) into one .npy file per video and crop."""

from pathlib import Path

from clipfusionvad.cli.parser import Parser
from clipfusionvad.io.option import add_arguments, declared_options
from clipfusionvad.tools.features.convert import convert_features


def main(argv: list[str]) -> None:
    args = vars(make_parser().parse_args(argv))
    convert_features(Path(args.pop("source")), Path(args.pop("target")), **args)


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad convert-features", description=__doc__)
    parser.add_argument("source", metavar="SOURCE", help="file, or folder of files, to convert")
    parser.add_argument("target", metavar="TARGET", help="folder to write NAME.npy or NAME__k.npy into")
    add_arguments(parser, declared_options(convert_features).values())
    return parser
