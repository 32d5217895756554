"""README.md and docs/ keep what they promise: commands, flags, files, targets, imports and the Python examples."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from clipfusionvad import __main__ as program
from clipfusionvad import create_model
from clipfusionvad import models as methods
from clipfusionvad.cli import command_names
from clipfusionvad.cli.option_files import option_file_of
from clipfusionvad.data.annotations import read_annotations
from clipfusionvad.datasets import UCF, Dataset, find_dataset
from clipfusionvad.engine.checkpoint import state_without_clip
from clipfusionvad.io.files import write_torch
from clipfusionvad.models import method_names
from clipfusionvad.tools.tables.store import read_store, write_into_readme

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PACKAGE = ROOT / "clipfusionvad"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every command line in a page, continued lines joined and settings before it dropped."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for line in split if (words := [w for w in line if not re.fullmatch(r"[A-Z_]+=\S*", w)])]


CASES = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), CASES, ids=[f"{page.stem}: {' '.join(words)[:60]}" for page, words in CASES]
)
def test_command_exists_with_all_its_flags(page, words):
    tool, *rest = words
    if tool == "make":
        assert set(rest) <= make_targets(), words
    elif tool == "python":
        check_python(rest)
    elif tool == "torchrun":
        assert rest[0] == "--nproc-per-node"
        check_python(rest[2:])
    else:
        assert tool in {"git", "cd", "pip", ".", "tensorboard", "eval"}, f"{page.name}: unchecked command {words}"


def check_python(words: list[str]) -> None:
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
    if words[0] == "-m" and words[1] == "clipfusionvad":
        command, argv = (words[2], words[3:]) if not words[2].startswith("-") else (None, words[2:])
        if command in ("train", "test", "uncertainty", "pack"):
            at = argv.index("--dataset")
            parse_options(dataset_named(argv[at + 1]), argv[:at] + argv[at + 2 :])
        else:
            # What a sweep does not know itself goes to the training.
            more = flags_of_command("train", "--dataset", "ucf") if command == "sweep" else set()
            assert flags_in(argv) <= flags_of_command(command) | more
    elif words[0] == "-m":
        assert words[1] == "venv"
    else:
        script = ROOT / words[0]
        assert script.is_file(), words
        if script.parent.name == "list":
            assert flags_in(words[1:]) <= flags_of_command("lists")
        elif script.parent.name == "benchmarks":
            assert flags_in(words[1:]) <= set(re.findall(r"--[a-z][\w-]*", script.read_text(encoding="utf-8")))
        else:
            dataset, action = script.stem.split("_")
            assert action in ("train", "test")
            parse_options(find_dataset(dataset), [word for word in words[1:] if word != "--help"])


def dataset_named(name: str) -> Dataset:
    """A benchmark, or the dataset that docs/own-data.md describes in YAML."""
    if not name.endswith(".yaml"):
        return find_dataset(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_text(blocks(ROOT / "docs" / "own-data.md", "yaml")[0], encoding="utf-8")
        return find_dataset(str(path))


def parse_options(dataset: Dataset, argv: list[str]) -> None:
    """Through the script's own parser; options of a run that a page only speaks of cannot be read."""
    if "--config" in argv and not Path(argv[argv.index("--config") + 1]).is_file():
        at = argv.index("--config")
        assert argv[at + 1].startswith("runs/"), argv
        argv = argv[:at] + argv[at + 2 :]
    try:
        option_file_of(dataset).parse_args(argv)
    except SystemExit:
        pytest.fail(f"the options of {dataset.name} do not take {argv}")


