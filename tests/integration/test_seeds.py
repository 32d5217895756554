"""``--seeds`` trains one seed after another: each as in a run of its own, with a summary of all."""

import json
import math
import os
import re
import shutil
import signal
from functools import cache

import numpy as np
import pytest
import torch
import yaml
from refusal import assert_refused, snapshot
from test_resume import assert_same_runs
from tiny import METHOD_FLAGS, make_tiny, package_main, quietly, strings

from clipfusionvad.cli import training
from clipfusionvad.engine.trainer import Trainer
from clipfusionvad.io.files import write_json
from clipfusionvad.models import find_method
from clipfusionvad.report.results import seeds_table, summarise_seeds

SEEDS = (5, 3)
# Dropout, and evaluations within the epoch (eval mode, reload); random samples, and a held-out part by seed.
DROPOUT = next(name for name in METHOD_FLAGS if "dropout" in find_method(name).option_names())
DRAWN = next(name for name in METHOD_FLAGS if "sampling_of" in vars(find_method(name)))
CASES = {
    DROPOUT: ["--eval-every", 6],
    DRAWN: ["--protocol", "clean", "--holdout", 0.3, "--batch-size", 2],
}


class Case:
    """A tiny benchmark of a method with further flags, and a folder with all seeds trained, never written to."""

    def __init__(self, method, factory):
        self.tiny = make_tiny("ucf", factory.mktemp("data") / "tiny").of(method)
        self.options, self.whole = CASES[method], self.tiny.at(factory.mktemp("whole"))

    def train(self, work, *more, seeds=SEEDS):
        return self.tiny.at(work).train(*self.options, "--seeds", *seeds, *more)


@pytest.fixture(autouse=True, scope="module")
def no_plots():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw_score_curves", lambda *args: None)
        patch.setattr(training, "draw_training", lambda *args: None)
        yield


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    @cache
    def find(method):
        case = Case(method, tmp_path_factory)
        outcome = case.train(case.whole.work, "--metrics-json", case.whole.work / "metrics.json")
        assert outcome.code == 0, outcome.err
        return case

    return find


@pytest.fixture(params=CASES)
def case(request, cases):
    return cases(request.param)


@pytest.fixture
def one(cases):
    """For what does not depend on the method."""
    return cases(DROPOUT)


def steps_of(run):
    return torch.load(run / "last.pt", weights_only=True)["progress"]["step"]


def assert_same_seeds(work, case):
    for seed in SEEDS:
        assert_same_runs(work / f"run/seed{seed}", case.whole.work / f"run/seed{seed}")
    assert (work / "run/metrics.json").read_text() == (case.whole.work / "run/metrics.json").read_text()


def interrupt(monkeypatch, at, act):
    """Let ``act`` happen at the start of the ``at``-th step of all trainings together; their labels step by step."""
    labels, step = [], Trainer._step

    def watched(self, *args):
        labels.append(self.label)
        return (act(self) if len(labels) == at else None) or step(self, *args)

    monkeypatch.setattr(Trainer, "_step", watched)
    return labels


# The numbers of each seed.


def test_each_seed_is_as_it_would_be_alone(case, tmp_path):
    for seed in SEEDS:
        alone = case.tiny.at(tmp_path / str(seed))
        assert alone.train(*case.options, "--seed", seed).code == 0
        assert_same_runs(case.whole.work / f"run/seed{seed}", alone.work / "run")
    losses = [(case.whole.work / f"run/seed{seed}/losses.csv").read_text() for seed in SEEDS]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("at", [2, 5])
