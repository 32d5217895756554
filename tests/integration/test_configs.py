"""Every YAML file under configs/ goes through the real parser and trains, and its head names commands that exist."""

import math
import re
import shlex
from pathlib import Path

import pytest
import yaml
from tiny import make_tiny, skip_without_packages

from clipfusionvad.cli import sweep
from clipfusionvad.cli.options import build_parser, config_tokens, find_method, option_file_of, settings_of
from clipfusionvad.cli.training import build_trainer, read_training_data
from clipfusionvad.data.loaders import load_batches
from clipfusionvad.datasets import DATASETS, find_dataset
from clipfusionvad.engine.device import pick_device
from clipfusionvad.engine.setup import find_normal_centroid
from clipfusionvad.io import option
from clipfusionvad.models import method_names
from clipfusionvad.report.table import published
from clipfusionvad.tools.sweep.plan import PRINTED, read_sweep

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PAIRS = {path.stem for path in (ROOT / "configs").glob("*_*.yaml")}
# Read for a pair that was not published, and by --demo.
GENERAL = [
    path for path in CONFIGS if path.parent.name in ("configs", "demo") and path.stem not in {*PAIRS, "comparison"}
]
# All but those, and but older names of files.
DESCRIBED = [path for path in CONFIGS if path not in GENERAL and path.parent.name != "variants"]
DEFAULT_METHOD = "clipfusionvad"


