"""A short version of ``make torture``: a dozen kills of three commands."""

from __future__ import annotations

import pytest
import torture

pytestmark = pytest.mark.slow

NAMES = ("extract", "pack", "train anomalyclip")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    return [c for c in torture.commands(tmp_path_factory.mktemp("data")) if c.name in NAMES]


def test_kills_at_random_moments_change_nothing(chosen, tmp_path):
    assert len(chosen) == len(NAMES)
    tallies = torture.torture_all(chosen, tmp_path, kills=12, seed=0)
    assert [tally.failures for tally in tallies] == [[]] * len(NAMES)
    assert sum(tally.kills for tally in tallies) >= 12


def test_it_finds_what_it_looks_for(chosen, tmp_path):
    """A file of every kind, cut in half; one too many; one that is left."""
    names = ["x.pt", "x.npy", "x.npz", "x.json", "x.png", "x.html"]
    for name in names:
        (tmp_path / name).write_bytes(b"PK\3\4 or so, but no more of it")
    assert [line.split(":")[0] for line in torture._unwhole(tmp_path)] == sorted(names)
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "losses.csv").write_text(folder)
    (tmp_path / "killed" / ".a.pt.1.tmp").touch()
    (tmp_path / "whole" / "b.npy").touch()
    assert [line.split()[0] for line in torture._differences(tmp_path / "whole", tmp_path / "killed")] == [
        "b.npy",
        ".a.pt.1.tmp",
        "losses.csv",
    ]
