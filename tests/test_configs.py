"""Every YAML file under configs/ goes through the real parser, and its head names commands that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from clipfusionvad import options
from clipfusionvad.commands.prepare import option_file_of
from clipfusionvad.datasets import DATASETS, find_dataset
from clipfusionvad.errors import UserError
from clipfusionvad.models import method_names
from clipfusionvad.report.table import published

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PAIRS = {path.stem for path in (ROOT / "configs").glob("*.yaml")}


def datasets_of(path: Path) -> list[str]:
    """The datasets that the file's name says; those with an option file where it says none."""
    return [name for name in DATASETS if name in path.stem.split("_")] or ["ucf", "xd"]


def parse(dataset: str, argv: list[str]):
    return option_file_of(find_dataset(dataset)).parse_args(argv)


def head_of(path: Path) -> list[str]:
    return [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]


each_config = pytest.mark.parametrize(
    "path", CONFIGS, ids=[p.relative_to(ROOT / "configs").as_posix() for p in CONFIGS]
)
cases = [(path, dataset) for path in CONFIGS for dataset in datasets_of(path)]
each_case = pytest.mark.parametrize(("path", "dataset"), cases, ids=[f"{path.stem}-{name}" for path, name in cases])


def test_there_is_a_config_for_every_published_pair_and_ablations():
    pairs = {f"{method}_{name}" for method in method_names() for name in DATASETS if published(method, name)}
    assert pairs == PAIRS
    assert any(path.parent.name == "ablations" for path in CONFIGS)


@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_a_published_pair_needs_no_config(pair):
    """Naming method and dataset is enough: the pair's file is read by itself, and flags still win."""
    method, dataset = pair.split("_")
    args = parse(dataset, ["--method", method])
    for key, value in yaml.safe_load((ROOT / "configs" / f"{pair}.yaml").read_text(encoding="utf-8")).items():
        assert getattr(args, key) == value, key
    assert parse(dataset, ["--method", method, "--max-epoch", "3"]).max_epoch == 3


@each_case
def test_says_what_the_parser_understands(path, dataset):
    args = parse(dataset, ["--config", str(path)])
    for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        assert getattr(args, key) == value


@each_case
def test_holds_only_what_differs_from_the_option_file(path, dataset, monkeypatch, tmp_path):
    if path.stem in PAIRS:  # those that are read by themselves; all others go over them
        monkeypatch.setattr(options, "CONFIGS", tmp_path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    plain = parse(dataset, ["--method", content.get("method", "clipfusionvad")])
    for key in content.keys() - {"method"}:
        assert content[key] != getattr(plain, key), f"{path.name}: {key} is the default"


@each_case
def test_unknown_key_is_refused_with_the_nearest_known_one(path, dataset, tmp_path):
    spoiled = tmp_path / path.name
    spoiled.write_text(path.read_text(encoding="utf-8") + "max_epohc: 3\n", encoding="utf-8")
    with pytest.raises(UserError, match="unknown key 'max_epohc'.*'max_epoch'"):
        parse(dataset, ["--config", str(spoiled)])


@each_config
def test_head_names_commands_that_exist(path):
    commands = [found.group() for line in head_of(path) if (found := re.search(r"python .*", line))]
    trained = set()
    for command in commands:
        _, script, *argv = shlex.split(command)
        if script == "-m":
            (_, action, _, dataset), argv = argv[:4], argv[4:]
        else:
            found = re.fullmatch(r"(ucf|xd)_(train|test)\.py", script)
            assert found and (ROOT / script).is_file(), command
            dataset, action = found.groups()
        argv = [str(ROOT / word) if word.startswith("configs/") else word for word in argv]
        args = parse(dataset, argv)
        if action == "train":
            assert args.config == str(path), f"{path.name} gives a command for another file: {command}"
            trained.add(dataset)
    assert sorted(trained) == datasets_of(path)


@each_config
def test_head_says_purpose_features_and_published_figure(path):
    head = "\n".join(head_of(path))
    assert head and "Features:" in head and re.search(r"Published: .*(\d|no published figure)", head)


def test_every_flag_of_an_ablation_changes_one_component():
    """An ablation file is one comparison: it sets one thing (a template also says that prompts are fixed)."""
    for path in CONFIGS:
        if path.parent.name == "ablations":
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            assert len(content.keys() - {"prompt_template"}) == 1, path.name