def content_of(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


SWEEPS = [path for path in CONFIGS if "cells" in content_of(path)]
SINGLE = [path for path in CONFIGS if path not in SWEEPS]


def datasets_of(path: Path) -> list[str]:
    """The datasets in the file's name; all for general settings, else those with an option file."""
    if path in GENERAL and path.parent.name != "demo":
        return list(DATASETS)
    return [name for name in DATASETS if name in path.stem.split("_")] or ["ucf", "xd"]


def settings_in(path: Path) -> dict[str, dict]:
    """The options that a file sets, the method among them; of a sweep those of every cell by its name."""
    content = content_of(path)
    if path not in SWEEPS:
        return {path.stem: content}
    cells = read_sweep([str(path)], full=False).cells
    return {cell.name: {"method": content.get("method", DEFAULT_METHOD), **cell.options} for cell in cells}


def parse(dataset: str, argv: list[str]):
    return option_file_of(find_dataset(dataset)).parse_args(argv)


def tokens_of(dataset: str, setting: dict) -> list[str]:
    method = setting.get("method", DEFAULT_METHOD)
    own = build_parser(find_dataset(dataset), find_method(method))
    return config_tokens(own, {"method": method, **setting}, "a cell")


def head_of(path: Path) -> list[str]:
    return [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=[p.relative_to(ROOT / "configs").as_posix() for p in paths])


def cases(paths):
    pairs = [(path, dataset) for path in paths for dataset in datasets_of(path)]
    ids = [f"{path.stem}-{name}" for path, name in pairs]
    return pytest.mark.parametrize(("path", "dataset"), pairs, ids=ids)


def test_there_is_a_config_for_every_published_pair_and_ablations():
    pairs = {f"{method}_{name}" for method in method_names() for name in DATASETS if published(method, name)}
    assert pairs <= PAIRS
    tables = {content_of(path).get("method") for path in SWEEPS} - {None}
    assert tables == {pair.rsplit("_", 1)[0] for pair in pairs}


@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_a_published_pair_needs_no_config(pair):
    """Naming method and dataset is enough: the pair's file is read automatically, and flags still win."""
    method, dataset = pair.rsplit("_", 1)
    args = parse(dataset, ["--method", method])
    for key, value in content_of(ROOT / "configs" / f"{pair}.yaml").items():
        assert getattr(args, key) == value, key
    assert parse(dataset, ["--method", method, "--max-epoch", "3"]).max_epoch == 3


@cases(CONFIGS)
def test_says_what_the_parser_understands(path, dataset):
    for setting in settings_in(path).values():
        argv = tokens_of(dataset, setting) if path in SWEEPS else ["--config", str(path)]
        args = parse(dataset, argv)
        for key, value in setting.items():
            assert getattr(args, key) == value


@named(CONFIGS)
def test_holds_only_what_differs_from_the_option_file(path, monkeypatch, tmp_path):
    """A cell, or a general setting, may be the default of one dataset, if it is not that of another."""
    if path.parent.name == "configs":  # read automatically; all others override them
        monkeypatch.setattr(option, "CONFIGS", tmp_path)
    for name, setting in settings_in(path).items():
        plain = [parse(dataset, ["--method", setting.get("method", DEFAULT_METHOD)]) for dataset in datasets_of(path)]
        for key in setting.keys() - {"method"}:
            changes = [setting[key] != getattr(args, key) for args in plain]
            assert any(changes) if path in SWEEPS + GENERAL else all(changes), f"{name}: {key} is the default"


@named(DESCRIBED)
def test_head_names_commands_that_exist(path):
    commands = [found.group() for line in head_of(path) if (found := re.search(r"python .*", line))]
    used = set()
    for command in commands:
        _, script, *argv = shlex.split(command)
        argv = [str(ROOT / word) if word.startswith("configs/") else word for word in argv]
        if script == "-m" and argv[1] == "sweep":
            args, rest = sweep.make_parser().parse_known_args(argv[2:])
            assert args.configs == [str(path)] and not rest
            used.add(args.dataset)
            continue
        if script == "-m":
            (_, action, _, dataset), argv = argv[:4], argv[4:]
        else:
            found = re.fullmatch(r"(ucf|xd)_(train|test)\.py", script)
            assert found and (ROOT / script).is_file(), command
            dataset, action = found.groups()
        args = parse(dataset, argv)
        if action == "train":
            assert args.config == str(path), f"{path.name} gives a command for another file: {command}"
            used.add(dataset)
    assert sorted(used) == datasets_of(path)


@named(SWEEPS)
def test_figures_of_a_table_are_all_there_or_none_is(path):
    """What the head says is published is, for every cell, of the dataset in the file's name; full is the pair's."""
    content, cells = content_of(path), read_sweep([str(path)]).cells
    if "published" not in content:
        assert all(cell.published is None for cell in cells) and "no published figure" in " ".join(head_of(path))
        return
    assert [content["dataset"]] == datasets_of(path)
    assert all(cell.published and set(cell.published.figures) <= {*PRINTED} for cell in cells)
    known = published(content["method"], content["dataset"])
    for metric, value in content["published"].items():
        assert math.isclose(value, known[metric] * (1 if metric.startswith("map") else 100))


# Of the tiny data and its models: sizes are divided, or cut off, which leaves cells different where it can.
DIVIDED = {"emb_size": 8, "num_refinement_steps": 2, "visual_length": 2, "glimpse_window": 2}
# What the tiny data decides.
OF_DATA = {"visual_width", "frames_per_snippet"}
AT_MOST = {"attn_window": 32, "batch_size": 1, "warmup_epochs": 0}
# A table that is of no dataset is trained on one.
TRAINED = [(path, dataset) for path in DESCRIBED for dataset in datasets_of(path)[: 1 if path in SWEEPS else None]]


def shrunk(setting: dict) -> dict:
    setting = {"batch_size": 1} | {key: value for key, value in setting.items() if key not in OF_DATA}
    small = {key: value // DIVIDED.get(key, 1) if key in DIVIDED else value for key, value in setting.items()}
    small |= {key: min(value, AT_MOST[key]) for key, value in setting.items() if key in AT_MOST}
    if "stream_folders" in small:
        small["stream_folders"] = ["features", "events"]
    return small


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    return {name: make_tiny(name, tmp_path_factory.mktemp(name) / "data") for name in DATASETS}


@pytest.fixture(scope="module")
def shared():
    """What trainings share, once for each method and dataset: lists, truth, CLIP."""
    return {}


@pytest.mark.parametrize(("path", "dataset"), TRAINED, ids=[f"{path.stem}-{dataset}" for path, dataset in TRAINED])
def test_two_steps_can_be_trained(path, dataset, tiny_data, shared):
    for name, setting in settings_in(path).items():
        method = setting.get("method", DEFAULT_METHOD)
        skip_without_packages(method)
        flags = tiny_data[dataset].of(method).train_flags("--no-check")
        args = parse(dataset, [*flags, *tokens_of(dataset, shrunk(setting))])
        settings = settings_of(args, find_dataset(dataset))
        if (method, dataset) not in shared:
            shared[method, dataset] = read_training_data(settings, pick_device("cpu"))
        trainer, entries = build_trainer(settings, shared[method, dataset])
        find_normal_centroid(trainer.model, entries, find_dataset(dataset))
        learned = {key: value for key, value in trainer.model.named_parameters() if value.requires_grad}
        if not trainer.model.trained:
            pytest.skip(f"{method} has nothing to train")
        before = {key: value.detach().clone() for key, value in learned.items()}
        plan = trainer.batch_sampler.epoch(0)
        for rows, batch in zip(plan[:2], load_batches(trainer.bags, plan, workers=0), strict=False):
            losses, _ = trainer._step(*batch, len(rows))
            assert losses and all(value.isfinite() for value in losses.values()), name
        assert any((value != before[key]).any() for key, value in learned.items()), name
