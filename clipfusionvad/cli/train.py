"""Train a method on a dataset."""

import argparse

from clipfusionvad.cli.options import find_option_file, settings_of
from clipfusionvad.datasets import Dataset


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("train", argv)
    return train(option_file.parse_args(rest), option_file.DATASET)


def train(args: argparse.Namespace, dataset: Dataset, to_continue: str | None = None) -> int:
    """Run one training, or one for each of ``--seeds``, from checked options; return the exit code.

    ``to_continue`` is what to do after an interruption, if another command runs the training.
    """
    from clipfusionvad.cli.training import run_training

    return run_training(settings_of(args, dataset), to_continue)
