"""Score videos with a trained model: anomaly over time, classes, segments; files, folders or a live stream."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from clipfusionvad.cli.parser import HelpFormatter, Parser
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import add_arguments, declared_options, from_arguments
from clipfusionvad.tools.detect.config import DetectConfig, ModelOptions, SegmentOptions, StreamOptions

if TYPE_CHECKING:
    from clipfusionvad.engine.checkpoint import ModelFile
    from clipfusionvad.engine.config import Settings
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
    from clipfusionvad.cli.trained_model import open_checkpoint
    from clipfusionvad.engine.model_setup import load_model
    from clipfusionvad.tools.detect.model import make_detection_model, read_classes

    names = ("device", "precision", "config", "clip", "normal_centroid", "train_list")
    flags = {name: getattr(own, name) for name in names}
    settings, file = open_checkpoint(own.checkpoint, own.method, own.dataset, flags)
    if own.classes:
        settings = _with_classes(settings, file, read_classes(own.classes))
    model, clip = load_model(settings, file)
    frames = settings.data.frames_per_snippet
    return make_detection_model(own, model, clip, settings.model.clip, settings.dataset, frames)


def _with_classes(settings: Settings, file: ModelFile, classes: dict[str, str]) -> Settings:
    """Return the settings with other classes, if the model has no weights that belong to one of its own."""
    from clipfusionvad.engine.model_setup import class_weight
    from clipfusionvad.models import find_method

    method = settings.model.method
    if not find_method(method).needs_clip:
        raise UserError(f"--classes: {method} reads no class texts and does not distinguish classes")
    if bound := class_weight(settings, file):
        raise UserError(
            f"--classes: this {method} has its own weights for each class of its training ({bound}), so it "
            f"cannot use other classes"
        )
    return replace(settings, dataset=replace(settings.dataset, classes=classes))