def flags_in(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


@cache
def flags_of_command(name: str | None, *more: str) -> frozenset[str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        assert program.main([name, *more, "--help"] if name else ["--help"]) == 0
    return frozenset(re.findall(r"--[a-z][\w-]*", shown.getvalue()))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).is_file(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_flags_exist(page):
    known = {"--logdir"}
    own = (
        "lists",
        "demo",
        "export",
        "insight",
        "matrix",
        "extract",
        "detect",
        "report",
        "compare-features",
        "doctor",
        "sweep",
        "rerun",
        "table",
    )
    for command in own:
        known |= flags_of_command(command)
    for method in method_names():
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            assert program.main(["uncertainty", "--dataset", "ucf", "--method", method, "--help"]) == 0
        known |= set(re.findall(r"--[a-z][\w-]*", shown.getvalue()))
    named = set(re.findall(r"`(--[a-z][\w-]+)", page.read_text(encoding="utf-8")))
    assert named - {"--x", "--no-x"} <= known


def test_python_example_runs_with_the_toy_clip(tmp_path, monkeypatch, capsys):
    code = next(block for block in blocks(README, "python") if "create_model(" in block)
    assert '"ViT-B/16"' in code
    monkeypatch.chdir(tmp_path)
    model = create_model("clipfusionvad", class_prompts=UCF.prompts, clip="toy")
    write_torch("model/model_ucf.pth", state_without_clip(model))
    names: dict = {}
    exec(code.replace('"ViT-B/16"', '"toy"'), names)
    assert names["anomaly"].shape == (300,) and names["classes"].shape == (300, 14)
    assert "(2, 256, 1)" in "".join(capsys.readouterr().out.replace("torch.Size([", "(").replace("])", ")"))
    assert 0 <= names["found"]["average"] <= 100


def test_example_of_a_new_method_is_found_by_name(monkeypatch):
    code = next(block for block in blocks(README, "python") if "register_method" in block)
    monkeypatch.setitem(methods._METHODS, "plain", None)
    exec(code, {"__name__": "example"})
    sizes = {"embed_dim": 64, "visual_width": 64, "visual_length": 16}
    model = create_model("plain", class_prompts=UCF.prompts, clip="toy", **sizes)
    anomaly, classes = model.score_video(np.ones((20, 64), np.float32))
    assert anomaly.shape == (20,) and classes.shape == (20, 14)


@pytest.mark.parametrize(("language", "suffix"), [("text", ".csv"), ("json", ".json")])
def test_example_of_a_keyed_truth_file_is_read(language, suffix, tmp_path):
    path = tmp_path / f"truth{suffix}"
    path.write_text(blocks(ROOT / "docs" / "datasets.md", language)[0], encoding="utf-8")
    found = read_annotations(path, UCF)["Abuse028_x264"]
    assert found.segments == [(165, 240)] and found.labels == ["Abuse"] and found.frames == 1412


def house() -> dict[str, int]:
    """The floor of every part of the package in README's picture, counted from the top."""
    text = next(block for block in blocks(README, "text") if "clipfusionvad/\n" in block)
    names = re.findall(r"^  (\S+)", text.split("clipfusionvad/\n")[1], re.MULTILINE)
    return {name.removesuffix("/").removesuffix(".py"): floor for floor, name in enumerate(names)}


def test_picture_of_the_house_is_complete():
    there = {path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert house().keys() == {path.stem for path in there} - {"__init__"}


def test_picture_of_the_house_lists_the_commands():
    line = re.search(r"^  commands/\s+(.*?):", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL).group(1)
    assert set(line.split()) == {name.replace("_", "-") for name in command_names()}


def test_imports_run_down_the_picture():
    floors = house()
    for file in PACKAGE.rglob("*.py"):
        own = file.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if own == "__init__" or not isinstance(node, ast.ImportFrom):
                continue
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            for other in [name.split(".")[1] for name in names if name.startswith("clipfusionvad.")]:
                assert floors[own] <= floors[other], f"{file.name} imports from {other}, which is drawn above {own}"


def test_tables_of_results_are_those_of_the_store(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    write_into_readme(page, read_store(ROOT / "docs" / "results.csv"))
    assert page.read_text(encoding="utf-8") == README.read_text(encoding="utf-8"), (
        "make them: python -m clipfusionvad table --store docs/results.csv --readme README.md"
    )
