"""The short version of ``make fuzz``: kinds that need no process of their own, and that failures are noticed."""

import signal

import pytest
from fuzz.case import OUTCOMES, REFUSED, RIGHT, Failure, read_or_refuse
from fuzz.run import KINDS, Kind, counts_of, run_case, table_text
from fuzz.seeds import make_seeds

from clipfusionvad.io.errors import UserError

SHORT = 600
# Each of their cases takes a tenth of a second or more.
SLOW = {"clips", "resumed", "commands", "extractions", "runs", "contents", "released"}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    make_seeds(folder)
    return folder


@pytest.fixture(autouse=True)
def own_alarm():
    """What else uses the alarm has it back."""
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_case_ends_well(kind, seeds, tmp_path):
    count = 6 if kind in SLOW else counts_of(SHORT, list(KINDS))[kind]
    outcomes = [run_case(kind, number, 0, seeds, tmp_path / "work") for number in range(count)]
    bad = [
        f"--seed 0 --kind {kind} --case {n}: {why}" for n, (found, why) in enumerate(outcomes) if found not in OUTCOMES
    ]
    assert not bad, "\n".join(bad)


def test_failures_are_noticed(monkeypatch, tmp_path):
    def crash(case):
        raise KeyError("x")

    def hang(case):
        while True:
            pass

    monkeypatch.setattr("fuzz.run.SECONDS", 0.2)
    for run, says in ((crash, "KeyError"), (hang, "hangs"), (lambda case: "fine", "no outcome")):
        monkeypatch.setitem(KINDS, "made", Kind("made", 1, run))
        outcome, why = run_case("made", 0, 0, tmp_path, tmp_path / "work")
        assert outcome == "failed" and says in why


def test_a_reader_is_right_or_refuses():
    def refuse():
        raise UserError("two\nlines")

    assert read_or_refuse(refuse, lambda found: None) == REFUSED
    assert read_or_refuse(lambda: 3, lambda found: None) == RIGHT
    with pytest.raises(Failure):
        read_or_refuse(lambda: 3, lambda found: (_ for _ in ()).throw(Failure("wrong")))


def test_a_case_is_the_same_every_time(seeds, tmp_path):
    for number in range(8):
        found = []
        for name in ("a", "b"):
            run_case("features", number, 5, seeds, tmp_path / name)
            found.append((tmp_path / name / "a__0.npy").read_bytes())
        assert found[0] == found[1]


def test_table_counts_all():
    from collections import Counter

    text = table_text({"features": Counter(right=2, refused=3), "videos": Counter(failed=1)})
    assert text.splitlines()[-1].split() == ["all", "6", "2", "3", "0", "1"]
    assert sum(counts_of(20_600, list(KINDS)).values()) >= 20_000
