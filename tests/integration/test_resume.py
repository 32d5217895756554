"""A training that was killed, stopped or broke off goes on to the same bits as one that was not."""

import contextlib
import copy
import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny import TRAIN, Tiny, make_tiny, quietly

import ucf_option
from clipfusionvad import load_weights
from clipfusionvad.cli import training
from clipfusionvad.cli.options import settings_of
from clipfusionvad.engine import trainer as trainer_module
from clipfusionvad.engine.checkpoint import released_state, state_without_clip
from clipfusionvad.engine.loggers import RunLog
from clipfusionvad.engine.setup import build_model
from clipfusionvad.engine.trainer import Trainer
from clipfusionvad.models.clip import load_clip

ROOT = Path(__file__).resolve().parents[2]
# Evaluations after steps 2, 3 and 4 of an epoch of 4: the released eval mode and the reload are crossed.
PAPER = ["--eval-every", 6]
CLEAN = ["--protocol", "clean", "--holdout", 0.3, "--no-balanced", "--batch-size", 5, "--select", "ap2"]


@pytest.fixture(scope="module", params=["paper", "clean"])
def case(request, tmp_path_factory):
    """A tiny benchmark, further flags and the folder of a training with them that nothing disturbed."""
    options = {"paper": PAPER, "clean": CLEAN}[request.param]
    tiny = make_tiny({"paper": "ucf", "clean": "xd"}[request.param], tmp_path_factory.mktemp("data") / "tiny")
    whole = tiny.at(tmp_path_factory.mktemp("whole"))
    assert whole.train(*options).code == 0
    return tiny, options, whole


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(training, "draw_score_curves", lambda *args: None)
    monkeypatch.setattr(training, "draw_training", lambda *args: None)


def assert_same(one: Tiny, other: Tiny):
    """Final model and the run are equal to the last bit."""
    assert_equal(*(torch.load(tiny.work / "model.pth", weights_only=True) for tiny in (one, other)), "model")
    assert_same_runs(one.work / "run", other.work / "run")


def assert_same_runs(one: Path, other: Path):
    """Best model, whole state, records of every step and every evaluation are equal to the last bit."""
    for name in ("best.pt", "last.pt"):
        assert_equal(*(torch.load(run / name, weights_only=True) | {"run": None} for run in (one, other)), name)
    for name in ("losses.csv", "metrics.jsonl", "metrics.csv", "metrics.json"):
        assert (one / name).read_text() == (other / name).read_text(), name


def assert_equal(one, other, place):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_equal(one[key], other[key], f"{place} {key}")
    else:
        assert one == other, place


class Broken(BaseException):
    """Nothing in the package catches it, as nothing catches a kill."""


def resume_until_done(tiny, options, places):
    """Train, breaking off once after the ``count``-th call at each of ``places``, then to the end; count the breaks."""
    broken = 0
    for place, name, count in places:
        original, calls = getattr(place, name), itertools.count(1)

        def break_after(*args, original=original, calls=calls, count=count, **kwargs):
            result = original(*args, **kwargs)
            if next(calls) == count:
                raise Broken
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, break_after)
            try:
                tiny.train(*options, "--use-checkpoint")
            except Broken:
                broken += 1
    assert tiny.train(*options, "--use-checkpoint").code == 0
    return broken


@contextlib.contextmanager
def stopping_at(monkeypatch, step, kind=signal.SIGTERM):
    """Trainings within get a signal at the start of a step."""
    original = Trainer._step

    def stopped(self, *args):
        if self.progress.step + 1 == step:
            os.kill(os.getpid(), kind)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopped)
        yield


def state_of(work):
    return torch.load(work / "run/last.pt", weights_only=True)


def assert_one_line(outcome):
    assert outcome.code == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err


@pytest.mark.slow
def test_broken_off_after_every_step(case, tmp_path, no_plots):
    tiny, options, whole = case
    steps = state_of(whole.work)["progress"]["step"]
    for step in range(1, steps + 1):
        work = tiny.at(tmp_path / str(step))
        assert resume_until_done(work, options, [(Trainer, "_step", step)]) == 1
        assert_same(work, whole)


