"""README.md and docs/ keep what they promise: commands run, and flags, files, targets and the Python examples exist."""

import contextlib
import csv
import glob
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from smaller import WIDTH, shrink
from tiny import TEST, TRAIN, package_main, quietly
from workspace import forget_extraction, forget_unlabelled, make_clips, make_detection, make_garage, make_workspace

from clipfusionvad import create_model
from clipfusionvad.cli import command_names, training
from clipfusionvad.data.annotations import read_annotations
from clipfusionvad.datasets import UCF
from clipfusionvad.engine.checkpoint import make_hparams, model_content, state_without_clip
from clipfusionvad.io.files import write_torch
from clipfusionvad.models import method_names
from clipfusionvad.models.clip import load_clip
from clipfusionvad.tools.tables.store import read_store, write_into_page

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PACKAGE = ROOT / "clipfusionvad"
# Commands whose options are those of a dataset.
OF_A_DATASET = ("train", "test", "uncertainty", "pack")
FLAG = re.compile(r"--[a-z][\w-]*")
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
def test_commands_and_their_flags_exist(page):
    """Which command takes which flag: ``test_every_command_of_a_page_runs``."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    # Options of the methods that a page adds.
    options = re.findall(r"(\w+): Annotated", page.read_text(encoding="utf-8"))
    added = {f"--{name.replace('_', '-')}" for name in options}
    for tool, *words in commands(page):
        if tool == "make":
            assert set(words) <= set(targets), words
        elif tool in ("python", "torchrun"):
            scripts = "".join((ROOT / word).read_text(encoding="utf-8") for word in words if word.endswith(".py"))
            known = all_flags() | added | {*FLAG.findall(scripts), "--nproc-per-node"}
            assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, words
            if words[:2] == ["-m", "clipfusionvad"] and words[2:3] and not words[2].startswith("-"):
                assert words[2].replace("-", "_") in command_names()
        else:
            assert tool in {"git", "cd", "pip", ".", "tensorboard", "eval"}, f"unchecked command {tool} {words}"


@cache
def flags_of_command(name: str | None, *more: str) -> frozenset[str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        assert package_main([name, *more, "--help"] if name else ["--help"]) == 0
    return frozenset(FLAG.findall(shown.getvalue()))


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="not a git checkout")
def test_git_ignores_what_the_pages_have_people_bring_and_make():
    lines = [line for page in PAGES for line in commands(page) if line[0] in ("python", "torchrun")]
    words = {word for line in lines for word in line if re.search(r"^\w[\w/]*\.[a-z]\w+$|^\w+/\w+/", word)}
    folders = {"features", "videos", "detections", "detected", "watch", "list_one", "quick", "runs", "demo", "model"}
    paths = sorted({word for word in words if not glob.glob(str(ROOT / word))} | {f"{name}/x" for name in folders})
    ignored = subprocess.run(["git", "check-ignore", "--no-index", *paths], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.splitlines() == paths and len(paths) > 40
    code = [str(path.relative_to(ROOT)) for path in (ROOT / "list").glob("*.py")]
    code += ["requirements.txt", "docs/new.png", "configs/new.yaml", "msad_option.py"]
    assert subprocess.run(["git", "check-ignore", "--no-index", *code], cwd=ROOT).returncode == 1


def test_the_clone_is_not_named_as_the_package():
    """Beside a folder of that name, Python would import the folder: ``ImportError … (unknown location)``."""
    clone = next(line for line in commands(README) if line[:2] == ["git", "clone"])
    assert clone[3] and clone[3].lower() != PACKAGE.name
    assert commands(README)[1] == ["cd", clone[3]]


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
    model = create_model("clipfusionvad", UCF.prompts, "toy")
    hparams = make_hparams(model, load_clip("toy"), UCF, {})
    write_torch("model/model_ucf.pth", model_content(hparams, state_without_clip(model), model))
    names: dict = {}
    exec(code.replace('"ViT-B/16"', '"toy"'), names)
    assert names["anomaly"].shape == (300,) and names["classes"].shape == (300, 14)
    assert "torch.Size([2, 256, 1])" in capsys.readouterr().out
    assert 0 <= names["found"]["average"] <= 100


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """Its cells in order, in one namespace; its metrics are those that the demo printed."""
    cells = json.loads((ROOT / "examples/quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)
    best = json.loads(Path("demo/ucf/run_clipfusionvad/metrics.json").read_text())["best"]
    assert names["metrics"]["auc"] == pytest.approx(best["auc1"], abs=1e-5)
    assert names["found"]["average"] == pytest.approx(best["map_average"], abs=1e-2)
    assert len(names["axes"].patches) == 2


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


def test_tables_of_results_are_those_of_the_store(tmp_path):
    page = ROOT / "docs" / "results.md"
    copy = tmp_path / page.name
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    write_into_page(copy, read_store(ROOT / "docs" / "results.csv"))
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), (
        f"generate them: python -m clipfusionvad table --store docs/results.csv --readme {page.relative_to(ROOT)}"
    )


def make_scores():
    """Score files of two programs for the videos of the keyed truth."""
    with open("list/ucf_truth.csv", newline="") as file:
        frames = {row["video"]: int(row["frames"]) for row in csv.DictReader(file)}
    rng = np.random.default_rng(0)
    for name in ("theirs", "others"):
        np.save(f"{name}.npy", rng.random(sum(frames.values()) // 16))


# Every command of a page runs, in order, on generated data and small models.

# Commands that other tests run, or that need a network, a browser, a camera or a cluster; by how they begin.
ELSEWHERE = ["make|git|cd|eval|pip|\\.|python -m venv|tensorboard", "torchrun|python benchmarks/|.*--engine ray"]
ELSEWHERE += ["python -m clipfusionvad (app|clip|demo|detect --stream|reproduce)", ".*--track wandb", ".*hf:"]
ELSEWHERE += [".*--method (perceptron|smoothfusion)", ".*configs/ablations/(anomalyclip|reflipvad)_"]
# Preparations for a command of a page: data of its own, or files that another page describes.
BEFORE = {
    ("evaluate", "python -m clipfusionvad evaluate"): make_scores,
    ("README", "python -m clipfusionvad compare-features"): lambda: shutil.copytree("features", "released/features"),
    ("README", "python -m clipfusionvad lists"): forget_unlabelled,
    ("detect", "python -m clipfusionvad detect"): make_detection,
    ("scaling", "python -m clipfusionvad extract"): forget_extraction,
    ("own-data", "python -m clipfusionvad extract"): make_garage,
    ("real-clips", "python -m clipfusionvad extract"): make_clips,
}
# Trainings that pages about models assume.
TRAINED = [
    "python ucf_train.py --output-dir runs/ucf",
    "python xd_train.py --output-dir runs/xd",
    "python -m clipfusionvad train --dataset msad",
    "python -m clipfusionvad train --dataset shanghaitech --method iefvad",
    "python -m clipfusionvad train --dataset ucf --method anomalyclip --output-dir runs/anomalyclip",
    "python -m clipfusionvad train --dataset xd --method anomalyclip --output-dir runs/anomalyclip_xd",
    "python -m clipfusionvad sweep configs/ablations/no_gam.yaml --dataset ucf --seeds 1 --output-dir runs/sweep",
]
# These pages replace the videos and features, so they run last.
LAST = {"own-data", "real-clips"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The folder of a user who has features, annotations and released files, and has built lists and trained once.

    The value is the set of commands that have run: a command on several pages runs once.
    """
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        # Figures take longer than these trainings, and other tests draw them.
        patch.setattr(training, "draw_score_curves", lambda *args: None)
        patch.setattr(training, "draw_training", lambda *args: None)
        patch.chdir(tmp_path_factory.mktemp("workspace"))
        paths = (ROOT / "tests/helpers/site", ROOT / "tests/helpers", ROOT)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
        patch.setenv("OMP_NUM_THREADS", "1")
        make_workspace()
        listed = [words for words in commands(ROOT / "docs/datasets.md") if words[1].startswith("list/")]
        for words in [*listed, *map(str.split, TRAINED)]:
            done = run(words)
            assert done.code == 0, done.err
        yield set()


