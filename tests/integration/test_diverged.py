"""A loss or a gradient that is not finite ends a training in one line, with nothing of that step saved."""

import csv
import multiprocessing

import pytest
import torch
from tiny import METHOD_FLAGS, make_tiny, skip_without_packages

from clipfusionvad.models.clipfusionvad import ClipFusionVAD

# The last of an epoch, which an evaluation and a save would follow.
STEP = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny("ucf", tmp_path_factory.mktemp("data") / "tiny")


def spoil(monkeypatch, term):
    """Add a term to the losses of one step, made of that step's logits."""
    losses, calls = ClipFusionVAD.losses, []

    def spoilt(self, output, *rest):
        calls.append(0)
        found = losses(self, output, *rest)
        return found | {"spoilt": term(output.coarse_logits)} if len(calls) == STEP else found

    monkeypatch.setattr(ClipFusionVAD, "losses", spoilt)


@pytest.mark.parametrize(
    ("term", "said"),
    [
        (lambda logits: logits.sum() * float("nan"), "loss is not finite at step 4"),
        (lambda logits: (0 * logits.sum()).abs().sqrt(), "loss is finite at step 4"),
    ],
    ids=["loss", "gradient"],
)
def test_the_step_is_named_with_its_videos_and_not_saved(data, tmp_path, monkeypatch, term, said):
    tiny = data.at(tmp_path)
    spoil(monkeypatch, term)
    outcome = tiny.train()
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("error: ") == 1, outcome.err
    with open(data.train_list, newline="") as file:
        known = {row[0].split("/")[-1].rpartition("__")[0] for row in list(csv.reader(file))[1:]}
    named = outcome.err.strip().split("clipfusionvad doctor': ")[1].split(" and ")[0].split(", ")
    assert set(named) <= known and len(set(named)) == len(named) > 0
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["progress"]["step"] == 0 and not (tmp_path / "run" / "best.pt").exists()
    assert all(value.isfinite().all() for value in state["model_state_dict"].values())
    assert len((tmp_path / "run" / "losses.csv").read_text().splitlines()) == STEP
    monkeypatch.undo()
    assert tiny.train("--use-checkpoint").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHOD_FLAGS)
def test_weights_that_explode_are_one_line(method, data, tmp_path):
    """Or nothing, where they only saturate the scores."""
    skip_without_packages(method)
    outcome = data.of(method).at(tmp_path).train("--lr", 1e20)
    assert outcome.code == 0 or (outcome.code == 2 and "finite" in outcome.err), outcome.err


def test_a_gpu_without_memory_left_is_one_line(data, tmp_path, monkeypatch):
    def full(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 139.80 GiB in all.")

    monkeypatch.setattr(ClipFusionVAD, "losses", full)
    outcome = data.at(tmp_path).train()
    assert outcome.code == 2 and outcome.err.count("error: ") == 1
    assert "more memory is needed than there is: CUDA out of memory. Tried to allocate 20.00 GiB" in outcome.err


def test_an_error_leaves_no_reading_process_behind(data, tmp_path, monkeypatch):
    """It would keep the program from ending: such a process heeds no signal."""
    broken = RuntimeError("something that nobody foresaw")

    def fail(self, *args):
        raise broken

    monkeypatch.setattr(ClipFusionVAD, "losses", fail)
    with pytest.raises(RuntimeError, match="nobody foresaw"):
        data.at(tmp_path).train("--workers", 1)
    # The error is still there, and with it the frames that it came through.
    assert broken.__traceback__ is not None and not multiprocessing.active_children()
