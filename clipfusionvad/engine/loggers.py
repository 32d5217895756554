"""Curves sent to services that compare runs, Weights & Biases and MLflow, beside those of TensorBoard.

Where the service is, and under which project, is set as for any other program: by ``wandb login``, ``WANDB_PROJECT``
and ``WANDB_MODE``, or by ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME``.
"""

from __future__ import annotations

import importlib
import os
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.io.files import read_json, write_json

#: The name under which runs are kept where the environment says no other.
PROJECT = "clipfusionvad"
#: What a run is called there, so that a resumed one goes on in the same place.
IDS = "trackers.json"
# MLflow takes no more points in one message.
_AT_ONCE = 1000


class Tracker(ABC):
    """A run's place at a service. Points wait until ``flush``: what a resumed run makes anew has not been sent."""

    package: ClassVar[str]

    def __init__(self, folder: Path, options: Mapping[str, Any]):
        """Open the run of a folder, anew or again; ``UserError`` where that cannot be, before anything is trained."""
        try:
            self._module: Any = importlib.import_module(self.package)
        except ImportError as error:
            raise UserError(f"--track {self.package} needs a package: pip install {self.package}") from error
        ids = read_json(folder / IDS, "names of runs") if (folder / IDS).is_file() else {}
        self._waiting: list[tuple[int, dict[str, float]]] = []
        self._told = False
        try:
            own = self._open(folder, options, ids.get(self.package))
        # Each service has errors of its own, and those of the network.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--track {self.package}: no run could be opened ({reason}); see docs/runs.md") from error
        write_json(folder / IDS, ids | {self.package: own})

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Points of some curves at a step."""
        self._waiting.append((step, dict(values)))

    def flush(self) -> None:
        """Send what waits. A service that cannot be reached now is told once, and tried again next time."""
        try:
            self._send(self._waiting)
        except Exception as error:
            if not self._told:
                reason = " ".join(str(error).split())
                warn(f"--track {self.package}: {len(self._waiting)} steps not sent yet ({reason})")
            self._told = True
            return
        self._waiting = []

    def close(self) -> None:
        self.flush()
        if self._waiting:
            warn(f"--track {self.package}: {len(self._waiting)} steps were never sent; the run's folder has them")
        self._close()

    @abstractmethod
    def _open(self, folder: Path, options: Mapping[str, Any], known: str | None) -> str:
        """Open the run named ``known``, or a new one; returns its name."""

    @abstractmethod
    def _send(self, points: list[tuple[int, dict[str, float]]]) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...


class WandB(Tracker):
    package = "wandb"

    def _open(self, folder: Path, options: Mapping[str, Any], known: str | None) -> str:
        own = known or uuid.uuid4().hex[:8]
        self._run = self._module.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_title(folder),
            dir=str(folder),
            id=own,
            resume="allow",
            # Several seeds are trained in one process.
            reinit="create_new",
            config=dict(options),
            settings=self._module.Settings(silent=True),
        )
        return own

    def _send(self, points: list[tuple[int, dict[str, float]]]) -> None:
        for step, values in points:
            self._run.log(values, step=step)

    def _close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    package = "mlflow"

    def _open(self, folder: Path, options: Mapping[str, Any], known: str | None) -> str:
        self._client = self._module.MlflowClient()
        if known:
            self._client.update_run(known, status="RUNNING")
            self._id = known
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(where, run_name=_title(folder)).info.run_id
        for key, value in options.items():
            self._client.log_param(self._id, key, value)
        return self._id

    def _send(self, points: list[tuple[int, dict[str, float]]]) -> None:
        now, entities = int(1000 * time.time()), self._module.entities
        metrics = [
            entities.Metric(re.sub(r"[^\w./ -]", "_", name), value, now, step)
            for step, values in points
            for name, value in values.items()
        ]
        for start in range(0, len(metrics), _AT_ONCE):
            self._client.log_batch(self._id, metrics=metrics[start : start + _AT_ONCE])

    def _close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: dict[str, type[Tracker]] = {tracker.package: tracker for tracker in (WandB, MLflow)}


def _title(folder: Path) -> str:
    """A run's folder as people call it: that of one of several seeds by two names."""
    parts = folder.resolve().parts
    return "/".join(parts[-2:] if re.fullmatch(r"seed\d+", parts[-1]) else parts[-1:])
