"""Print a script that lets a shell complete commands and options: eval "$(clipfusionvad completion bash)"."""

import importlib
from argparse import ArgumentParser

import shtab

from clipfusionvad.cli import command_names, summary, typed
from clipfusionvad.cli.options import build_parser
from clipfusionvad.cli.parser import Parser
from clipfusionvad.datasets import DATASETS
from clipfusionvad.models import find_method, method_names

# Commands that take the options of a training or a test too; those of all datasets are the same.
_TRAINING = {"doctor", "insight", "pack", "sweep", "test", "train", "uncertainty"}


def main(argv: list[str]) -> int:
    shell = make_parser().parse_args(argv).shell
    everything, dataset = ArgumentParser(prog="clipfusionvad"), next(iter(DATASETS.values()))
    commands, methods = everything.add_subparsers(), list(map(find_method, method_names()))
    for name in command_names():
        module = importlib.import_module(f"clipfusionvad.cli.{name}")
        own = [module.make_parser()] if hasattr(module, "make_parser") else []
        known = {flag for parser in own for action in parser._actions for flag in action.option_strings}
        made = commands.add_parser(typed(name), parents=own, help=summary(name), add_help="--help" not in known)
        if name in _TRAINING and "--dataset" not in known:
            made.add_argument("--dataset", choices=list(DATASETS), help="which dataset")
        for method in methods if name in _TRAINING else ():
            for action in build_parser(dataset, method)._actions:
                if not made._option_string_actions.keys() & set(action.option_strings):
                    made._add_action(action)
    print(shtab.complete(everything, shell))
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad completion", description=__doc__)
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="the shell")
    return parser
