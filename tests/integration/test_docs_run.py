"""Every command of README and docs/ runs, page by page and in order, on generated data and small models."""

import glob
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from smaller import WIDTH, shrink
from test_readme import PAGES, README, commands
from tiny import TEST, TRAIN, quietly
from workspace import forget_extraction, forget_unlabelled, make_clips, make_detection, make_garage, make_workspace

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.cli import training

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# Commands that other tests run, or that need a network, a browser, a camera or a cluster; by how they begin.
ELSEWHERE = ["make|git|cd|eval|pip|\\.|python -m venv|tensorboard", "torchrun|python benchmarks/|.*--engine ray"]
ELSEWHERE += ["python -m clipfusionvad (demo|detect --stream)", ".*--track wandb"]
ELSEWHERE += [".*--method (perceptron|smoothfusion)", ".*configs/ablations/(anomalyclip|reflipvad)_"]
# Preparations for a command of a page: data of its own, or files that another page describes.
BEFORE = {
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
