"""A short version of ``make torture``: a dozen kills of three commands."""

import pytest
import torture

pytestmark = pytest.mark.slow


def test_kills_at_random_moments_change_nothing(tmp_path):
    names, known = ("extract", "pack", f"train {next(iter(torture.METHOD_FLAGS))}"), torture.commands(tmp_path)
    tallies = torture.torture_all({name: known[name] for name in names}, tmp_path, kills=12, seed=0)
    assert [tally.failures for tally in tallies] == [[]] * len(names)
    assert sum(tally.kills for tally in tallies) >= 12
