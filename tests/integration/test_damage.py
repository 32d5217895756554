"""A damaged file is told by its checksum, and a training goes on from the state before it."""

import random
import zipfile

import pytest
import torch
from refusal import assert_refused
from test_resume import assert_same, stopping_at
from tiny import make_tiny

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.foreign_checkpoints import Damaged, read_checkpoint


def flip(path, place=None):
    """Change a bit, by default one in the middle."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2 if place is None else place
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


def test_a_flipped_bit_never_gives_other_numbers(tmp_path):
    content = {"weight": torch.randn(300), "steps": 12345, "name": "a", "more": {"half": torch.randn(40).half()}}
    torch.save(content, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        held = {entry.header_offset: entry.file_size for entry in archive.infolist() if "data" in entry.filename}
    whole, rng, found = (tmp_path / "whole.pt").read_bytes(), random.Random(1), 0
    for _ in range(600):
        (tmp_path / "flipped.pt").write_bytes(whole)
        flip(tmp_path / "flipped.pt", rng.randrange(len(whole)))
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
    assert found > 600 * 0.9 * sum(held.values()) / len(whole)


def test_files_without_checksums_are_read(tmp_path):
    """Also torch's older format: test_model_files.py."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.arange(5.0)}, tmp_path / "plain.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "plain.pt", "file")["weight"].tolist() == [0, 1, 2, 3, 4]


# Trainings.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny("ucf", tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def stopped(data, tmp_path, no_plots, monkeypatch):
    """A training that was stopped at its sixth step, after a state at the end of the first epoch."""
    work = data.at(tmp_path / "work")
    with stopping_at(monkeypatch, 6):
        assert work.train().code == 130
    return work


def test_a_damaged_state_gives_way_to_the_one_before(data, stopped, tmp_path, no_plots):
    whole = data.at(tmp_path / "whole")
    assert whole.train().code == 0
    last = stopped.work / "run" / "last.pt"
    flip(last)
    resumed = stopped.train("--use-checkpoint")
    assert resumed.code == 0
    assert resumed.err.startswith(f"warning: checkpoint {last} is not") and "the previous state" in resumed.err
    assert f"resuming from {stopped.work / 'run' / 'previous.pt'} at epoch 2, step 4" in resumed.out
    assert_same(stopped, whole)


def test_the_good_state_is_kept_until_there_is_another(stopped, monkeypatch):
    """Resumed from the state before and killed at once: it is there still."""
    last = stopped.work / "run" / "last.pt"
    flip(last)
    with stopping_at(monkeypatch, 5):
        assert stopped.train("--use-checkpoint").code == 130
    steps = [read_checkpoint(last.with_name(name), "state")["progress"]["step"] for name in ("previous.pt", "last.pt")]
    assert steps[0] in (4, 5) and steps[1] == 5


def test_two_damaged_states_and_damaged_records_are_one_line(stopped):
    run = stopped.work / "run"
    for name in ("losses.csv", "metrics.jsonl"):
        text = (run / name).read_text()
        (run / name).write_text(text.replace("0.", "1.", 1))
        assert_refused(stopped.train, stopped, "--use-checkpoint", says=f"{run / name} is damaged")
        (run / name).write_text(text)
    for name in ("last.pt", "previous.pt"):
        flip(run / name)
    assert_refused(stopped.train, stopped, "--use-checkpoint", says=("last.pt", "previous.pt", "--overwrite"))
    # Without asking for it nothing is started anew either.
    assert_refused(stopped.train, stopped, says="already holds a run")


def test_a_record_that_is_gone_is_begun_anew(stopped):
    (stopped.work / "run" / "metrics.jsonl").unlink()
    assert stopped.train("--use-checkpoint").code == 0


@pytest.mark.slow
def test_a_seed_with_a_damaged_state_goes_on_with_the_others(data, tmp_path, no_plots, monkeypatch):
    whole, work = data.at(tmp_path / "whole"), data.at(tmp_path / "work")
    seeds = ["--seeds", 3, 5]
    assert whole.train(*seeds).code == 0
    with stopping_at(monkeypatch, 6):
        assert work.train(*seeds).code == 130
    last = work.work / "run" / "seed3" / "last.pt"
    flip(last)
    resumed = work.train(*seeds, "--use-checkpoint")
    assert resumed.code == 0 and resumed.err.count("warning: ") == 1
    assert (work.work / "run/metrics.json").read_text() == (whole.work / "run/metrics.json").read_text()
