"""Any value for any option: command lines, configs, and dataset files."""

import argparse
import math
import random
from contextlib import suppress
from typing import Any
from unittest import mock

import yaml
from tiny import Tiny

from clipfusionvad.cli import compare_features, detect, export, extract, lists, report, table
from clipfusionvad.cli.options import build_parser, option_file_of
from clipfusionvad.cli.parser import Parser
from clipfusionvad.datasets import DATASETS, find_dataset
from clipfusionvad.io.errors import run_main
from clipfusionvad.models import find_method, method_names
from fuzz.case import TOY_ENCODER, Case, read_or_refuse, require
from fuzz.models import until_training
from fuzz.mutate import ODD_TEXTS, damage, disturb, odd_value

OWN = {
    "extract": extract,
    "detect": detect,
    "lists": lists,
    "report": report,
    "table": table,
    "export": export,
    "compare-features": compare_features,
}


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

    def note(self: Parser, *args: Any) -> None:
        made.append(self)
        raise InterruptedError

    with mock.patch.object(Parser, "parse_args", note), suppress(InterruptedError):
        module.main([])
    return made[0]


def parsed(case: Case) -> str:
    """Only taken or refused, for any number of odd values."""
    rng = case.rng
    if rng.random() < 0.4:
        parser = parser_of(OWN[rng.choice(list(OWN))])
        return case.run(*some_flags(parser._actions, rng), main=lambda argv: parser.parse_args(argv) and 0)
    dataset, method = DATASETS[rng.choice(list(DATASETS))], rng.choice(method_names())
    flags = some_flags(build_parser(dataset, find_method(method))._actions, rng)
    parse = option_file_of(dataset).parse_args
    return case.run("--method", method, *flags, main=lambda argv: run_main(lambda: parse(argv) and 0))


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
        return case.run(name, *_needed(name, case), *some_flags(actions, rng, 2), codes=(0, 1))
    method = rng.choice(["clipfusionvad", "anomalyclip", "iefvad"])
    tiny = Tiny("ucf", case.seeds / "data" / "ucf", case.folder, [], method)
    case.copy(f"models/{method}.pth", "model.pth")
    flags = tiny.train_flags("--packed-dir", case.folder) if name in ("train", "pack") else tiny.test_flags()
    if name == "test" and method == "anomalyclip":
        flags += ["--frames-per-snippet", "1"]
    actions = build_parser(DATASETS["ucf"], find_method(method))._actions
    chosen = some_flags([action for action in actions if action.dest not in LONG], rng, 2)
    return case.run(name, "--dataset", "ucf", *flags, *chosen, main=until_training)


def _needed(name: str, case: Case) -> list[Any]:
    """Valid arguments of a command."""
    home, out, tested = case.seeds / "data" / "ucf", case.folder / "out", case.seeds / "runs" / "test"
    video, model = case.seeds / "videos" / "a.mp4", case.seeds / "models" / "iefvad.pth"
    toy = ["--clip", "toy", "--event-clip", "toy", "--device", "cpu"]
    truth = ["--annotations", home / "truth.csv"]
    return {
        "extract": ["--videos", video, "--output", out, *TOY_ENCODER],
        "detect": [video, "--checkpoint", model, "--output", out, *toy, "--video", "none"],
        "lists": ["--dataset", "ucf", "--features", home / "features", "--output", out, *truth],
        "report": [tested, "--output", case.folder / "page.html"],
        "table": [tested, "--bootstrap", 20, "--output", case.folder / "table.md"],
        "export": [model, "--output", out / "m.pth"],
        "compare-features": [home / "features", home / "features"],
    }[name]


