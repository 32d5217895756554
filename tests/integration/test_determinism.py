"""The same seed gives the same bits, and what --deterministic does for it."""

import os

import pytest
import torch
from tiny import METHOD_FLAGS, make_tiny, skip_without_packages

from clipfusionvad.cli import training
from clipfusionvad.engine.device import deterministic
from clipfusionvad.engine.trainer import Trainer
from clipfusionvad.io.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    for name in ("draw_score_curves", "draw_training", "write_report"):
        monkeypatch.setattr(training, name, lambda *args: None)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The variable as it was: the program sets it for the processes that follow."""
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny("ucf", tmp_path_factory.mktemp("same") / "data")


def state(work):
    return torch.load(work.work / "run/last.pt", weights_only=True)["model_state_dict"]


@pytest.mark.parametrize("method", METHOD_FLAGS)
def test_a_run_comes_out_the_same_with_workers_and_the_flag(data, method, tmp_path, monkeypatch):
    """Twice the same, whoever loads the features; on a CPU the flag changes no bit."""
    skip_without_packages(method)
    flags, step = [], Trainer._step

    def watched(self, *args):
        flags.append(torch.are_deterministic_algorithms_enabled())
        return step(self, *args)

    monkeypatch.setattr(Trainer, "_step", watched)
    plain, other = (data.of(method).at(tmp_path / name) for name in ("plain", "other"))
    assert plain.train("--max-epoch", 1).code == 0
    outcome = other.train("--max-epoch", 1, "--workers", 2, "--deterministic")
    assert outcome.code == 0, outcome.err
    one, two = state(plain), state(other)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for name in ("losses.csv", "metrics.json", "metrics.jsonl", "data.csv"):
        assert (plain.work / "run" / name).read_text() == (other.work / "run" / name).read_text(), name
    half = len(flags) // 2
    assert flags == [False] * half + [True] * half and not torch.are_deterministic_algorithms_enabled()


def test_what_torch_is_told_lasts_as_long_as_the_run():
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled() and cudnn.deterministic and not cudnn.benchmark
        assert os.environ[WORKSPACE] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled() and (cudnn.deterministic, cudnn.benchmark) == before
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_form_is_one_clear_line(data, tmp_path, monkeypatch):
    def unordered(self, *args):
        # As torch says it of its own operations on a GPU.
        raise RuntimeError(
            "put_ does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation."
        )

    monkeypatch.setattr(Trainer, "_step", unordered)
    outcome = data.at(tmp_path).train("--deterministic")
    assert outcome.code == 2 and outcome.err.startswith("error: --deterministic: put_ does not have a deterministic")
    assert outcome.err.count("\n") == 1


def test_settings_that_cannot_be_deterministic_are_refused(data, tmp_path, monkeypatch):
    outcome = data.at(tmp_path).train("--deterministic", "--compile", "max-autotune")
    assert outcome.code == 2 and "max-autotune" in outcome.err
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(UserError, match=":4096:8 or :16:8, but it is set to ':0:0'"), deterministic(True):
        pass
