"""Score videos with a trained model: anomaly over time, classes, segments; files, folders or a live stream."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clipfusionvad.cli.parser import HelpFormatter, Parser
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import add_arguments, declared_options, from_arguments
from clipfusionvad.tools.detect.config import DetectConfig, ModelOptions, SegmentOptions, StreamOptions

if TYPE_CHECKING:
    from clipfusionvad.tools.detect.model import DetectionModel

GROUPS = {"model": ModelOptions, "segments": SegmentOptions, "stream": StreamOptions}


def main(argv: list[str]) -> int:
    args = vars(make_parser().parse_args(argv))
    from clipfusionvad.tools.detect.run import detect  # after the parser: torch takes a second to load

    groups: dict[str, Any] = {name: from_arguments(group, args) for name, group in GROUPS.items()}
    return detect(from_arguments(DetectConfig, args, videos=tuple(args["videos"]), **groups), load)


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad detect", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("videos", nargs="*", metavar="VIDEO|DIR", help="video files, and folders of them")
    for title, config in {"results": DetectConfig, **GROUPS}.items():
        add_arguments(parser.add_argument_group(title), declared_options(config).values())
    return parser


def load(own: ModelOptions) -> DetectionModel:
    """Load the model that the options describe, with other classes if none of its weights belong to its own."""
    from clipfusionvad.cli.trained_model import open_checkpoint
    from clipfusionvad.engine.setup import class_weights, restore_model
    from clipfusionvad.models import find_method
    from clipfusionvad.tools.detect.model import DetectionModel, read_classes

    names = ("device", "precision", "config", "clip", "normal_centroid", "train_list", "smooth")
    flags = {name: getattr(own, name) for name in names}
    settings, file = open_checkpoint(own.checkpoint, own.method, own.dataset, flags)
    if own.classes:
        classes, method = read_classes(own.classes), settings.model.method
        if not find_method(method).needs_clip:
            raise UserError(f"--classes: {method} does not distinguish classes")
        if bound := min(class_weights(settings, file), default=None):
            raise UserError(
                f"--classes: this {method} has its own weights for each class of its training ({bound}), so it "
                f"cannot use other classes"
            )
        settings = replace(settings, dataset=replace(settings.dataset, classes=classes))
    parts = file.hparams.get("parts")
    if parts == 0:
        raise UserError(
            f"{file.path} was trained on rows that are equal parts of a video, which detect does not compute: "
            f"extract features of your videos as for the training, and score them with 'test'"
        )
    model, clip = restore_model(settings, file)
    frames = settings.data.frames_per_snippet
    sigma = float(settings.training.smooth)
    return DetectionModel(own, model, clip, settings.model.clip, settings.dataset, frames, parts, sigma)
