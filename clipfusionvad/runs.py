"""The folder of a run: options, environment, metrics, curves and checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from clipfusionvad.datasets import DATASETS, Dataset, described
from clipfusionvad.errors import UserError
from clipfusionvad.files import without_nan, write_json, write_text
from clipfusionvad.origin import Sources

LAST, BEST, CALIBRATION, METRICS = "last.pt", "best.pt", "calibration.pt", "metrics.json"
OPTIONS, DATASET, ENVIRONMENT, DATA = "options.yaml", "dataset.yaml", "environment.json", "data.csv"
LOSSES, EVALUATIONS = "losses.csv", "metrics.jsonl"
_SEED = "seed"


def choose_folder(given: str | None, stem: str, resume: bool, overwrite: bool) -> Path:
    """The folder of a run: the one given, else ``runs/stem`` with a number where that is taken.

    A given folder that holds a run already is refused unless the run is resumed or to be overwritten.
    """
    if given is None:
        return _numbered(stem, resume)
    folder = Path(given)
    if seeds_in(folder):
        raise UserError(f"{folder} holds the runs of several seeds: name another --output-dir")
    if (folder / LAST).exists() and not resume:
        if not overwrite:
            raise _taken(folder, "a run")
        clear_run(folder)
    return folder


def choose_seeds_folder(given: str | None, stem: str, resume: bool, overwrite: bool, seeds: Sequence[int]) -> Path:
    """The same for the folder in which each of several seeds has one of its own; nothing is cleared."""
    if given is None:
        return _numbered(stem, resume)
    folder = Path(given)
    if (folder / LAST).exists():
        raise UserError(f"{folder} holds the run of one seed: name another --output-dir for several")
    there = [str(seed) for seed in seeds if (seed_folder(folder, seed) / LAST).exists()]
    if there and not (resume or overwrite):
        raise _taken(folder, f"a run of seed {', '.join(there)}")
    return folder


def seed_folder(folder: Path, seed: int) -> Path:
    return folder / f"{_SEED}{seed}"


def seeds_in(folder: Path) -> list[str]:
    """The names of the folders in it that hold the run of a seed."""
    return sorted(path.parent.name for path in folder.glob(f"{_SEED}*/{LAST}"))


def clear_run(folder: Path) -> None:
    """Remove the state and the records of a run, if there are any."""
    for name in (LAST, BEST, CALIBRATION, EVALUATIONS, "metrics.csv", LOSSES):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def _taken(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder} already holds {what}: continue it with --use-checkpoint, name another --output-dir, "
        f"or start anew with --overwrite"
    )


def _numbered(stem: str, resume: bool) -> Path:
    number, folder = 1, Path("runs") / stem
    while folder.exists():
        number += 1
        following = Path("runs") / f"{stem}-{number}"
        if resume and not following.exists():
            break
        folder = following
    return folder


def record_run(folder: Path, options: Mapping[str, Any], about: Mapping[str, Any], sources: Sources) -> None:
    """Write the resolved options (a valid --config again), the environment (``about``) and what was read."""
    write_text(folder / OPTIONS, yaml.safe_dump(dict(options), sort_keys=True))
    write_json(folder / ENVIRONMENT, about)
    sources.write(folder / DATA)


def record_dataset(folder: Path, dataset: Dataset) -> None:
    """Keep a dataset of the user's own as the YAML file that describes it; benchmarks are known by name."""
    if dataset.name not in DATASETS:
        write_text(folder / DATASET, yaml.safe_dump(described(dataset), sort_keys=False, allow_unicode=True))


class RunLog:
    """Writes a run's records; opened at a step, after so many evaluations, it drops what an interrupted run had
    written past them.

    ``metrics.jsonl`` one line per evaluation, ``metrics.csv`` the same as a table, ``losses.csv`` one line per
    step, ``tensorboard/`` both as curves.
    """

    def __init__(self, folder: Path, step: int = 0, evaluations: int = 0):
        # TensorBoard takes seconds to import, which a test or a --help need not pay.
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            # A run that was killed while it wrote; whole files never have such a name.
            leftover.unlink(missing_ok=True)
        self.evaluations = self._read_evaluations()[:evaluations]
        write_text(folder / EVALUATIONS, "".join(_line(record) for record in self.evaluations))
        self._losses = folder / LOSSES
        self._trim_losses(step)
        self._metrics = (folder / EVALUATIONS).open("a", encoding="utf-8")
        self._loss_file = self._losses.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log_step(self, step: int, epoch: int, losses: Mapping[str, float], lr: float) -> None:
        values = {"loss": sum(losses.values()), **losses, "lr": lr}
        if self._loss_file.tell() == 0:
            self._loss_file.write(",".join(["step", "epoch", *values]) + "\n")
        self._loss_file.write(",".join([str(step), str(epoch), *map(repr, values.values())]) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def log_evaluation(self, record: dict[str, Any]) -> None:
        """``record`` holds "step", "epoch", "metrics" and whether it "improved"."""
        self.evaluations.append(record)
        self._metrics.write(_line(record))
        self._metrics.flush()
        for name, value in _flat(record["metrics"]).items():
            if value is not None:
                self._writer.add_scalar(f"eval/{name}", value, record["step"])
        self._write_table()

    def flush(self) -> None:
        self._loss_file.flush()
        self._writer.flush()

    def close(self) -> None:
        self._metrics.close()
        self._loss_file.close()
        self._writer.close()

    def _write_table(self) -> None:
        rows = [{"step": r["step"], "epoch": r["epoch"], **_flat(r["metrics"])} for r in self.evaluations]
        write_text(self.folder / "metrics.csv", pd.DataFrame(rows).to_csv(index=False))

    def _read_evaluations(self) -> list[dict[str, Any]]:
        path = self.folder / EVALUATIONS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        # A line without its end was being written when the run was killed.
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _trim_losses(self, step: int) -> None:
        lines = self._losses.read_text(encoding="utf-8").splitlines(keepends=True) if self._losses.exists() else []
        kept = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",", 1)[0]) <= step]
        write_text(self._losses, "".join(lines[:1] + kept) if kept else "")


class NoLog:
    """Stands for the log in a process that leaves writing to another."""

    def log_step(self, step: int, epoch: int, losses: Mapping[str, float], lr: float) -> None:
        pass

    def log_evaluation(self, record: dict[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(without_nan(record)) + "\n"


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        flat |= _flat(value, f"{prefix}{name}@") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
