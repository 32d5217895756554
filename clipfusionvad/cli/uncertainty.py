"""Show how far a model trusts image and event, and what happens when one of them is damaged."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from clipfusionvad.cli.load import load_model, parse_over_model
from clipfusionvad.cli.option_files import OptionFile, find_option_file
from clipfusionvad.cli.parser import Parser
from clipfusionvad.cli.prepare import prepare_test_set
from clipfusionvad.engine.device import pick_device
from clipfusionvad.engine.evaluator import VideoSet
from clipfusionvad.io.argtypes import non_negative_int, share
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_writable
from clipfusionvad.models import Method
from clipfusionvad.tools.demo import make_demo
from clipfusionvad.tools.uncertainty.figures import (
    draw_class_bars,
    draw_class_curves,
    draw_sweep,
    sweep_table,
    write_averages,
    write_curves,
    write_sweep,
)
from clipfusionvad.tools.uncertainty.measure import LEVELS, SweepPoint, class_averages, judge, observe_videos, sweep

CURVES = "curves.npz"


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("uncertainty", argv)
    own, rest = _parse_own(rest)
    args, model, videos = _load(rest, option_file)
    points = analyse(model, videos, args, own)
    print(f"{args.method} on {videos.dataset.title}: {args.model_path}, {len(videos.entries)} test videos\n")
    print(sweep_table(points))
    print(f"\nresults in {args.output_dir}: tables (.csv), pictures (.png, and curves/ by class), {CURVES} by snippet")
    return 0


def _parse_own(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The options that testing does not have, and the rest."""
    parser = make_parser()
    if {"-h", "--help"} & set(argv):
        # Those of testing follow, from its own parser.
        print(parser.format_help())
    return parser.parse_known_args(argv)


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad uncertainty", description=__doc__, add_help=False, usage="%(prog)s [options]")
    group = parser.add_argument_group("analysis")
    group.add_argument(
        "--levels", type=share, nargs="+", default=list(LEVELS), help="shares of attenuated positions in an input"
    )
    group.add_argument("--sweep-seed", type=non_negative_int, default=0, help="seed of which positions they are")
    group.add_argument(
        "--curve-pictures", type=non_negative_int, default=10, help="pictures of curves for a class at most; 0: all"
    )
    return parser


def _load(argv: Sequence[str], option_file: OptionFile) -> tuple[Namespace, Method, VideoSet]:
    """What testing would test: the options, the model on its device, and the test set."""
    args, file = parse_over_model(argv, option_file)
    if not args.output_dir:
        raise UserError("--output-dir is needed: the folder for tables and pictures")
    check_writable(Path(args.output_dir) / "uncertainty.csv")
    if args.demo:
        make_demo(option_file.DATASET)
    model, _ = load_model(args, option_file.DATASET, file)
    return args, model.to(pick_device(args.device)), prepare_test_set(args, option_file.DATASET)


def analyse(model: Method, videos: VideoSet, args: Namespace, own: Namespace) -> list[SweepPoint]:
    """Write every table and picture into ``args.output_dir``, and return what the sweep found."""
    folder, device, judged = Path(args.output_dir), pick_device(args.device), judge(videos)
    # A video of several classes goes by its first, as in the released code of IEF-VAD.
    classes = [videos.dataset.codes(entry.label)[0] for entry in videos.entries]
    observations = observe_videos(model, videos.features, judged, device, args.precision)
    averages = class_averages(observations, judged, classes)
    write_curves(folder / CURVES, videos, observations)
    write_averages(folder, averages)
    draw_class_bars(folder / "weights_by_class.png", averages, {"weight": "mean weight"})
    distances = {"cosine": "cosine similarity to fused", "euclidean": "distance to fused"}
    draw_class_bars(folder / "distances.png", averages, distances)
    draw_class_curves(folder / "curves", videos, observations, judged, classes, own.curve_pictures)
    points = sweep(model, videos.features, judged, device, args.precision, sorted(set(own.levels)), own.sweep_seed)
    write_sweep(folder, points)
    draw_sweep(folder / "uncertainty.png", points)
    return points
