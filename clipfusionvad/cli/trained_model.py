"""Options of commands that use a trained model: over those that its checkpoint was trained with."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipfusionvad.cli.options import OptionFile, option_file_of, settings_of
from clipfusionvad.cli.parser import Parser
from clipfusionvad.datasets import Dataset, find_dataset
from clipfusionvad.engine.checkpoint import ModelFile, check_method, dataset_of, read_model_file
from clipfusionvad.engine.config import AUTO, Settings
from clipfusionvad.engine.device import pick_device
from clipfusionvad.engine.run_folder import DATASET, OPTIONS, which_run
from clipfusionvad.engine.setup import restore_scorer
from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.io.hub import local_path
from clipfusionvad.models import Method, find_method, read_options


def parse_over_checkpoint(argv: Sequence[str] | None, option_file: OptionFile) -> tuple[Settings, ModelFile]:
    """Parse options over those stored in the checkpoint that ``--model-path`` names; return it too."""
    argv = sys.argv[1:] if argv is None else list(argv)
    early = Parser(add_help=False)
    early.add_argument("--model-path")
    path = early.parse_known_args(argv)[0].model_path
    if path is None or not local_path(path).exists():
        # Shows what --help and --show-options can show without a file.
        path = option_file.parse_args([word for word in argv if path or word != "--show-options"]).model_path
    file, dataset = read_model_file(path), option_file.DATASET
    stored = {"method": file.method}
    if file.hparams:
        if file.hparams["dataset"] != dataset.name:
            warn(f"{file.path} was trained on {file.hparams['dataset']}, with that dataset's classes and options")
        elif list(file.hparams.get("classes") or dataset.classes) != dataset.labels:
            classes = ", ".join(file.hparams["classes"])
            raise UserError(
                f"{file.path} was trained on {dataset.title} with the classes {classes}, "
                f"not {', '.join(dataset.labels)}: train again, or put the dataset file back"
            )
        # What it stores of the method's options, its CLIP, protocol and frames behind a snippet.
        options, names = file.hparams["options"], find_method(file.hparams["method"]).option_names()
        stored |= {name: options[name] for name in names if name in options}
        stored |= {key: file.hparams.get(key) for key in ("clip", "protocol", "frames_per_snippet", "smooth")}
        stored["segments"] = None if file.hparams.get("parts") is None else "equal"
    args = option_file.parse_args(argv, stored)
    check_method(file, args.method)
    if args.smooth == AUTO:
        # As the options of a run have it; its model file holds what the training chose.
        if file.hparams.get("smooth") is None:
            raise UserError(
                f"--smooth auto: the training of {file.path} has not chosen how far to smooth; give a number of "
                f"snippets, or 0"
            )
        args.smooth = file.hparams["smooth"]
    args.model_path = file.path
    return settings_of(args, dataset), file


def open_checkpoint(
    path: str, method: str | None, dataset: str | None, flags: Mapping[str, Any]
) -> tuple[Settings, ModelFile]:
    """Return a checkpoint and the settings of its model; ``flags`` are options by name, None where not given.

    A checkpoint of ours names its method and dataset; for others both must be given.
    """
    file = read_model_file(path)
    method = method or file.method
    if not method:
        raise UserError(f"{path} does not name its method: pass --method (in Python method=)")
    given = {"method": method, "model_path": path, **flags}
    tokens = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    return parse_over_checkpoint(tokens, option_file_of(dataset_of(file, dataset)))


def load_model(
    path: str | Path,
    device: str = "auto",
    method: str | None = None,
    dataset: str | None = None,
    clip: str | None = None,
) -> Method:
    """Return the model of one of our files, or of the folder of a run, ready to score as ``test`` does.

    Method, options, classes, text features and smoothing come from the file. CLIP is loaded (``clip``: in place of the
    recorded one) only for files without text features. A file of another project needs ``dataset``, and ``method``
    where its weights do not show it. To train, use ``create_model`` and ``load_weights``.
    Raises ``UserError`` for files that cannot be used.
    """
    try:
        settings, file = open_checkpoint(str(path), method, dataset, {"clip": clip, "device": device})
    except SystemExit as error:
        # The parser has printed which one.
        raise UserError(f"{path} stores options, or was given some, that are not valid") from error
    model = restore_scorer(settings, file)
    model.labels, model.smooth = tuple(settings.dataset.labels), float(settings.training.smooth)
    model.frames_per_snippet = settings.data.stride
    return model.to(pick_device(device)).eval()


def find_source(source: Path, argv: Sequence[str]) -> tuple[Dataset, list[str]]:
    """Return the dataset and the command line of a test of a run's folder, or of a checkpoint.

    A run is tested with its own options and its best weights or, where it kept none, the last ones. A checkpoint of
    ours names its method and dataset; others need ``--dataset``. ``argv`` overrides both.
    """
    if source.is_dir():
        dataset, _ = read_run_options(source)
        return dataset, ["--config", str(source / OPTIONS), "--model-path", str(source), *argv]
    file = read_model_file(source)
    parser = Parser(prog="clipfusionvad", add_help=False)
    parser.add_argument("--dataset")
    known, rest = parser.parse_known_args(argv)
    return dataset_of(file, known.dataset), ["--model-path", str(source), *rest]


def read_run_options(folder: Path) -> tuple[Dataset, dict[str, Any]]:
    """Return the dataset of a run and the options that it recorded; ``UserError`` for another folder."""
    if not (folder / OPTIONS).is_file():
        hint = which_run(folder) or f"it does not hold {OPTIONS}"
        raise UserError(f"{folder} is not the folder of a run: {hint}")
    options, own = read_options(str(folder / OPTIONS)), folder / DATASET
    return find_dataset(str(own) if own.is_file() else str(options.get("dataset"))), options
