"""python -m clipfusionvad doctor: nothing in a clean demo set, and every planted mistake with its file and row."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import planted_lists
import planted_truth
import pytest
from spoilt_demo import Demo, at, rows_of, save
from tiny import quietly

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.cli.doctor import groups
from clipfusionvad.datasets import UCF
from clipfusionvad.tools.demo import make_demo
from clipfusionvad.tools.doctor import ERROR, NOTE, SHOWN, WARNING, Finding, lines, run_checks

GROUPS = groups()
ROOT = Path(__file__).resolve().parents[2]
MISTAKES = planted_lists.MISTAKES | planted_truth.MISTAKES
FOLLOWS = planted_lists.FOLLOWS | planted_truth.FOLLOWS


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The demo set of UCF-Crime, never written to."""
    folder = tmp_path_factory.mktemp("clean")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_demo(UCF)
    return folder


@pytest.fixture
def demo(clean, tmp_path, monkeypatch):
    # One case needs the other stream, and links it itself.
    ignore = shutil.ignore_patterns("event")
    shutil.copytree(clean, tmp_path, copy_function=os.link, dirs_exist_ok=True, ignore=ignore)
    monkeypatch.chdir(tmp_path)
    return Demo(clean)


def test_nothing_is_found_in_the_clean_set(demo):
    assert run_checks(GROUPS["data"], demo.scan()) == []
    demo.use_arrays()
    assert run_checks(GROUPS["data"], demo.scan()) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake, demo):
    plant, check, level = MISTAKES[mistake]
    file, row = plant(demo)
    before = {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")}
    findings = run_checks(GROUPS["data"], demo.scan())
    found = [finding for finding in findings if (finding.check, finding.level) == (check, level)]
    assert found, findings
    text = [str(finding) for finding in found]
    assert any(str(file) in line and (row is None or f"row {row}" in line) for line in text), text
    assert {finding.check for finding in findings} <= {check} | FOLLOWS.get(mistake, set()), findings
    assert {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")} == before, "it changes nothing"


def test_features_that_point_elsewhere_are_found(demo):
    """CLIP's features share a direction, so the demo's are given one; then one file has another."""
    shared, other = np.random.default_rng(3).normal(size=(2, 64))
    for path in (demo.train, demo.test):
        for row in rows_of(path)[1:]:
            features = np.load(demo.file(row))
            strange = Path(row[0]).stem == "Arson009_x264__1"
            away = 4 * (other if strange else shared)
            save(demo.file(row), ((0 if strange else 0.5) * features + away).astype(np.float16))
            if strange:
                number = at(rows_of(path), "Arson009_x264__1")
    (found,) = run_checks({"feature-direction": GROUPS["data"]["feature-direction"]}, demo.scan())
    assert (found.level, found.file, found.row) == (WARNING, str(demo.train), number)


def test_the_command_prints_finds_writes_and_exits(demo):
    outcome = quietly(package_main, ["doctor", "--dataset", "ucf", "--demo", "--only", "data"])
    assert outcome.code == 0 and "nothing found, in" in outcome.out
    file, row = MISTAKES["label misspelt"][0](demo)
    outcome = quietly(package_main, ["doctor", "--dataset", "ucf", "--demo", "--only", "data", "--json", "found.json"])
    assert outcome.code == 1 and f"error    unknown-label: {file}, row {row}: unknown label 'Abus' (did you mean" in (
        outcome.out
    )
    kept = json.loads(Path("found.json").read_text())["findings"]
    assert {"level": "error", "check": "unknown-label", "file": str(file), "row": row}.items() <= kept[0].items()
    # A note alone is no error.
    outcome = quietly(package_main, ["doctor", "--dataset", "ucf", "--demo", "--only", "classes-absent"])
    assert outcome.code == 0 and outcome.err == ""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--only", "unknown-lable"], "did you mean 'unknown-label'"),
        (["--demo"], "--dataset is needed beside --demo"),
        (["--dataset", "ufc"], "did you mean 'ucf'"),
        (["--run", "nowhere"], "no such folder: nowhere"),
        (["--dataset", "ucf", "--only", "data", "--feature-root", "nowhere"], "feature root not found: nowhere"),
    ],
)
def test_bad_usage_is_one_line(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = argv if "--only" in argv else [*argv, "--only", "data", "run"]
    outcome = quietly(package_main, ["doctor", *argv])
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1


def test_without_options_the_lists_that_are_there_are_looked_at(demo, monkeypatch):
    monkeypatch.chdir(demo.folder)
    outcome = quietly(package_main, ["doctor", "--only", "data"])
    assert "UCF-Crime: list/" in outcome.out and "XD" not in outcome.out
    # The lists are the demo's, the options those of real features.
    assert outcome.code == 1 and "feature-width: list/" in outcome.out


def test_many_findings_of_a_check_are_counted():
    findings = [Finding(NOTE, "last", check="b")] + [Finding(ERROR, str(i), "", "f", i + 1, "a") for i in range(20)]
    shown = list(lines(findings))
    assert len(shown) == SHOWN + 2 and "and 12 more" in shown[SHOWN] and shown[-1].startswith("note")


def test_every_check_is_listed_here_and_in_the_docs():
    listed = quietly(package_main, ["doctor", "--list"]).out
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    names = [name for checks in GROUPS.values() for name in checks]
    assert len(set(names)) == len(names) >= 20
    for name, line in zip(names, listed.splitlines(), strict=True):
        group, told, about = line.split(maxsplit=2)
        assert told == name and group in GROUPS
        assert f"| `{name}` | {about} |" in page, f"docs/doctor.md lacks | `{name}` | {about} |"
