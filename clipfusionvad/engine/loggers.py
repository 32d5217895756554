"""The records that a run appends to, and its curves: TensorBoard, Weights & Biases, MLflow.

The service and the project are set as for any other program: by ``wandb login``, ``WANDB_PROJECT`` and ``WANDB_MODE``,
or by ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME``.
"""

import contextlib
import importlib
import json
import os
import re
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipfusionvad.engine.run_folder import CURVES, EVALUATIONS, EVALUATIONS_TABLE, IDS, LOSSES, OPTIONS, flat_metrics
from clipfusionvad.io import files
from clipfusionvad.io.errors import UserError, warn

#: The project of the runs where the environment names none.
PROJECT = "clipfusionvad"


class RunLog:
    """Writes a run's records. Opened at a step, after some evaluations, it drops later records of an interrupted run.

    ``metrics.jsonl`` one line per evaluation, ``metrics.csv`` the same as a table, ``losses.csv`` one line per
    step, ``tensorboard/`` both as curves, which go to ``trackers`` (names of ``TRACKERS``) too.
    ``checksums`` are those that the first and the third must have then.

    Raises ``UserError`` for records that have changed since, and where they cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        step: int = 0,
        evaluations: int = 0,
        checksums: Mapping[str, int] | None = None,
        trackers: Sequence[str] = (),
    ):
        # TensorBoard takes a second to import.
        from clipfusionvad.io.event_log import AppendedText, Curves

        self.folder = folder
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(folder)
        # A killed run may have left the last line incomplete.
        lines = {
            name: [line for line in files.read_text(path, "record").splitlines(keepends=True) if line.endswith("\n")]
            for name in (EVALUATIONS, LOSSES)
            if (path := folder / name).exists()
        }
        name, kept = EVALUATIONS, lines.get(EVALUATIONS, [])[:evaluations]
        try:
            self.evaluations = [json.loads(line) for line in kept]
            name, (header, *rows) = LOSSES, lines.get(LOSSES) or [""]
            rows = [row for row in rows if int(row.split(",", 1)[0]) <= step]
            texts = {EVALUATIONS: "".join(kept), LOSSES: "".join([header, *rows]) if rows else ""}
            # A state may be resumed without its records; they then begin here.
            for name, crc32 in (checksums or {}).items():
                if name in lines and zlib.crc32(texts[name].encode()) != crc32:
                    raise ValueError
        except ValueError as error:
            raise UserError(
                f"{folder / name} is damaged: it has changed since the state was saved; restore the file, "
                f"or move it away to continue with a new record"
            ) from error
        options = files.read_yaml(folder / OPTIONS, "options") if trackers else {}
        sent = [open_tracker(name, folder, options) for name in trackers]
        self._metrics, self._losses = (AppendedText(folder / name, text) for name, text in texts.items())
        self._curves: list[Any] = [Curves(folder / CURVES, step), *sent]

    @property
    def checksums(self) -> dict[str, int]:
        """Checksums of the records so far."""
        return {EVALUATIONS: self._metrics.crc32, LOSSES: self._losses.crc32}

    def log_step(self, step: int, epoch: int, losses: Mapping[str, float], lr: float) -> None:
        values = {"loss": sum(losses.values()), **losses, "lr": lr}
        if not self._losses.size:
            self._losses.write(",".join(["step", "epoch", *values]) + "\n")
        self._losses.write(",".join([str(step), str(epoch), *map(repr, values.values())]) + "\n")
        self._draw({f"train/{name}": value for name, value in values.items()}, step)

    def log_evaluation(self, record: dict[str, Any]) -> None:
        """``record`` holds "step", "epoch", "metrics" and whether it "improved"."""
        # It takes a second to import.
        import pandas as pd

        self.evaluations.append(record)
        self._metrics.write(json.dumps(files.without_nan(record)) + "\n")
        found = flat_metrics(record["metrics"])
        self._draw({f"eval/{key}": value for key, value in found.items() if value is not None}, record["step"])
        rows = [{"step": r["step"], "epoch": r["epoch"], **flat_metrics(r["metrics"])} for r in self.evaluations]
        files.write_text(self.folder / EVALUATIONS_TABLE, pd.DataFrame(rows).to_csv(index=False))

    def _draw(self, values: Mapping[str, float], step: int) -> None:
        for curves in self._curves:
            curves.add(values, step)

    def flush(self) -> None:
        """Write everything to the disk."""
        for file in (self._metrics, self._losses, *self._curves):
            file.flush()

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for file in (self._metrics, self._losses, *self._curves):
                stack.callback(file.close)


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
            # MLflow takes at most 1000 points in one message.
            for start in range(0, len(points), 1000):
                self._client.log_batch(self.run_id, metrics=points[start : start + 1000])
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


def open_tracker(name: str, folder: Path, options: Mapping[str, Any]) -> WandB | MLflow:
    """Open the run of a folder at a service, a new one or the one it had; ``UserError`` where that is not possible."""
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--track {name} needs a package: pip install {name}") from error
    ids = files.read_json(folder / IDS, "ids of runs") if (folder / IDS).is_file() else {}
    try:
        tracker = TRACKERS[name](package, folder, options, ids.get(name))
    # Each service has its own errors, and those of the network.
    except Exception as error:
        raise UserError(f"--track {name}: no run could be opened ({_one_line(error)}); see docs/runs.md") from error
    files.write_json(folder / IDS, ids | {name: tracker.run_id})
    return tracker


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _title(folder: Path) -> str:
    """Return the name of a run's folder, with that of the folder around it for one of several seeds."""
    parts = folder.resolve().parts
    return "/".join(parts[-2:] if re.fullmatch(r"seed\d+", parts[-1]) else parts[-1:])
