"""Configs, dataset files, and options of segments and crops."""

from __future__ import annotations

import math
import random
from typing import Any

import yaml

from clipfusionvad.cli.option_files import option_file_of
from clipfusionvad.cli.options import build_parser
from clipfusionvad.datasets import DATASETS, find_dataset
from clipfusionvad.io.errors import run_main
from clipfusionvad.models import find_method, method_names
from fuzz.case import Case, end, read_or_refuse, require, run_command
from fuzz.mutate import damage, disturb, odd_value

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
    argv = ["--method", method, "--config", str(path)]
    parsed: list[Any] = []
    outcome = run_command(
        case, argv, lambda argv: run_main(lambda: parsed.append(option_file_of(dataset).parse_args(argv)))
    )
    if parsed:
        said = yaml.safe_load(content) or {}
        # The command line says another method.
        for key, value in [pair for pair in said.items() if pair[0] != "method"]:
            got = getattr(parsed[0], str(key).replace("-", "_"))
            require(_same(got, value), f"{key}: {value!r} became {got!r}")
    return end(outcome)


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
        argv = [
            "lists",
            "--dataset",
            path,
            "--features",
            case.seeds / "data" / "ucf" / "features",
            "--output",
            case.folder / "out",
        ]
        return end(run_command(case, argv))

    def check(dataset: Any) -> None:
        require(len(dataset.classes) >= 2 and 0 < dataset.fps < math.inf and dataset.test_crop >= 0, f"{dataset}")
        require(
            all(isinstance(word, str) and word.strip() for pair in dataset.classes.items() for word in pair), "classes"
        )
        dataset.label_of("fall_12__x", "Theft")
        require(dataset.encode(dataset.labels[-1]).sum() >= 1, "encode")

    return read_or_refuse(lambda: find_dataset(str(path)), check)
