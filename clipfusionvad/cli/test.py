"""Test a model file, ours or a released one."""

from collections.abc import Sequence

from clipfusionvad.cli.options import OptionFile, find_option_file


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("test", argv)
    return test(rest, option_file)


def test(argv: Sequence[str] | None, option_file: OptionFile) -> int:
    """Parse the options, over those that the checkpoint was trained with, and run the test; return the exit code."""
    from clipfusionvad.cli.trained_model import parse_over_checkpoint

    settings, file = parse_over_checkpoint(argv, option_file)
    from clipfusionvad.cli.testing import run_test

    return run_test(settings, file)
