"""Curves sent to Weights & Biases and MLflow, besides those of TensorBoard.

The service and the project are set as for any other program: by ``wandb login``, ``WANDB_PROJECT`` and ``WANDB_MODE``,
or by ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME``.
"""

import importlib
import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.io.files import read_json, write_json

#: The project of the runs where the environment names none.
PROJECT = "clipfusionvad"
#: The id of a run at each service, so that a resumed run continues there.
IDS = "trackers.json"
# The most points that MLflow takes in one message.
_MOST_POINTS = 1000


class WandB:
    """A run at Weights & Biases. Its client reads the event files that are written for TensorBoard."""

    def __init__(self, wandb: Any, folder: Path, options: Mapping[str, Any], run_id: str | None):
        self.run_id = run_id or uuid.uuid4().hex[:8]
        self._wandb = wandb
        wandb.tensorboard.patch(root_logdir=str(folder))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_title(folder),
            dir=str(folder),
            id=self.run_id,
            resume="allow",
            config=dict(options),
            settings=wandb.Settings(silent=True),
        )
        # The patch makes this class tell the client which folder to read.
        event_file_writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        event_file_writer.EventFileWriter(str(folder / CURVES)).close()

    def add(self, values: Mapping[str, float], step: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()
        self._wandb.tensorboard.unpatch()


class MLflow:
    """A run at MLflow. Points wait until ``flush``, so that a resumed run does not send any of them twice."""

    def __init__(self, mlflow: Any, folder: Path, options: Mapping[str, Any], run_id: str | None):
        self._mlflow, self._client = mlflow, mlflow.MlflowClient()
        self._waiting: list[tuple[int, dict[str, float]]] = []
        self._warned = False
        if run_id:
            self._client.update_run(run_id, status="RUNNING")
            self.run_id = run_id
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.run_id = self._client.create_run(experiment_id, run_name=_title(folder)).info.run_id
        for key, value in options.items():
            self._client.log_param(self.run_id, key, value)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add a point at a step to each of some curves."""
        self._waiting.append((step, dict(values)))

    def flush(self) -> None:
        """Send the points that wait. Where the service cannot be reached, warn once and try again next time."""
        now, metric = int(1000 * time.time()), self._mlflow.entities.Metric
        points = [
            metric(re.sub(r"[^\w./ -]", "_", name), value, now, step)
            for step, values in self._waiting
            for name, value in values.items()
        ]
        try:
            for start in range(0, len(points), _MOST_POINTS):
                self._client.log_batch(self.run_id, metrics=points[start : start + _MOST_POINTS])
        except Exception as error:
            if not self._warned:
                warn(f"--track mlflow: {len(self._waiting)} steps not sent yet ({_one_line(error)})")
            self._warned = True
            return
        self._waiting = []

    def close(self) -> None:
        self.flush()
        if self._waiting:
            warn(f"--track mlflow: {len(self._waiting)} steps were never sent; the run's folder has them")
        self._client.set_terminated(self.run_id)


TRACKERS: dict[str, type[WandB] | type[MLflow]] = {"wandb": WandB, "mlflow": MLflow}
#: The folder of the event files in that of a run.
CURVES = "tensorboard"


def open_tracker(name: str, folder: Path, options: Mapping[str, Any]) -> WandB | MLflow:
    """Open the run of a folder at a service, a new one or the one it had; ``UserError`` where that is not possible."""
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--track {name} needs a package: pip install {name}") from error
    ids = read_json(folder / IDS, "ids of runs") if (folder / IDS).is_file() else {}
    try:
        tracker = TRACKERS[name](package, folder, options, ids.get(name))
    # Each service has its own errors, and those of the network.
    except Exception as error:
        raise UserError(f"--track {name}: no run could be opened ({_one_line(error)}); see docs/runs.md") from error
    write_json(folder / IDS, ids | {name: tracker.run_id})
    return tracker


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _title(folder: Path) -> str:
    """Return the name of a run's folder, with that of the folder around it for one of several seeds."""
    parts = folder.resolve().parts
    return "/".join(parts[-2:] if re.fullmatch(r"seed\d+", parts[-1]) else parts[-1:])
