"""A short version of ``make torture``: a dozen kills of three commands."""

import pytest
import torture

pytestmark = pytest.mark.slow


def test_kills_at_random_moments_change_nothing(tmp_path):
    names, known = ("extract", "pack", f"train {next(iter(torture.METHOD_FLAGS))}"), torture.commands(tmp_path)
    tallies = torture.torture_all({name: known[name] for name in names}, tmp_path, kills=12, seed=0)
    assert [tally.failures for tally in tallies] == [[]] * len(names)
    assert sum(tally.kills for tally in tallies) >= 12


def test_damaged_missing_and_temporary_files_are_found(tmp_path):
    names = ["x.pt", "x.npy", "x.npz", "x.json", "x.png", "x.html"]
    for name in names:
        (tmp_path / name).write_bytes(b"PK\3\4 or so, but no more of it")
    assert [line.split(":")[0] for line in torture.incomplete_files(tmp_path)] == sorted(names)
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "losses.csv").write_text(folder)
    (tmp_path / "killed" / ".a.pt.1.tmp").touch()
    (tmp_path / "whole" / "b.npy").touch()
    found = torture.differences(tmp_path / "whole", tmp_path / "killed")
    assert [line.split()[0] for line in found] == ["b.npy", ".a.pt.1.tmp", "losses.csv"]
