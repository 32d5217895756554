"""README.md and docs/ keep what they promise: commands, flags, files, targets, imports and the Python examples."""

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml

from clipfusionvad import __main__ as program
from clipfusionvad import create_model, models
from clipfusionvad.cli import command_names
from clipfusionvad.cli.options import option_file_of
from clipfusionvad.data.annotations import read_annotations
from clipfusionvad.datasets import UCF, Dataset, find_dataset, own_dataset
from clipfusionvad.engine.checkpoint import state_without_clip
from clipfusionvad.io.files import write_torch
from clipfusionvad.models import method_names
from clipfusionvad.tools.tables.store import read_store, write_into_page

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PACKAGE = ROOT / "clipfusionvad"
# Commands whose options are those of a dataset.
OF_A_DATASET = ("train", "test", "uncertainty", "pack")
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def example(language: str, words: str) -> str:
    """The first block of all pages that holds these words."""
    return next(block for page in PAGES for block in blocks(page, language) if words in block)


def commands(page: Path) -> list[list[str]]:
    """The words of every command line in a page, continued lines joined and settings before it dropped."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for line in split if (words := [w for w in line if not re.fullmatch(r"[A-Z_]+=\S*", w)])]


on_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@on_every_page
def test_commands_exist_with_all_their_flags(page, monkeypatch):
    for code in blocks(page, "python"):
        if "@register_method" in code:
            # Forgotten at the end of the test.
            monkeypatch.setitem(models._METHODS, re.search(r'name = "(\w+)"', code).group(1), None)
            exec(code, {"__name__": "example"})
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for tool, *rest in commands(page):
        if tool == "make":
            assert set(rest) <= set(targets), rest
        elif tool in ("python", "torchrun"):
            check_python(rest[2:] if rest[0] == "--nproc-per-node" else rest)
        else:
            assert tool in {"git", "cd", "pip", ".", "tensorboard", "eval"}, f"unchecked command {tool} {rest}"


def check_python(words: list[str]) -> None:
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
    if words[0] == "-m" and words[1] == "clipfusionvad":
        command, argv = (words[2], words[3:]) if not words[2].startswith("-") else (None, words[2:])
        if command in OF_A_DATASET:
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
    if name.endswith(".yaml"):
        return own_dataset(Path(name).stem, yaml.safe_load(blocks(ROOT / "docs" / "own-data.md", "yaml")[0])["classes"])
    return find_dataset(name)


def parse_options(dataset: Dataset, argv: list[str]) -> None:
    """Through the script's own parser; options of a run that a page only speaks of cannot be read."""
    if "--config" in argv and not Path(argv[argv.index("--config") + 1]).is_file():
        at = argv.index("--config")
        assert argv[at + 1].startswith("runs/"), argv
        argv = argv[:at] + argv[at + 2 :]
    try:
        option_file_of(dataset).parse_args(argv)
    except SystemExit as ended:
        assert not ended.code, f"the options of {dataset.name} do not take {argv}"


def flags_in(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


@cache
def flags_of_command(name: str | None, *more: str) -> frozenset[str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        assert program.main([name, *more, "--help"] if name else ["--help"]) == 0
    return frozenset(re.findall(r"--[a-z][\w-]*", shown.getvalue()))


@on_every_page
def test_linked_files_and_named_flags_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).is_file(), target
    assert {*re.findall(r"`(--[a-z][\w-]+)", text)} - {"--x", "--no-x"} <= all_flags()


@cache
def all_flags() -> frozenset[str]:
    """Flags of every command, those that depend on the method for every method, and one of TensorBoard."""
    known = {"--logdir"}
    for name in [name.replace("_", "-") for name in command_names()]:
        known |= flags_of_command(name, *(["--dataset", "ucf"] if name in OF_A_DATASET else []))
    for method in method_names():
        known |= flags_of_command("uncertainty", "--dataset", "ucf", "--method", method)
    return frozenset(known)


def test_python_example_runs_with_the_toy_clip(tmp_path, monkeypatch, capsys):
    code = example("python", "create_model(")
    assert '"ViT-B/16"' in code
    monkeypatch.chdir(tmp_path)
    model = create_model("clipfusionvad", class_prompts=UCF.prompts, clip="toy")
    write_torch("model/model_ucf.pth", state_without_clip(model))
    names: dict = {}
    exec(code.replace('"ViT-B/16"', '"toy"'), names)
    assert names["anomaly"].shape == (300,) and names["classes"].shape == (300, 14)
    assert "torch.Size([2, 256, 1])" in capsys.readouterr().out
    assert 0 <= names["found"]["average"] <= 100


@pytest.mark.parametrize(("language", "suffix"), [("text", ".csv"), ("json", ".json")])
def test_example_of_a_keyed_truth_file_is_read(language, suffix, tmp_path):
    path = tmp_path / f"truth{suffix}"
    path.write_text(blocks(ROOT / "docs" / "datasets.md", language)[0], encoding="utf-8")
    found = read_annotations(path, UCF)["Abuse028_x264"]
    assert found.segments == [(165, 240)] and found.labels == ["Abuse"] and found.frames == 1412


def test_the_tree_of_the_package_is_complete():
    tree = example("text", "clipfusionvad/\n").split("clipfusionvad/\n")[1]
    missing = [name for path in PACKAGE.iterdir() if (name := path.stem).strip("_") == name and name not in tree]
    assert not missing


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "results.md"], ids=lambda page: page.stem)
def test_tables_of_results_are_those_of_the_store(page, tmp_path):
    copy = tmp_path / page.name
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    write_into_page(copy, read_store(ROOT / "docs" / "results.csv"))
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), (
        f"generate them: python -m clipfusionvad table --store docs/results.csv --readme {page.relative_to(ROOT)}"
    )