def test_a_stopped_command_continues_to_the_same_bits(case, tmp_path, monkeypatch, at):
    """SIGTERM in the first seed, then after it; the seeds that follow have not begun."""
    with monkeypatch.context() as patch:
        labels = interrupt(patch, at, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        outcome = case.train(tmp_path)
    assert outcome.code == 130 and f"--use-checkpoint --output-dir {tmp_path / 'run'}" in outcome.out
    begun = [seed for seed in SEEDS if (tmp_path / f"run/seed{seed}").exists()]
    assert labels == sorted(labels, reverse=True) and begun == list(SEEDS[: len(set(labels))])
    assert sum(steps_of(tmp_path / f"run/seed{seed}") for seed in begun) == at
    listed = quietly(package_main, ["report", str(tmp_path / "run")])
    assert listed.code == 0 and all(f"report {tmp_path / f'run/seed{seed}'}" in listed.out for seed in begun)
    outcome = case.train(tmp_path, "--use-checkpoint")
    assert outcome.code == 0, outcome.err
    assert_same_seeds(tmp_path, case)


def test_a_seed_that_fails_ends_the_command_and_keeps_those_before(one, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        steps = steps_of(one.whole.work / f"run/seed{SEEDS[0]}")
        interrupt(patch, steps + 3, lambda trainer: ({"rank": torch.tensor(math.nan)}, torch.tensor(1.0)))
        outcome = one.train(tmp_path)
    assert outcome.code == 2 and outcome.err.startswith(f"error: seed {SEEDS[1]}, loss is not finite at step 3")
    assert outcome.err.count("\n") == 1
    outcome = one.train(tmp_path, "--use-checkpoint")
    assert outcome.code == 0 and f"seed {SEEDS[0]} is finished already" in outcome.out
    assert_same_seeds(tmp_path, one)


def test_finished_seeds_are_not_repeated_and_others_join_them(one, tmp_path, monkeypatch):
    shutil.copytree(one.whole.work / "run", tmp_path / "run")
    (tmp_path / f"run/seed{SEEDS[1]}/scores.npz").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / f"run/seed{SEEDS[0]}").rglob("*")}
    labels, tested = interrupt(monkeypatch, 0, None), []
    monkeypatch.setattr(training, "draw_training", lambda path, folder: tested.append(folder.name))
    outcome = one.train(tmp_path, "--use-checkpoint", seeds=(*SEEDS, 7))
    assert outcome.code == 0, outcome.err
    assert set(labels) == {"seed 7, "}
    # The one whose last files are missing is only tested again.
    assert tested == [f"seed{SEEDS[1]}", "seed7"]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / f"run/seed{SEEDS[0]}").rglob("*")}
    for seed in SEEDS:
        assert_same_runs(tmp_path / f"run/seed{seed}", one.whole.work / f"run/seed{seed}")
    summary = json.loads((tmp_path / "run/metrics.json").read_text())
    assert list(summary["seeds"]) == [str(seed) for seed in (*SEEDS, 7)]


