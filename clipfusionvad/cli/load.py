"""What testing, exporting and analysing do with a model file before anything else."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipfusionvad.cli.option_files import OptionFile
from clipfusionvad.cli.parser import Parser
from clipfusionvad.cli.prepare import find_normal_centroid, open_list, prepare_model
from clipfusionvad.datasets import DATASETS, Dataset, find_dataset
from clipfusionvad.engine.checkpoint import (
    ModelFile,
    check_clip,
    check_method,
    dataset_of,
    load_model_file,
    read_model_file,
)
from clipfusionvad.engine.run_folder import BEST, DATASET, LAST, OPTIONS, seeds_in
from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.io.files import must_exist
from clipfusionvad.models import Method, find_method
from clipfusionvad.models.clip import ClipWeights
from clipfusionvad.models.config import read_options

# What a model file says besides the options of its method.
ORIGIN = ("clip", "protocol", "frames_per_snippet")


def parse_over_model(argv: Sequence[str] | None, option_file: OptionFile) -> tuple[Namespace, ModelFile]:
    """Options over those that the model file was made with, so that nobody need repeat them, and the file."""
    args = option_file.parse_args(argv)
    file = read_model_file(args.model_path)
    check_method(file, args.method)
    if file.hparams:
        dataset = option_file.DATASET
        if file.hparams["dataset"] != dataset.name:
            warn(f"{args.model_path} was trained on {file.hparams['dataset']}, with that dataset's classes and options")
        elif list(file.hparams.get("classes") or dataset.classes) != dataset.labels:
            classes = ", ".join(file.hparams["classes"])
            raise UserError(
                f"{args.model_path} was trained on {dataset.title} with the classes {classes}, "
                f"not {', '.join(dataset.labels)}: train again, or put the dataset file back"
            )
        args = option_file.parse_args(argv, stored_options(file, args.method))
    return args, file


def stored_options(file: ModelFile, method: str) -> Mapping[str, Any]:
    """What a model file of ours says of the options that the method has, and of where it comes from."""
    known = set(find_method(method).option_names())
    origin = {key: file.hparams[key] for key in ORIGIN if file.hparams.get(key) is not None}
    return {key: value for key, value in file.hparams["options"].items() if key in known} | origin


def load_model(args: Namespace, dataset: Dataset, file: ModelFile) -> tuple[Method, ClipWeights | None]:
    """The model that the options describe with the weights of the file, on the CPU."""
    model, clip = prepare_model(args, dataset, file)
    check_clip(file, clip)
    load_model_file(model, file)
    if not model.has_normal_centroid:
        _find_normal_centroid(model, args, dataset, file)
    return model, clip


def _find_normal_centroid(model: Method, args: Namespace, dataset: Dataset, file: ModelFile) -> None:
    """A released file of some methods lacks what training took from the normal training videos."""
    if not args.normal_centroid and not Path(args.train_list).is_file():
        raise UserError(
            f"{file.path} does not hold {', '.join(model.centroid_buffers)}, the mean of the normal training videos: "
            f"give the training list with --train-list, or the file of a run with --normal-centroid"
        )
    entries = [] if args.normal_centroid else open_list(args, args.train_list, dataset)[0]
    find_normal_centroid(model, args, entries, dataset)


def find_source(source: Path, argv: Sequence[str]) -> tuple[Dataset, list[str]]:
    """The dataset and the options of a test of what a folder of a run, or a model file, holds.

    A run is tested as its own options say, its best weights or, where it kept none, the last ones. A file of ours
    names its method and dataset; those of others need ``--dataset``. ``argv`` goes over both.
    """
    if source.is_dir():
        dataset, _ = read_run_options(source)
        best = next((source / name for name in (BEST, LAST) if (source / name).is_file()), None)
        if best is None:
            raise UserError(f"the run in {source} has no weights yet: neither {BEST} nor {LAST}")
        return dataset, ["--config", str(source / OPTIONS), "--model-path", str(best), *argv]
    must_exist(source, "run or model file")
    file = read_model_file(source)
    parser = Parser(prog="clipfusionvad", add_help=False)
    parser.add_argument("--dataset")
    known, rest = parser.parse_known_args(argv)
    if known.dataset is None and not file.hparams:
        raise UserError(f"{source} does not say what it was trained on: give --dataset, one of {', '.join(DATASETS)}")
    dataset = find_dataset(known.dataset) if known.dataset else dataset_of(file)
    method = ["--method", file.method] if file.method else []
    return dataset, [*method, "--model-path", str(source), *rest]


def read_run_options(folder: Path) -> tuple[Dataset, dict[str, Any]]:
    """The dataset of a run and the options that it recorded; ``UserError`` for another folder."""
    if not (folder / OPTIONS).is_file():
        seeds = ", ".join(seeds_in(folder)) if folder.is_dir() else ""
        hint = f"give the folder of one of its seeds ({seeds})" if seeds else f"there is no {OPTIONS} in it"
        raise UserError(f"{folder} is no folder of a run: {hint}")
    options, own = read_options(str(folder / OPTIONS)), folder / DATASET
    return find_dataset(str(own) if own.is_file() else str(options.get("dataset"))), options
