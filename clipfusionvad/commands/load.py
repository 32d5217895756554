"""What testing, exporting and analysing do with a model file before anything else."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipfusionvad.clip import ClipWeights
from clipfusionvad.commands.prepare import OptionFile, calibrate, open_list, prepare_model
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.checkpoint import ModelFile, check_clip, check_method, load_model_file, read_model_file
from clipfusionvad.errors import UserError, warn
from clipfusionvad.models import Method, find_method

# What a model file says besides the options of its method.
ORIGIN = ("clip", "protocol", "frames_per_snippet")


def parse_over_model(argv: Sequence[str] | None, option_file: OptionFile) -> tuple[Namespace, ModelFile]:
    """Options over those that the model file was made with, so that nobody need repeat them, and the file."""
    args = option_file.parse_args(argv)
    file = read_model_file(args.model_path)
    check_method(file, args.method)
    if file.made:
        dataset = option_file.DATASET
        if file.made["dataset"] != dataset.name:
            warn(f"{args.model_path} was trained on {file.made['dataset']}, with that dataset's classes and options")
        elif list(file.made.get("classes") or dataset.classes) != dataset.labels:
            raise UserError(
                f"{args.model_path} was trained on {dataset.title} with the classes {', '.join(file.made['classes'])}, "
                f"not {', '.join(dataset.labels)}: train again, or put the dataset file back"
            )
        args = option_file.parse_args(argv, _stored(file, args.method))
    return args, file


def _stored(file: ModelFile, method: str) -> Mapping[str, Any]:
    known = set(find_method(method).option_names())
    origin = {key: file.made[key] for key in ORIGIN if file.made.get(key) is not None}
    return {key: value for key, value in file.made["options"].items() if key in known} | origin


def load_model(args: Namespace, dataset: Dataset, file: ModelFile) -> tuple[Method, ClipWeights | None]:
    """The model that the options describe with the weights of the file, on the CPU."""
    model, clip = prepare_model(args, dataset, file)
    check_clip(file, clip)
    load_model_file(model, file)
    if not model.calibrated:
        _calibrate(model, args, dataset, file)
    return model, clip


def _calibrate(model: Method, args: Namespace, dataset: Dataset, file: ModelFile) -> None:
    """A released file of some methods lacks what training took from the normal training videos."""
    if not args.calibration and not Path(args.train_list).is_file():
        raise UserError(
            f"{file.path} does not hold {', '.join(model.calibration)}, which is taken from normal training videos: "
            f"give the training list with --train-list, or the file of a run with --calibration"
        )
    entries = [] if args.calibration else open_list(args, args.train_list, dataset)[0]
    calibrate(model, args, entries, dataset)
