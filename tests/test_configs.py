"""Every YAML file under configs/ goes through the real parser, and its head names commands that exist."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from clipfusionvad.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
DATASETS = ("ucf", "xd")


def datasets_of(path: Path) -> list[str]:
    """The datasets that the file's name says; both where it says none."""
    return [name for name in DATASETS if name in path.stem.split("_")] or list(DATASETS)


def parse(dataset: str, argv: list[str]):
    return importlib.import_module(f"{dataset}_option").parse_args(argv)


def head_of(path: Path) -> list[str]:
    return [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]


each_config = pytest.mark.parametrize(
    "path", CONFIGS, ids=[p.relative_to(ROOT / "configs").as_posix() for p in CONFIGS]
)
cases = [(path, dataset) for path in CONFIGS for dataset in datasets_of(path)]
each_case = pytest.mark.parametrize(("path", "dataset"), cases, ids=[f"{path.stem}-{name}" for path, name in cases])


def test_there_are_configs_for_every_pair_and_ablations():
    names = {path.stem for path in CONFIGS}
    assert names >= {f"{method}_{dataset}" for method in ("clipfusionvad", "vadclip") for dataset in DATASETS}
    assert any(path.parent.name == "ablations" for path in CONFIGS)


@each_case
def test_says_what_the_parser_understands(path, dataset):
    args = parse(dataset, ["--config", str(path)])
    for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        assert getattr(args, key) == value


@each_case
def test_holds_only_what_differs_from_the_option_file(path, dataset):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    plain = parse(dataset, ["--method", content.get("method", "clipfusionvad")])
    for key in content.keys() - {"method"}:
        assert content[key] != getattr(plain, key), f"{path.name}: {key} is the default"


@each_case
def test_unknown_key_is_refused_with_the_nearest_known_one(path, dataset, tmp_path):
    spoiled = tmp_path / path.name
    spoiled.write_text(path.read_text(encoding="utf-8") + "visual_lenght: 256\n", encoding="utf-8")
    with pytest.raises(UserError, match="unknown key 'visual_lenght'.*'visual_length'"):
        parse(dataset, ["--config", str(spoiled)])


@each_config
def test_head_names_commands_that_exist(path):
    commands = [found.group() for line in head_of(path) if (found := re.search(r"python .*", line))]
    trained = set()
    for command in commands:
        _, script, *argv = shlex.split(command)
        found = re.fullmatch(r"(ucf|xd)_(train|test)\.py", script)
        assert found and (ROOT / script).is_file(), command
        argv = [str(ROOT / word) if word.startswith("configs/") else word for word in argv]
        args = parse(found.group(1), argv)
        if found.group(2) == "train":
            assert args.config == str(path), f"{path.name} gives a command for another file: {command}"
            trained.add(found.group(1))
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
