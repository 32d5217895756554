"""``--track``: every point of a run reaches the service once, whatever the service does meanwhile."""

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

from clipfusionvad.engine.loggers import TRACKERS, RunLog
from clipfusionvad.engine.run_folder import IDS
from clipfusionvad.engine.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


class Service:
    """A stand-in for MLflow: runs by id with the points they were sent; it may be unreachable."""

    def __init__(self):
        self.runs, self.reachable, self.ended = {}, True, []
        self.entities = types.SimpleNamespace(Metric=lambda *point: point)
        self.MlflowClient, self.set_terminated = lambda: self, self.ended.append
        self.get_experiment_by_name, self.create_experiment = lambda name: None, lambda name: "1"

    def create_run(self, experiment, run_name):
        self.runs["first"] = []
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="first"))

    def update_run(self, run, status):
        assert run in self.runs

    def log_param(self, run, key, value):
        if (key, value) == ("seed", 13):
            raise RuntimeError("api_key not configured\n(no-tty)")

    def log_batch(self, run, metrics):
        if not self.reachable:
            raise ConnectionError("no route\nto host")
        assert len(metrics) <= 1000
        self.runs[run] += [(step, name, value) for name, value, _, step in metrics]

    @property
    def losses(self):
        (points,) = self.runs.values()
        return [(step, value) for step, name, value in points if name == "train/loss"]


@pytest.fixture
def service(monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "mlflow", service)
    return service


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny("ucf", tmp_path_factory.mktemp("data") / "tiny")


def losses_kept(folder):
    with (folder / "losses.csv").open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def test_a_resumed_run_continues_at_the_service_and_sends_nothing_twice(service, data, tmp_path, monkeypatch):
    work, end_epoch = data.at(tmp_path), Trainer._end_epoch
    with monkeypatch.context() as patch:

        def broken(self):
            if self.progress.epoch == 1:
                # The points of this epoch wait to be sent, as they do when a run is killed.
                patch.setattr("clipfusionvad.engine.loggers.MLflow.close", lambda self: None)
                raise KeyboardInterrupt
            return end_epoch(self)

        patch.setattr(Trainer, "_end_epoch", broken)
        assert work.train("--track", "mlflow", "--max-epoch", 3).code != 0
    sent = service.losses
    assert sent and len(sent) < len(losses_kept(tmp_path / "run"))
    assert work.train("--track", "mlflow", "--max-epoch", 3, "--use-checkpoint").code == 0
    assert service.losses == losses_kept(tmp_path / "run") and service.ended == ["first"]
    assert any(name.startswith("eval/") for _, name, _ in service.runs["first"])


def test_an_unreachable_service_does_not_stop_a_training_and_gets_all_points_later(service, tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("seed: 1\n")
    log = RunLog(tmp_path, trackers=["mlflow"])
    for step in (1, 2, 3):
        service.reachable = step == 3
        log.log_step(step, 0, {"coarse": 0.5}, lr=1e-3)
        log.flush()
    printed = capsys.readouterr().err
    assert printed.count("warning") == 1 and "--track mlflow: 1 steps not sent yet (no route to host)" in printed
    assert [step for step, _ in service.losses] == [1, 2, 3]
    service.reachable = False
    log.log_step(4, 0, {"coarse": 0.5}, lr=1e-3)
    log.close()
    assert "1 steps were never sent; the run's folder has them" in capsys.readouterr().err
    assert len(losses_kept(tmp_path)) == 4


def test_a_service_that_cannot_be_used_is_one_line_before_the_training(service, data, tmp_path, monkeypatch):
    done = data.at(tmp_path).train("--track", "mlflow", "--seed", 13)
    assert done.code == 2
    assert "--track mlflow: no run could be opened (api_key not configured (no-tty)); see docs/runs.md" in done.err
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = data.at(tmp_path).train("--track", "wandb")
    assert done.code == 2 and "pip install wandb" in done.err
    assert not (tmp_path / "run/last.pt").exists()


@pytest.mark.parametrize("name", list(TRACKERS))
def test_the_real_package_gets_a_run_and_continues_it(name, data, tmp_path):
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
        files = list((tmp_path / "run/wandb").glob(f"offline-run-*/run-{ids[0]}.wandb"))
        content = b"".join(file.read_bytes() for file in files)
        assert files and b"train/loss" in content and b"eval/auc1" in content