@pytest.mark.slow
def test_broken_off_around_every_write(case, tmp_path, no_plots):
    """Between an evaluation, its record, best.pt, last.pt and the checkpoint beside it."""
    tiny, options, whole = case
    work = tiny.at(tmp_path)
    kinds = [(RunLog, "log_evaluation"), (trainer_module, "write_torch"), (trainer_module, "link_or_copy")]
    places = [(place, name, count) for count in (1, 2) for place, name in kinds] * 2
    assert resume_until_done(work, options, places) >= len(kinds)
    assert_same(work, whole)


def test_stopped_before_an_evaluation_and_broken_after_it(case, tmp_path, no_plots, monkeypatch):
    """The state of the stop and the evaluation are of the same step, and still it is recorded only once."""
    tiny, _, _ = case
    whole, work = tiny.at(tmp_path / "whole"), tiny.at(tmp_path / "stopped")
    assert whole.train("--max-epoch", 1).code == 0
    steps = state_of(whole.work)["progress"]["step"]
    with stopping_at(monkeypatch, steps):
        assert work.train("--max-epoch", 1).code == 130
    assert resume_until_done(work, ["--max-epoch", 1], [(RunLog, "log_evaluation", 1)]) == 1
    assert_same(work, whole)


def test_signals_stop_at_the_next_step_and_other_options_do_not_resume(case, tmp_path, no_plots, monkeypatch):
    """Half a training with one seed, learning rate or loss and half with another would be no training at all."""
    tiny, options, whole = case
    work = tiny.at(tmp_path)
    for step, kind, more in ((3, signal.SIGTERM, []), (5, signal.SIGINT, ["--use-checkpoint"])):
        with stopping_at(monkeypatch, step, kind):
            outcome = work.train(*options, *more)
        assert outcome.code == 130 and f"--use-checkpoint --output-dir {work.work / 'run'}" in outcome.out
        assert state_of(work.work)["progress"]["step"] == step
    assert not (work.work / "model.pth").exists()
    before = (work.work / "run/last.pt").read_bytes()
    for other in (["--seed", 1], ["--lr", 1e-5], ["--batch-size", 2], ["--separation-weight", 0.5]):
        assert_one_line(work.train(*options, "--use-checkpoint", *other))
        assert (work.work / "run/last.pt").read_bytes() == before
    assert work.train(*options, "--use-checkpoint").code == 0
    assert_same(work, whole)


def test_a_state_made_before_an_option_came_is_resumed_where_the_option_has_its_default(case, tmp_path, no_plots):
    tiny, options, whole = case
    work = tiny.at(tmp_path)
    assert work.train(*options, "--max-epoch", 1).code == 0
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    del state["same_run"]["schedule"]["optimizer"], state["same_run"]["model"]["options"]["product"]
    torch.save(state, tmp_path / "run/last.pt")
    for other in (["--optimizer", "adam"], ["--no-product"]):
        assert_one_line(work.train(*options, "--use-checkpoint", *other))
    assert work.train(*options, "--use-checkpoint").code == 0
    assert_same(work, whole)


def test_nothing_to_resume_and_a_finished_run(case, tmp_path, no_plots):
    tiny, options, whole = case
    work = tiny.at(tmp_path)
    for warning in ("warning: nothing to resume", ""):
        outcome = work.train(*options, "--use-checkpoint")
        assert outcome.code == 0 and outcome.err.startswith(warning)
        assert_same(work, whole)


def test_without_an_output_folder_the_latest_run_is_resumed(case, tmp_path, no_plots, monkeypatch):
    tiny, options, whole = case
    monkeypatch.chdir(tmp_path)
    work = tiny.at(tmp_path)
    argv = work.train_flags(*options)
    place = argv.index("--output-dir")
    del argv[place : place + 2]
    with stopping_at(monkeypatch, 3):
        assert quietly(TRAIN[tiny.dataset], argv).code == 130
    assert quietly(TRAIN[tiny.dataset], [*argv, "--use-checkpoint"]).code == 0
    (folder,) = Path("runs").iterdir()
    folder.rename("run")
    assert_same(work, whole)


