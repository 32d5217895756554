"""Finds the option file of a dataset: NAME_option.py where there is one, else general options."""

import importlib
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from clipfusionvad.cli.options import parse_options
from clipfusionvad.cli.parser import Parser
from clipfusionvad.datasets import DATASETS, Dataset, find_dataset
from clipfusionvad.models import method_names


class OptionFile(Protocol):
    """What an option file such as ``ucf_option.py`` offers."""

    DATASET: Dataset

    def parse_args(self, argv: Sequence[str] | None = None, stored: Mapping[str, Any] | None = None) -> Namespace: ...


class GeneralOptions:
    """The options of a dataset without an option file."""

    def __init__(self, dataset: Dataset):
        self.DATASET = dataset

    def parse_args(self, argv: Sequence[str] | None = None, stored: Mapping[str, Any] | None = None) -> Namespace:
        return parse_options(argv, self.DATASET, _general_lines(self.DATASET), stored)


def _general_lines(dataset: Dataset) -> dict[str, Any]:
    lists, truth = dataset.list_files, dataset.truth_files
    return {
        "seed": 234,
        "method": "clipfusionvad",
        "classes_num": len(dataset.classes),
        "embed_dim": 512,
        "visual_width": 512,
        "max_epoch": 10,
        "batch_size": 64,
        "balanced": True,
        "lr": 2e-5,
        "scheduler_rate": 0.1,
        "scheduler_milestones": [4, 8],
        "eval_every": 0,
        "select": "auc1",
        "model_path": f"model/model_{dataset.name}.pth",
        "checkpoint_path": f"model/checkpoint_{dataset.name}.pth",
        "train_list": f"list/{lists['train']}",
        "test_list": f"list/{lists['test']}",
        "gt_path": f"list/{truth['frames']}",
        "gt_segment_path": f"list/{truth['segments']}",
        "gt_label_path": f"list/{truth['labels']}",
    }


def option_file_of(dataset: Dataset) -> OptionFile:
    """Return the module ``NAME_option``, or the general options of a dataset that has none."""
    name = f"{dataset.name}_option"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    return GeneralOptions(dataset)


def find_option_file(command: str, argv: Sequence[str]) -> tuple[OptionFile, list[str]]:
    """Return the option file of the dataset that ``--dataset`` names, and the rest of the command line."""
    parser = Parser(
        prog=f"clipfusionvad {command}",
        usage="%(prog)s --dataset NAME [options]",
        description=f"Defaults differ by dataset, options by method ({', '.join(method_names())}): "
        f"with --dataset and --method, --help lists them all.",
        add_help=False,
    )
    names = f"{', '.join(DATASETS)}, or a YAML file of your own"
    parser.add_argument("--dataset", metavar="NAME", help=names)
    known, rest = parser.parse_known_args(argv)
    if known.dataset is None and {"-h", "--help"} & set(rest):
        parser.print_help()
        sys.exit(0)
    if known.dataset is None:
        parser.error(f"--dataset is needed, one of: {names}; with it, --help lists all options")
    return option_file_of(find_dataset(known.dataset)), rest
