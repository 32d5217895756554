"""A damaged file is told by its checksum, and a training goes on from the state before it."""

import random
import shutil
import tracemalloc
import zipfile

import pytest
import torch
from refusal import assert_refused
from test_resume import assert_same, no_plots, stopping_at  # noqa: F401
from tiny import make_tiny

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.foreign_checkpoints import Damaged, read_checkpoint


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


def test_a_flipped_bit_never_gives_other_numbers(tmp_path):
    content = {"weight": torch.randn(300), "steps": 12345, "name": "a", "more": {"half": torch.randn(40).half()}}
    torch.save(content, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        held = {entry.header_offset: entry.file_size for entry in archive.infolist() if "data" in entry.filename}
    size, rng = (tmp_path / "whole.pt").stat().st_size, random.Random(1)
    found = 0
    for _ in range(600):
        shutil.copyfile(tmp_path / "whole.pt", tmp_path / "flipped.pt")
        flip(tmp_path / "flipped.pt", rng.randrange(size))
        try:
            read = read_checkpoint(tmp_path / "flipped.pt", "file")
        except UserError as error:
            assert "flipped.pt" in str(error) and "\n" not in str(error)
            found += isinstance(error, Damaged)
        else:
            assert torch.equal(read["weight"], content["weight"])
            assert torch.equal(read["more"]["half"], content["more"]["half"])
            assert (read["steps"], read["name"]) == (12345, "a")
    # The rest is filling, and dates of entries.
    assert found > 600 * 0.9 * sum(held.values()) / size


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.arange(5.0)}, tmp_path / "plain.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "plain.pt", "file")["weight"].tolist() == [0, 1, 2, 3, 4]
    torch.save({"weight": torch.arange(5.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "old.pt", "file")["weight"].tolist() == [0, 1, 2, 3, 4]


def test_what_unpacks_to_more_than_the_file_is_refused_first(tmp_path):
    torch.save({"weight": torch.zeros(50_000_000)}, tmp_path / "large.pt")
    with (
        zipfile.ZipFile(tmp_path / "large.pt") as archive,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    (tmp_path / "large.pt").unlink()
    assert (tmp_path / "bomb.pt").stat().st_size < 1_000_000
    tracemalloc.start()
    with pytest.raises(Damaged):
        read_checkpoint(tmp_path / "bomb.pt", "file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


# Trainings.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny("ucf", tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def stopped(data, tmp_path, no_plots, monkeypatch):  # noqa: F811
    """A training that was stopped at its sixth step, after a state at the end of the first epoch."""
    work = data.at(tmp_path / "work")
    with stopping_at(monkeypatch, 6):
        assert work.train().code == 130
    return work


def middle(path):
    return path.stat().st_size // 2


def test_a_damaged_state_gives_way_to_the_one_before(data, stopped, tmp_path, no_plots):  # noqa: F811
    whole = data.at(tmp_path / "whole")
    assert whole.train().code == 0
    last = stopped.work / "run" / "last.pt"
    flip(last, middle(last))
    resumed = stopped.train("--use-checkpoint")
    assert resumed.code == 0
    assert resumed.err.startswith(f"warning: checkpoint {last} is not") and "the previous state" in resumed.err
    assert f"resuming from {stopped.work / 'run' / 'previous.pt'} at epoch 2, step 4" in resumed.out
    assert_same(stopped, whole)


def test_the_good_state_is_kept_until_there_is_another(stopped, monkeypatch):
    """Resumed from the state before and killed at once: it is there still."""
    last = stopped.work / "run" / "last.pt"
    flip(last, middle(last))
    with stopping_at(monkeypatch, 5):
        assert stopped.train("--use-checkpoint").code == 130
    steps = [read_checkpoint(last.with_name(name), "state")["progress"]["step"] for name in ("previous.pt", "last.pt")]
    assert steps[0] in (4, 5) and steps[1] == 5


def test_two_damaged_states_are_one_line(stopped):
    for name in ("last.pt", "previous.pt"):
        path = stopped.work / "run" / name
        flip(path, middle(path))
    assert_refused(stopped.train, stopped, "--use-checkpoint", says=("last.pt", "previous.pt", "--overwrite"))
    # Without asking for it nothing is started anew either.
    assert_refused(stopped.train, stopped, says="already holds a run")


@pytest.mark.parametrize("name", ["losses.csv", "metrics.jsonl"])
def test_damaged_records_are_one_line(stopped, name):
    path = stopped.work / "run" / name
    path.write_text(path.read_text().replace("0.", "1.", 1))
    refused = stopped.train("--use-checkpoint")
    assert refused.code == 2 and refused.err.count("\n") == 1 and f"{path} is damaged" in refused.err
    path.unlink()
    assert stopped.train("--use-checkpoint").code == 0


def test_a_seed_with_a_damaged_state_goes_on_with_the_others(data, tmp_path, no_plots, monkeypatch):  # noqa: F811
    whole, work = data.at(tmp_path / "whole"), data.at(tmp_path / "work")
    seeds = ["--seeds", 3, 5]
    assert whole.train(*seeds).code == 0
    with stopping_at(monkeypatch, 6):
        assert work.train(*seeds).code == 130
    last = work.work / "run" / "seed3" / "last.pt"
    flip(last, middle(last))
    resumed = work.train(*seeds, "--use-checkpoint")
    assert resumed.code == 0 and resumed.err.count("warning: ") == 1
    assert (work.work / "run/metrics.json").read_text() == (whole.work / "run/metrics.json").read_text()