def test_the_checkpoint_of_another_run_is_not_taken(case, tmp_path, no_plots, monkeypatch):
    tiny, options, whole = case
    work = tiny.at(tmp_path)
    with stopping_at(monkeypatch, 3):
        assert work.train(*options, "--output-dir", tmp_path / "other", "--seed", 1).code == 130
    outcome = work.train(*options, "--use-checkpoint")
    assert outcome.code == 0
    assert f"of another run; to continue that: --output-dir {tmp_path / 'other'}" in outcome.err
    assert_same(work, whole)


# A training checkpoint as the original code writes it.


def original_checkpoint(work, path, epoch):
    """Two AdamW steps over all parameters of the whole CLIP and the model, as the original's loop makes them."""
    args = ucf_option.parse_args(work.train_flags())
    model, _ = build_model(settings_of(args, ucf_option.DATASET).model, ucf_option.DATASET, args.seed)
    clip = load_clip("toy", 64)
    own, state = dict(model.named_parameters()), released_state(model, clip)
    parameters = {
        key: own.get(key, torch.nn.Parameter(value, requires_grad=False))
        for key, value in state.items()
        if value.is_floating_point() and not key.endswith(("running_mean", "running_var"))
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.lr)
    generator = torch.Generator().manual_seed(1)
    trained = {key: parameter for key, parameter in own.items() if parameter.requires_grad}
    for _ in range(2):
        for parameter in trained.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    content = {"epoch": epoch, "model_state_dict": released_state(model, clip), "ap": 0.25}
    torch.save(content | {"optimizer_state_dict": optimizer.state_dict()}, path)
    return model, {key: optimizer.state[parameter] for key, parameter in trained.items()}


@pytest.fixture
def released(tmp_path, no_plots):
    return make_tiny("ucf", tmp_path / "data").at(tmp_path)


def test_a_checkpoint_of_the_original_code_is_resumed(released, tmp_path, monkeypatch):
    model, moments = original_checkpoint(released, tmp_path / "checkpoint.pth", epoch=0)
    found = []

    def look(self, *args):
        names = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        moments = {name: self.optimizer.state[parameter] for name, parameter in names.items()}
        numbers = self.progress.epoch, self.progress.best_score, self.optimizer.param_groups[0]["lr"]
        found.append(copy.deepcopy((state_without_clip(self.model), moments, numbers)))
        return step(self, *args)

    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", look)
    assert released.train("--use-checkpoint").code == 0
    # The one milestone of this schedule is the end of the first epoch.
    args = ucf_option.parse_args(released.train_flags())
    state, taken, (epoch, best, lr) = found[0]
    assert (epoch, best, lr) == (1, 0.25, pytest.approx(args.lr * args.scheduler_rate))
    assert_equal(state, state_without_clip(model), "state")
    assert_equal(taken, moments, "moments")


def test_a_finished_checkpoint_of_the_original_code_is_tested(released, tmp_path):
    model, _ = original_checkpoint(released, tmp_path / "checkpoint.pth", epoch=1)
    expected = state_without_clip(model)
    outcome = released.train("--use-checkpoint")
    assert outcome.code == 0, outcome.err
    load_weights(model, tmp_path / "model.pth")
    assert_equal(state_without_clip(model), expected, "state")


def test_an_incomplete_checkpoint_is_refused(released, tmp_path):
    path = tmp_path / "checkpoint.pth"
    original_checkpoint(released, path, epoch=0)
    content = torch.load(path, weights_only=True)
    for key in ("epoch", "ap"):
        torch.save({name: value for name, value in content.items() if name != key}, path)
        assert_one_line(released.train("--use-checkpoint"))
        assert not (tmp_path / "run").exists()
