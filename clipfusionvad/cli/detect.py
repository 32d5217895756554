"""Score videos with a trained model: anomaly over time, classes, segments; files, folders or a live stream."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import TYPE_CHECKING

from clipfusionvad.cli.parser import HelpFormatter, Parser
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import add_arguments, declared_options, from_arguments
from clipfusionvad.tools.detect.config import DetectConfig, ModelOptions, SegmentOptions, StreamOptions

if TYPE_CHECKING:
    from clipfusionvad.datasets import Dataset
    from clipfusionvad.engine.checkpoint import ModelFile
    from clipfusionvad.tools.detect.model import DetectionModel


def main(argv: list[str]) -> int:
    args = vars(make_parser().parse_args(argv))
    from clipfusionvad.tools.detect.run import detect  # after the parser: torch takes a second to load

    config = from_arguments(
        DetectConfig,
        args,
        videos=tuple(args["videos"]),
        model=from_arguments(ModelOptions, args),
        segments=from_arguments(SegmentOptions, args),
        stream=from_arguments(StreamOptions, args),
    )
    return detect(config, load)


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad detect", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("videos", nargs="*", metavar="VIDEO|DIR", help="video files, and folders of them")
    groups = {"results": DetectConfig, "model": ModelOptions, "segments": SegmentOptions, "stream": StreamOptions}
    for title, config in groups.items():
        add_arguments(parser.add_argument_group(title), declared_options(config).values())
    return parser


def load(own: ModelOptions) -> DetectionModel:
    """Load the model that the options describe; a file of ours says most of it."""
    from clipfusionvad.cli.load import load_model, parse_over_model
    from clipfusionvad.cli.option_files import option_file_of
    from clipfusionvad.datasets import find_dataset
    from clipfusionvad.engine.checkpoint import dataset_of, read_model_file
    from clipfusionvad.tools.detect.model import make_detection_model, read_classes

    file = read_model_file(own.checkpoint)
    method = own.method or file.method
    if not method or not (own.dataset or file.hparams):
        missing = "dataset" if method else "method"
        raise UserError(f"{own.checkpoint} does not say its {missing}: pass --{missing}")
    dataset = find_dataset(own.dataset) if own.dataset else dataset_of(file)
    flags = {"method": method, "model_path": own.checkpoint, "device": own.device, "precision": own.precision}
    flags |= {name: getattr(own, name) for name in ("config", "clip", "normal_centroid", "train_list")}
    tokens = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None]
    args, file = parse_over_model(tokens, option_file_of(dataset))
    if own.classes:
        dataset = _with_classes(args, dataset, file, read_classes(own.classes))
    model, clip = load_model(args, dataset, file)
    return make_detection_model(own, model, clip, args.clip, dataset, args.frames_per_snippet)


def _with_classes(args: Namespace, dataset: Dataset, file: ModelFile, classes: dict[str, str]) -> Dataset:
    """Return the dataset with other classes, if the model has no weights that belong to one of its own."""
    from clipfusionvad.cli.prepare import prepare_model
    from clipfusionvad.models import find_method

    if not find_method(args.method).needs_clip:
        raise UserError(f"--classes: {args.method} reads no class texts and does not distinguish classes")
    wider, _ = prepare_model(args, replace(dataset, classes={**dataset.classes, "one more": "one more"}), file)
    own = wider.state_dict()
    bound = [key for key, value in file.state.items() if key in own and own[key].shape != value.shape]
    if bound:
        raise UserError(
            f"--classes: this {args.method} has its own weights for each class of its training ({bound[0]}), so it "
            f"cannot use other classes"
        )
    return replace(dataset, classes=classes)
