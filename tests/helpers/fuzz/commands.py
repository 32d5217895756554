"""Command lines: any value for any option of any command."""

from __future__ import annotations

import argparse
import random
from typing import Any
from unittest import mock

from tiny import Tiny, strings

from clipfusionvad.cli import compare_features, detect, export, extract, lists, report, table
from clipfusionvad.cli.options import build_parser
from clipfusionvad.cli.parser import Parser
from clipfusionvad.datasets import DATASETS
from clipfusionvad.models import find_method, method_names
from fuzz.case import Case, end, run_command
from fuzz.models import until_training
from fuzz.mutate import ODD_TEXTS, odd_value

OWN = {
    "extract": extract,
    "detect": detect,
    "lists": lists,
    "report": report,
    "table": table,
    "export": export,
    "compare-features": compare_features,
}
OVER_OPTIONS = ["train", "test", "pack", "uncertainty"]


class Parsed(Exception):
    """The command line was taken."""


def a_word(action: argparse.Action, rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.3 and action.choices:
        return str(rng.choice(list(action.choices)))
    if kind < 0.5:
        return str(rng.choice([0, 1, 2, 3, 0.5, 64, 1e-4, "cpu", "auto", "toy"]))
    if kind < 0.6:
        # Bytes that are no text, as Python hands them over.
        return "a\udcff\udcfeb"
    return str(odd_value(rng) if rng.random() < 0.5 else rng.choice(ODD_TEXTS)).replace("\0", "")


def some_flags(actions: list[argparse.Action], rng: random.Random, most: int = 4) -> list[str]:
    argv: list[str] = []
    for action in rng.sample(actions, rng.randrange(1, min(most, len(actions)) + 1)):
        flag = rng.choice(action.option_strings) if action.option_strings else None
        words = [] if action.nargs == 0 else [a_word(action, rng) for _ in range(2 if action.nargs == 2 else 1)]
        if action.nargs in ("+", "*"):
            words *= rng.choice([1, 2])
        if flag and len(words) == 1 and rng.random() < 0.5:
            argv.append(f"{flag}={words[0]}")
        else:
            argv += [flag, *words] if flag else words
    if rng.random() < 0.1:
        argv.insert(rng.randrange(len(argv) + 1), rng.choice(["--x", "-", "--", "stray", "--=", "-h=3", "\udcff"]))
    return [word for word in argv if word not in ("-h", "--help")]


def parser_of(module: Any) -> Parser:
    """The parser that a command makes for itself."""
    made: list[Parser] = []

    def note(self: Parser, args: Any = None, namespace: Any = None) -> None:
        made.append(self)
        raise Parsed

    with mock.patch.object(Parser, "parse_args", note):
        try:
            module.main([])
        except Parsed:
            pass
    return made[0]


def parsed(case: Case) -> str:
    """Only taken or refused, for any number of odd values."""
    rng = case.rng
    if rng.random() < 0.4:
        name = rng.choice(list(OWN))
        parser = parser_of(OWN[name])
        argv = some_flags(parser._actions, rng)
        return end(run_command(case, argv, lambda argv: parser.parse_args(argv) and 0))
    dataset, method = DATASETS[rng.choice(list(DATASETS))], rng.choice(method_names())
    actions = build_parser(dataset, find_method(method))._actions
    from clipfusionvad.cli.option_files import option_file_of

    argv = ["--method", method, *some_flags(actions, rng)]
    return end(run_command(case, argv, _parsing(lambda argv: option_file_of(dataset).parse_args(argv))))


def _parsing(parse: Any) -> Any:
    from clipfusionvad.io.errors import run_main

    return lambda argv: run_main(lambda: parse(argv) and 0)


# Options whose large values are honest wishes for more time or memory.
LONG = set(
    "max_epoch num_refinement_steps workers device compile demo stream timeout ray_address engine "
    "shard curve_pictures levels seeds clip event_clip annotated bootstrap readme".split()
)


def ran(case: Case) -> str:
    """The whole command on a small dataset, up to the first step of a training."""
    rng = case.rng
    name = rng.choice(["train", "train", "test", "test", "pack", *OWN])
    if name in OWN:
        actions = [action for action in parser_of(OWN[name])._actions if action.dest not in LONG]
        return end(run_command(case, [name, *_needed(name, case), *some_flags(actions, rng, 2)], codes=(0, 1)))
    method = rng.choice(["clipfusionvad", "anomalyclip", "iefvad"])
    home = case.seeds / "data" / "ucf"
    tiny = Tiny("ucf", home, case.folder, [], method)
    (case.folder / "model.pth").write_bytes((case.seeds / "models" / f"{method}.pth").read_bytes())
    flags = tiny.train_flags("--packed-dir", case.folder) if name in ("train", "pack") else tiny.test_flags()
    if name == "test" and method == "anomalyclip":
        flags += ["--frames-per-snippet", "1"]
    actions = build_parser(DATASETS["ucf"], find_method(method))._actions
    chosen = some_flags([action for action in actions if action.dest not in LONG], rng, 2)
    return end(run_command(case, [name, "--dataset", "ucf", *flags, *chosen], until_training))


def _needed(name: str, case: Case) -> list[str]:
    home, out = case.seeds / "data" / "ucf", case.folder / "out"
    video, model = case.seeds / "videos" / "a.mp4", case.seeds / "models" / "iefvad.pth"
    toy = ["--clip", "toy", "--device", "cpu"]
    return strings(
        {
            "extract": ["--videos", video, "--output", out, *toy, "--embed-dim", 64, "--crops", 1],
            "detect": [video, "--checkpoint", model, "--output", out, *toy, "--event-clip", "toy", "--video", "none"],
            "lists": [
                "--dataset",
                "ucf",
                "--features",
                home / "features",
                "--output",
                out,
                "--annotations",
                home / "truth.csv",
            ],
            "report": [case.seeds / "runs" / "test", "--output", case.folder / "page.html"],
            "table": [case.seeds / "runs" / "test", "--bootstrap", 20, "--output", case.folder / "table.md"],
            "export": [model, "--output", out / "m.pth"],
            "compare-features": [home / "features", home / "features"],
        }[name]
    )