def run(words):
    """A command as a shell would run it, but in this process."""
    # Expand patterns as a shell does.
    _, program, *argv = [part for word in words for part in (sorted(glob.glob(word)) if "*" in word else [word])]
    if "extract" in argv and "toy" in argv:
        argv += ["--embed-dim", str(WIDTH)]
    if "--seeds" in argv:
        # Three seeds are enough; the third is the default.
        argv += ["--seeds", *argv[argv.index("--seeds") + 1 :][:3]] if "sweep" not in argv else ["--seeds", "1"]
    if "train" in " ".join(words[:4]) and "--use-checkpoint" not in argv:
        # An earlier command may have left a run there, or packed for another method.
        taken = [value for flag, value in zip(argv, argv[1:], strict=False) if flag == "--output-dir"]
        for path in [*taken, *Path("list").glob("*.pack")]:
            shutil.rmtree(path, ignore_errors=True)
    if "--data" in argv:
        # The workspace has a few of the benchmark's test videos, so its results cannot be stored as those of all.
        argv[argv.index("--data") + 1] = "real clips"
    if program == "-m":
        return quietly(package_main, argv[1:])
    found = re.fullmatch(r"(\w+)_(train|test)\.py", program)
    if found:
        return quietly({"train": TRAIN, "test": TEST}[found[2]][found[1]], argv)
    assert program.startswith("list/")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *argv])
        patch.setattr(sys, "path", list(sys.path))
        return quietly(lambda path: runpy.run_path(path, run_name="__main__"), program)


ORDERED = sorted(PAGES, key=lambda page: (page.stem in LAST, page != README))


@pytest.mark.slow
@pytest.mark.parametrize("page", ORDERED, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page, workspace):
    # The last pages use other videos.
    known = set() if page.stem in LAST else workspace
    failed, before = [], {start: prepare for (stem, start), prepare in BEFORE.items() if stem == page.stem}
    for words in commands(page):
        line = " ".join(words)
        if line in known or any(re.match(pattern, line) for pattern in ELSEWHERE):
            continue
        for start in [start for start in before if line.startswith(start)]:
            before.pop(start)()
        done = run(words)
        if done.code != 0:
            failed.append(f"{line}\n{done.err}")
        else:
            known.add(line)
    assert not failed, "\n".join(failed)
