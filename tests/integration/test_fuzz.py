"""The short version of ``make fuzz``: some cases of every target, and that failures are noticed."""

import contextlib
import random
from unittest import mock

import pytest
from fuzz.mutate import READ, mutate
from fuzz.run import FAILED, report, run_case
from fuzz.seeds import make_seeds
from fuzz.targets import TARGETS

from clipfusionvad.io.errors import UserError

# Their cases take a tenth of a second or more.
SLOW = {"clips", "resumed", "commands", "models"}
FILES = ["shop.yaml", "detection.json", "extracted/manifest.jsonl", "data/ucf/truth.csv", "annotations/xd.txt"]
FILES += ["data/ucf/gt.npy", "runs/test/test_scores.npz", "models/iefvad.safetensors", "models/vadclip.pth"]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    make_seeds(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS)
def test_every_case_ends_well(kind, seeds, tmp_path):
    count = 12 if kind in SLOW else TARGETS[kind][1]
    failures, _ = report({kind: [run_case(kind, number, 0, seeds, tmp_path / "work") for number in range(count)]}, 0)
    assert not failures, "\n".join(failures)


def test_failures_are_noticed_and_refusals_are_one_line(monkeypatch, tmp_path):
    def hangs(case):
        while True:
            pass

    monkeypatch.setattr("fuzz.run.SECONDS", 0.2)
    refusal = UserError("two\nlines")
    cases = [(hangs, FAILED, "hangs"), (mock.Mock(side_effect=KeyError("x")), FAILED, "KeyError: 'x'")]
    cases += [(mock.Mock(return_value="fine"), FAILED, "no outcome: 'fine'")]
    cases += [(mock.Mock(side_effect=refusal), "refused", ""), (mock.Mock(return_value="right"), "right", "")]
    for run, expected, says in cases:
        monkeypatch.setitem(TARGETS, "made", (run, 1))
        outcome, why = run_case("made", 0, 0, tmp_path, tmp_path / "work")
        assert outcome == expected and says in why
    found = {"features": [("right", ""), ("refused", "")], "videos": [("right", ""), (FAILED, "why")]}
    failures, table = report(found, 7)
    assert failures == ["--seed 7 --kind videos --case 1: why"]
    assert table.splitlines()[-1].split() == ["all", "4", "2", "1", "0", "1"]


@pytest.mark.parametrize("path", FILES)
def test_mutations_are_reproducible_and_reach_the_values_of_a_format(path, seeds):
    path, values = seeds / path, 0
    mutated = [mutate(path, random.Random(number)) for number in range(20)]
    assert mutated[:3] == [mutate(path, random.Random(number)) for number in range(3)]
    for content in mutated:
        with contextlib.suppress(Exception):
            values += content != path.read_bytes() and READ[path.suffix](content) is not None
    assert values > 2
