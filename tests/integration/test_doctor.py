"""python -m clipfusionvad doctor: nothing in a clean demo set, and every planted mistake with its file and row."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from planted import FOLLOWS, MISTAKES, Demo, at, rows_of, save
from tiny import quietly

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.cli.doctor import groups
from clipfusionvad.datasets import UCF
from clipfusionvad.tools.demo import make_demo
from clipfusionvad.tools.doctor import ERROR, NOTE, SHOWN, WARNING, Finding, lines, run_checks

GROUPS = groups()
ROOT = Path(__file__).resolve().parents[2]


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


def doctor(*argv):
    return quietly(package_main, ["doctor", *argv])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake, demo):
    plant, check, level = MISTAKES[mistake]
    file, row = plant(demo)
    before = {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")}
    findings = run_checks(GROUPS["data"], demo.scan())
    found = [str(finding) for finding in findings if (finding.check, finding.level) == (check, level)]
    assert any(str(file) in line and (row is None or f"row {row}" in line) for line in found), findings
    assert {finding.check for finding in findings} <= {check} | FOLLOWS.get(mistake, set()), findings
    assert {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")} == before, "it changes nothing"


def test_features_that_point_elsewhere_are_found(demo):
    """CLIP's features share a direction, so the demo's are given one; then one file has another."""
    shared, other = np.random.default_rng(3).normal(size=(2, 64))
    for row in [*rows_of(demo.train)[1:], *rows_of(demo.test)[1:]]:
        strange = Path(row[0]).stem == "Arson009_x264__1"
        features = 4 * other if strange else 0.5 * np.load(demo.file(row)) + 4 * shared
        save(demo.file(row), np.broadcast_to(features, np.load(demo.file(row)).shape).astype(np.float16))
    (found,) = run_checks({"": GROUPS["data"]["feature-direction"]}, demo.scan())
    assert (found.level, found.file, found.row) == (WARNING, str(demo.train), at(demo.train, "Arson009_x264__1"))


def test_the_command_prints_finds_writes_and_exits(demo, monkeypatch):
    assert run_checks(GROUPS["data"], demo.scan()) == []
    demo.use_arrays()
    assert run_checks(GROUPS["data"], demo.scan()) == []
    outcome = doctor("--dataset", "ucf", "--demo", "--only", "data")
    assert outcome.code == 0 and "nothing found, in" in outcome.out
    file, row = MISTAKES["label misspelt"][0](demo)
    outcome = doctor("--dataset", "ucf", "--demo", "--only", "data", "--json", "found.json")
    line = f"error    unknown-label: {file}, row {row}: unknown label 'Abus' (did you mean"
    assert outcome.code == 1 and line in outcome.out
    kept = json.loads(Path("found.json").read_text())["findings"]
    assert {"level": "error", "check": "unknown-label", "file": str(file), "row": row}.items() <= kept[0].items()
    # A note alone is no error.
    outcome = doctor("--dataset", "ucf", "--demo", "--only", "classes-absent")
    assert outcome.code == 0 and outcome.err == ""
    # Without options, the lists that are there are checked: the lists are the demo's, the options those of real data.
    monkeypatch.chdir(demo.folder)
    outcome = doctor("--only", "data")
    assert "UCF-Crime: list/" in outcome.out and "XD" not in outcome.out
    assert outcome.code == 1 and "feature-width: list/" in outcome.out


@pytest.mark.parametrize(
    "argv, said",
    [
        ("--only unknown-lable", "did you mean 'unknown-label'"),
        ("--only data --demo", "--demo needs --dataset, one of"),
        ("--only data --dataset ufc", "did you mean 'ucf'"),
        ("--only run --run nowhere", "no such folder: nowhere"),
        ("--dataset ucf --only data --feature-root nowhere", "feature root not found: nowhere"),
    ],
)
def test_bad_usage_is_one_line(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = doctor(*argv.split())
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1


def test_findings_are_counted_and_every_check_is_listed_here_and_in_the_docs():
    findings = [Finding(NOTE, "last", check="b")] + [Finding(ERROR, str(i), "", "f", i + 1, "a") for i in range(20)]
    shown = list(lines(findings))
    assert len(shown) == SHOWN + 2 and "and 12 more" in shown[SHOWN] and shown[-1].startswith("note")
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    names = [(group, name) for group, checks in GROUPS.items() for name in checks]
    assert len(dict(map(reversed, names))) == len(names) >= 20
    for (group, name), line in zip(names, doctor("--list").out.splitlines(), strict=True):
        about = line.split(maxsplit=2)[2]
        assert line.split()[:2] == [group, name] and f"| `{name}` | {about} |" in page, line
