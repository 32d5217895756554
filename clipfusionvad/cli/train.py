"""Train a method on a dataset."""

import argparse
from pathlib import Path
from typing import Any

from clipfusionvad.cli.options import find_option_file, settings_of
from clipfusionvad.datasets import Dataset
from clipfusionvad.io.provenance import Sources


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("train", argv)
    return train(option_file.parse_args(rest), option_file.DATASET)


def train(args: argparse.Namespace, dataset: Dataset) -> int:
    """Run one training, or one for each of ``--seeds``, from checked options; return the exit code."""
    from clipfusionvad.cli.training import run_training

    return run_training(settings_of(args, dataset))


def summarise_runs(args: argparse.Namespace, dataset: Dataset, folder: Path, sources: Sources) -> dict[str, Any]:
    """Write the summary of the runs of several seeds in a folder, as a training with ``--seeds`` does."""
    from clipfusionvad.cli.training import write_summary

    return write_summary(settings_of(args, dataset), folder, sources)
