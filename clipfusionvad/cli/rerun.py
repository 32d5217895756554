"""Repeat a run from its record, and report whether the numbers match."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipfusionvad.cli.options import option_file_of
from clipfusionvad.cli.parser import Parser
from clipfusionvad.cli.test import test
from clipfusionvad.cli.train import train
from clipfusionvad.engine.config import recorded
from clipfusionvad.io.option import add_arguments, declared_options, from_arguments
from clipfusionvad.tools.rerun import RerunOptions

if TYPE_CHECKING:
    from clipfusionvad.tools.rerun.record import RunRecord


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)

    from clipfusionvad.tools.rerun.repeat import rerun

    return rerun(args.run, from_arguments(RerunOptions, vars(args)), _resolve, _start)


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad rerun", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run (of several seeds too), or of a test")
    add_arguments(parser, declared_options(RerunOptions).values())
    return parser


def _resolve(argv: list[str], record: RunRecord) -> Mapping[str, Any]:
    return recorded(vars(option_file_of(record.dataset).parse_args(argv)))


def _start(argv: list[str], record: RunRecord) -> int:
    option_file = option_file_of(record.dataset)
    return test(argv, option_file) if record.is_test else train(option_file.parse_args(argv), record.dataset)
