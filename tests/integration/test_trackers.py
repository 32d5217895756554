"""Curves at other services: the points of a run, once each, whatever the service does meanwhile."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from tiny import make_tiny

from clipfusionvad.engine.loggers import IDS, TRACKERS
from clipfusionvad.engine.run_folder import RunLog
from clipfusionvad.engine.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


class Service:
    """Stands for both packages: runs by id, with the points that were sent; may be out of reach."""

    def __init__(self):
        self.runs, self.reachable, self.ended = {}, True, []

    def send(self, run, step, values):
        if not self.reachable:
            raise ConnectionError("no route\nto host")
        self.runs[run].append((step, values))

    def wandb(self):
        service = self

        class Run:
            def __init__(self, id, config, **more):
                if config["seed"] == 13:
                    raise RuntimeError("api_key not configured\n(no-tty)")
                self.id = id
                service.runs.setdefault(id, [])

            def log(self, values, step):
                service.send(self.id, step, values)

            def finish(self):
                service.ended.append(self.id)

        return types.SimpleNamespace(init=Run, Settings=lambda **said: None)

    def mlflow(self):
        service = self

        class Client:
            def get_experiment_by_name(self, name):
                return None

            def create_experiment(self, name):
                return "1"

            def create_run(self, experiment, run_name):
                service.runs["first"] = []
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id="first"))

            def update_run(self, run, status):
                assert run in service.runs

            def log_param(self, run, key, value):
                pass

            def log_batch(self, run, metrics):
                assert len(metrics) <= 1000
                for name, value, _, step in metrics:
                    service.send(run, step, {name: value})

            def set_terminated(self, run):
                service.ended.append(run)

        entities = types.SimpleNamespace(Metric=lambda *point: point)
        return types.SimpleNamespace(MlflowClient=Client, entities=entities)


@pytest.fixture(params=list(TRACKERS))
def tracked(request, monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, request.param, getattr(service, request.param)())
    return request.param, service


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny("ucf", tmp_path_factory.mktemp("data") / "tiny")


def losses_sent(service):
    (points,) = service.runs.values()
    return [(step, values["train/loss"]) for step, values in points if "train/loss" in values]


def losses_kept(folder):
    with (folder / "losses.csv").open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def test_a_training_sends_what_its_folder_keeps(tracked, data, tmp_path):
    name, service = tracked
    done = data.at(tmp_path).train("--track", name)
    assert done.code == 0, done.err
    assert losses_sent(service) == losses_kept(tmp_path / "run") != []
    (points,) = service.runs.values()
    evaluations = [values for _, values in points if any(key.startswith("eval/") for key in values)]
    assert evaluations and service.ended == list(service.runs)


def test_a_resumed_run_goes_on_in_its_place_and_sends_nothing_twice(tracked, data, tmp_path, monkeypatch):
    name, service = tracked
    work = data.at(tmp_path)
    real = Trainer._end_epoch

    def broken(self, *args):
        if self.progress.epoch == 1:
            # The points of this epoch wait to be sent, as they do when a run is killed.
            monkeypatch.setattr("clipfusionvad.engine.loggers.Tracker.close", lambda self: None)
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Trainer, "_end_epoch", broken)
    assert work.train("--track", name, "--max-epoch", 3).code != 0
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, name, getattr(service, name)())
    sent = losses_sent(service)
    assert sent and len(sent) < len(losses_kept(tmp_path / "run"))
    assert work.train("--track", name, "--max-epoch", 3, "--use-checkpoint").code == 0
    assert losses_sent(service) == losses_kept(tmp_path / "run")


def test_a_service_out_of_reach_stops_no_training_and_gets_all_later(tracked, tmp_path, capsys):
    name, service = tracked
    (tmp_path / "options.yaml").write_text("seed: 1\n")
    log = RunLog(tmp_path, trackers=[name])
    service.reachable = False
    for step in (1, 2):
        log.log_step(step, 0, {"coarse": 0.5}, lr=1e-3)
        log.flush()
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and f"--track {name}: 1 steps not sent yet (no route to host)" in told
    service.reachable = True
    log.log_step(3, 0, {"coarse": 0.5}, lr=1e-3)
    log.close()
    assert [step for step, _ in losses_sent(service)] == [1, 2, 3]
    assert len(losses_kept(tmp_path)) == 3 and not capsys.readouterr().err


def test_what_was_never_sent_is_told_at_the_end(tracked, tmp_path, capsys):
    name, service = tracked
    (tmp_path / "options.yaml").write_text("seed: 1\n")
    log = RunLog(tmp_path, trackers=[name])
    service.reachable = False
    log.log_step(1, 0, {"coarse": 0.5}, lr=1e-3)
    log.close()
    assert "1 steps were never sent; the run's folder has them" in capsys.readouterr().err


def test_a_service_that_opens_no_run_is_one_line_before_anything_is_trained(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Service().wandb())
    done = data.at(tmp_path).train("--track", "wandb", "--seed", 13)
    assert done.code == 2
    assert "--track wandb: no run could be opened (api_key not configured (no-tty)); see docs/runs.md" in done.err
    assert not (tmp_path / "run/last.pt").exists()


def test_a_missing_package_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = data.at(tmp_path).train("--track", "wandb")
    assert done.code == 2 and "pip install wandb" in done.err


@pytest.mark.parametrize("name", list(TRACKERS))
def test_the_real_package_takes_a_run_and_takes_it_up_again(name, data, tmp_path):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (pip install {name})")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    env = {**os.environ, "WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": store, "OMP_NUM_THREADS": "1"}
    ids = []
    for more in (["--max-epoch", "1"], ["--max-epoch", "2", "--use-checkpoint"]):
        command = [sys.executable, "ucf_train.py", *data.at(tmp_path).train_flags("--track", name, *more)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ids.append(json.loads((tmp_path / "run" / IDS).read_text())[name])
    assert ids[0] == ids[1]
    if name == "mlflow":
        from mlflow import MlflowClient

        kept = MlflowClient(store).get_metric_history(ids[0], "train/loss")
        assert [(point.step, point.value) for point in kept] == losses_kept(tmp_path / "run")
    else:
        assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{ids[0]}"))
