"""Build a dataset's CSV lists and ground truth for a folder of features."""

from __future__ import annotations

from clipfusionvad.data.build import build_lists
from clipfusionvad.datasets import DATASETS, find_dataset
from clipfusionvad.errors import run_main, warn
from clipfusionvad.options import Parser


def main(argv: list[str]) -> int:
    parser = Parser(prog="clipfusionvad lists", description="Build a dataset's lists and ground truth.")
    parser.add_argument("--dataset", required=True, choices=sorted(DATASETS))
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

    def body() -> None:
        args = parser.parse_args(argv)
        dataset = find_dataset(args.dataset)
        built = build_lists(
            dataset, args.features, args.output, args.annotations, args.split, args.exclude, args.test_crop
        )
        for note in built.notes:
            warn(note)
        print(built.summary)

    return run_main(body)