BOMBS = [
    "lr: " + "[" * 3000,
    "lr: " + "[" * 400 + "]" * 400,
    "lr: 1\nlr: 2\n",
    "a: &a {lr: 1}\n<<: *a\n",
    "? [lr, 2]\n: 3\n",
    "? {a: 1}\n: 3\n",
    "lr: &a [*a]\n",
    "&a lr: *a\n",
    "lr: !!binary abc\n",
    "lr: !!set {a}\n",
    "lr: !!omap [a: 1]\n",
    "lr: 1:30:30\n",
    "lr: 2001-01-01\n",
    "lr: !!python/name:os.system\n",
    "lr: " + "9" * 5000,
    "train_list: 'a\\0b'\n",
    'output_dir: "a\\0b"\n',
    "%YAML 9.9\n---\nlr: 1\n",
    "lr: 1\n---\nlr: 2\n",
    "\ufefflr: 1e-4\n",
    "lr: 1\u2028seed: 2",
]


def _yaml(value: Any, rng: random.Random) -> bytes:
    text = yaml.safe_dump(value, allow_unicode=rng.random() < 0.5, default_flow_style=rng.choice([True, False, None]))
    content = text.encode("utf-8", "replace")
    return damage(content, rng) if rng.random() < 0.4 else content


def configs(case: Case) -> str:
    rng = case.rng
    dataset, method = DATASETS[rng.choice(list(DATASETS))], rng.choice(method_names())
    if rng.random() < 0.15:
        content = rng.choice(BOMBS).encode()
    else:
        actions = [a for a in build_parser(dataset, find_method(method))._actions if a.option_strings]
        chosen = rng.sample(actions, rng.choice([1, 1, 2, 5]))
        config = {action.dest: a_value(action, rng) for action in chosen}
        content = _yaml(disturb(config, rng) if rng.random() < 0.3 else config, rng)
    path = case.put("config.yaml", content)
    found: list[Any] = []
    parse = option_file_of(dataset).parse_args
    flags = ["--method", method, "--config", path]
    outcome = case.run(*flags, main=lambda argv: run_main(lambda: found.append(parse(argv))))
    for key, value in (yaml.safe_load(content) or {}).items() if found else ():
        # The command line sets another method.
        if key != "method":
            got = getattr(found[0], str(key).replace("-", "_"))
            require(_same(got, value), f"{key}: {value!r} became {got!r}")
    return outcome


def a_value(action: Any, rng: random.Random) -> Any:
    """A value for an option: one of its choices, one near its default, or an odd one."""
    if rng.random() < 0.3:
        return odd_value(rng)
    if action.choices and rng.random() < 0.8:
        return rng.choice(list(action.choices))
    if action.nargs == 0:
        return rng.choice([True, False])
    one = rng.choice([0, 1, 2, 0.5, 64, 1e-3, "x", "cpu", 3])
    return [one, rng.choice([1, 2, 0.5])] if action.nargs in ("+", "*", 2) else one


def _same(got: Any, value: Any) -> bool:
    if isinstance(got, list):
        value = value if isinstance(value, list) else [value]
        return len(got) == len(value) and all(map(_same, got, value))
    if isinstance(got, float):
        # YAML takes 1e-4, without a point, for text; the option is a number all the same.
        return math.isclose(got, float(value))
    return got == value or str(got) == str(value) or (isinstance(got, int) and got == float(value))


def dataset_files(case: Case) -> str:
    rng = case.rng
    text = (case.seeds / "shop.yaml").read_text()
    if rng.random() < 0.15:
        content = (text + rng.choice(BOMBS)).encode()
    elif rng.random() < 0.6:
        content = _yaml(disturb(yaml.safe_load(text), rng), rng)
    else:
        content = damage(text.encode(), rng)
    path = case.put("shop.yaml", content)
    if rng.random() < 0.1:
        features = case.seeds / "data" / "ucf" / "features"
        return case.run("lists", "--dataset", path, "--features", features, "--output", case.folder / "out")

    def check(dataset: Any) -> None:
        require(len(dataset.classes) >= 2 and 0 < dataset.fps < math.inf and dataset.test_crop >= 0, f"{dataset}")
        words = [word for pair in dataset.classes.items() for word in pair]
        require(all(isinstance(word, str) and word.strip() for word in words), "classes")
        dataset.label_of("fall_12__x", "Theft")
        require(dataset.encode(dataset.labels[-1]).sum() >= 1, "encode")

    return read_or_refuse(lambda: find_dataset(str(path)), check)
