"""Build a dataset's CSV lists and ground truth for a folder of features."""

from __future__ import annotations

from clipfusionvad.cli.options import Parser
from clipfusionvad.data.features import FRAMES_PER_SNIPPET
from clipfusionvad.datasets import DATASETS, find_dataset
from clipfusionvad.io.argtypes import size
from clipfusionvad.io.errors import run_main, warn
from clipfusionvad.tools.lists.build import PROTOCOLS, build_lists


def main(argv: list[str]) -> int:
    parser = make_parser()

    def body() -> None:
        args = parser.parse_args(argv)
        dataset = find_dataset(args.dataset)
        built = build_lists(
            dataset,
            args.features,
            args.output,
            args.annotations,
            args.split,
            args.exclude,
            args.test_crop,
            protocol=args.protocol,
            single_label=args.single_label,
            frames_per_snippet=args.frames_per_snippet,
            truth=not args.no_truth,
        )
        for note in built.notes:
            warn(note)
        print(built.summary)

    return run_main(body)


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad lists", description="Build a dataset's lists and ground truth.")
    parser.add_argument(
        "--dataset", required=True, metavar="NAME", help=f"one of {', '.join(DATASETS)}, or a YAML file of your own"
    )
    parser.add_argument("--features", required=True, metavar="DIR", help="folder with the .npy feature files")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for what is built")
    parser.add_argument(
        "--annotations", nargs="+", default=[], metavar="FILE", help="official annotation files, one or two"
    )
    parser.add_argument(
        "--split",
        nargs="+",
        default=[],
        metavar="FILE",
        help="names of the test videos, or of the training videos if the file's name contains 'train'; "
        "without it the annotated videos are the test set",
    )
    parser.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="files to leave out, by name or path")
    parser.add_argument("--test-crop", type=int, metavar="K", help="crop that stands for a test video")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default=PROTOCOLS[0],
        help="clean: put videos right that the released lists have on the wrong side; paper: leave them as released "
        "(default: %(default)s)",
    )
    parser.add_argument("--single-label", action="store_true", help="leave out videos of several classes")
    parser.add_argument(
        "--no-truth",
        action="store_true",
        help="write the lists only, for test videos that nobody annotated: a test with --gt-path none then judges "
        "whole videos",
    )
    parser.add_argument(
        "--frames-per-snippet",
        type=size,
        default=FRAMES_PER_SNIPPET,
        metavar="N",
        help="frames that a feature row stands for (default: %(default)s)",
    )
    return parser