def test_more_epochs_or_a_new_start_leave_nothing_finished(one, tmp_path, monkeypatch):
    """Whatever final files there are of a training before."""
    shutil.copytree(one.whole.work / "run", tmp_path / "run")
    epochs = steps_of(tmp_path / f"run/seed{SEEDS[0]}")
    steps = []
    for flags in (["--use-checkpoint", "--max-epoch", 3], ["--overwrite"], ["--use-checkpoint"]):
        with monkeypatch.context() as patch:
            interrupt(patch, 1, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
            assert one.train(tmp_path, *flags).code == 130
        steps.append(steps_of(tmp_path / f"run/seed{SEEDS[0]}"))
    assert steps == [epochs + 1, 1, 2]


# What is said of all.


def numbers(metrics, path=()):
    """Every number of nested metrics by its path."""
    if not isinstance(metrics, dict):
        return {path: metrics}
    return {key: value for name, inner in metrics.items() for key, value in numbers(inner, (*path, name)).items()}


def test_the_summary_is_that_of_numpy(case):
    run = case.whole.work / "run"
    summary = json.loads((run / "metrics.json").read_text())
    assert summary == json.loads((case.whole.work / "metrics.json").read_text())
    best = [json.loads((run / f"seed{seed}/metrics.json").read_text())["best"] for seed in SEEDS]
    assert summary["seeds"] == dict(zip(map(str, SEEDS), best, strict=True))
    for path in numbers(best[0]):
        values = [numbers(metrics)[path] for metrics in best]
        found = [numbers(summary[name])[path] for name in ("mean", "std", "min", "max")]
        if None in values:
            assert found == [None] * 4
        else:
            expected = [np.mean(values), np.std(values, ddof=1), np.min(values), np.max(values)]
            assert found == pytest.approx(expected, abs=1e-12), path


def test_the_final_model_is_that_of_the_median_seed(case):
    summary = json.loads((case.whole.work / "run/metrics.json").read_text())
    select = yaml.safe_load((case.whole.work / "run/options.yaml").read_text())["select"]
    select = "auc1" if select == "last" else select
    assert summary["model_by"] == select
    # Of two, the lower one.
    lower = min(SEEDS, key=lambda seed: summary["seeds"][str(seed)][select])
    assert summary["model_seed"] == lower
    best = case.whole.work / f"run/seed{lower}/best.pt"
    assert (case.whole.work / "model.pth").read_bytes() == best.read_bytes()
    model = torch.load(case.whole.work / "model.pth", weights_only=True)
    assert model["metrics"] == summary["seeds"][str(lower)]
    outcome = case.tiny.at(case.whole.work).test("--metrics-json", case.whole.work / "tested.json")
    assert outcome.code == 0, outcome.err
    assert json.loads((case.whole.work / "tested.json").read_text()) == model["metrics"]


def write_seeds(folder, **results):
    for seed, metrics in results.items():
        write_json(folder / seed / "metrics.json", {"last": {}, "best": metrics})


def test_numbers_that_are_none(tmp_path):
    """A metric that one seed could not have has no mean; one seed alone has no deviation."""
    write_seeds(tmp_path, seed1={"auc1": 0.5, "ap1": None}, seed2={"auc1": 0.7, "ap1": 0.2}, seed9={"auc1": None})
    summary = summarise_seeds(tmp_path, [1, 2], "auc1")
    assert summary["mean"] == {"auc1": pytest.approx(0.6), "ap1": None}
    assert summary["std"]["auc1"] == pytest.approx(math.sqrt(0.02))
    assert summary["model_seed"] == 1
    assert summarise_seeds(tmp_path, [1], "last")["std"] == {"auc1": None, "ap1": None}
    assert summarise_seeds(tmp_path, [2, 9, 1], "auc1")["model_seed"] == 1


def test_table_and_page(case, tmp_path):
    run = case.whole.work / "run"
    summary = json.loads((run / "metrics.json").read_text())
    lines = seeds_table(summary, {"auc1": 0.9}).splitlines()
    assert lines[0].split() == ["percent", "mean", "±", "std", "min", "max", "paper"]
    values = [100 * summary[name]["auc1"] for name in ("mean", "std", "min", "max")]
    assert lines[1].split()[-5:] == [f"{value:.2f}" for value in [*values, 90]]
    outcome = quietly(package_main, strings(["report", run, "--output", tmp_path / "page.html"]))
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "page.html").read_text()
    # The links lead to the pages of the seeds from both places.
    for place, text in ((tmp_path, page), (run, (run / "report.html").read_text())):
        links = re.findall(r'<a href="([^"#]*)">seed', text)
        assert [(place / link).resolve() for link in links] == [run / f"seed{seed}" / "report.html" for seed in SEEDS]
    assert f"<b>{values[0]:.2f}</b>" in page and all(f">seed {seed}<" in page for seed in SEEDS)


def test_records_repeat_the_run_and_each_seed(case):
    run = case.whole.work / "run"
    together, alone = (yaml.safe_load((run / name / "options.yaml").read_text()) for name in ("", f"seed{SEEDS[1]}"))
    assert together["seeds"] == list(SEEDS)
    assert alone["seed"] == SEEDS[1] and "seeds" not in alone
    changed = {"seed", "seeds", "model_path", "output_dir"}
    one, other = ({key: value for key, value in options.items() if key not in changed} for options in (alone, together))
    assert one == other


# Bad input.


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seeds", 1, 2, 1], "--seeds names 1 more than once"),
        (["--seeds", 1, -2], "a whole number, 0 or more"),
        (["--seeds"], "--seeds"),
        (["--seeds", 1, 2, "--batch-size", 999], "or --no-balanced"),
    ],
)
def test_bad_seeds_are_refused(tiny, flags, says):
    assert_refused(tiny.train, tiny, *flags, says=says)


def test_a_folder_of_several_seeds_is_not_overwritten(one):
    before = snapshot(one.whole.work)
    both = f"already holds a run of seed {SEEDS[0]}, {SEEDS[1]}: continue it"
    for flags, says in ((["--seeds", *SEEDS, 7], both), ([], "holds the runs of several seeds")):
        outcome = one.whole.train(*one.options, *flags)
        assert outcome.code == 2 and says in outcome.err and outcome.err.count("\n") == 1
    assert snapshot(one.whole.work) == before
