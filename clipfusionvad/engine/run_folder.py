"""The folder of a run: options, environment, metrics, curves and checkpoints."""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from clipfusionvad.datasets import DATASETS, Dataset, yaml_content
from clipfusionvad.engine.loggers import CURVES, IDS, MLflow, WandB, open_tracker
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_text, read_yaml, remove_leftovers, without_nan, write_json, write_text, writing
from clipfusionvad.io.provenance import Sources

if TYPE_CHECKING:
    from clipfusionvad.io.event_log import Curves

LAST, PREVIOUS, BEST, NORMAL_CENTROID, METRICS = "last.pt", "previous.pt", "best.pt", "calibration.pt", "metrics.json"
OPTIONS, DATASET, ENVIRONMENT, DATA = "options.yaml", "dataset.yaml", "environment.json", "data.csv"
LOSSES, EVALUATIONS = "losses.csv", "metrics.jsonl"
_SEED = "seed"
Parsed = TypeVar("Parsed")


def choose_folder(given: str | None, stem: str, resume: bool) -> Path:
    """Return the folder of a run: the given one, else ``runs/stem``, with a number where that exists."""
    return _numbered(stem, resume) if given is None else Path(given)


def check_folder(folder: Path, may_be_taken: bool) -> None:
    """Raise ``UserError`` for a folder with the runs of several seeds, or with a run that must not be changed."""
    if seeds_in(folder):
        raise UserError(f"{folder} holds the runs of several seeds: name another --output-dir")
    if states_in(folder) and not may_be_taken:
        raise _taken(folder, "a run")


def check_seeds_folder(folder: Path, may_be_taken: bool, seeds: Sequence[int]) -> None:
    """Do the same for the folder that holds a folder for each of several seeds."""
    if states_in(folder):
        raise UserError(f"{folder} holds the run of one seed: name another --output-dir for several")
    there = [str(seed) for seed in seeds if states_in(seed_folder(folder, seed))]
    if there and not may_be_taken:
        raise _taken(folder, f"a run of seed {', '.join(there)}")


def seed_folder(folder: Path, seed: int) -> Path:
    return folder / f"{_SEED}{seed}"


def seeds_in(folder: Path) -> list[str]:
    """Return the names of the folders in it that hold the run of a seed."""
    return sorted(path.name for path in folder.glob(f"{_SEED}*") if states_in(path))


def states_in(folder: Path) -> list[Path]:
    """Return the saved states of a run, the newest first."""
    return [path for path in (folder / LAST, folder / PREVIOUS) if path.is_file()]


def clear_run(folder: Path) -> None:
    """Remove the states and the records of a run."""
    with writing(folder):
        for name in (PREVIOUS, LAST, BEST, NORMAL_CENTROID, EVALUATIONS, "metrics.csv", LOSSES, IDS):
            (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / CURVES, ignore_errors=True)


def _taken(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder} already holds {what}: continue it with --use-checkpoint, name another --output-dir, "
        f"or start again with --overwrite"
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
    """Write the description of a dataset that is not a benchmark as a YAML file."""
    if dataset.name not in DATASETS:
        write_text(folder / DATASET, yaml.safe_dump(yaml_content(dataset), sort_keys=False, allow_unicode=True))


class RunLog:
    """Writes a run's records. Opened at a step, after some evaluations, it drops later records of an interrupted run.

    ``metrics.jsonl`` one line per evaluation, ``metrics.csv`` the same as a table, ``losses.csv`` one line per
    step, ``tensorboard/`` both as curves, which go to ``trackers`` (names of ``loggers.TRACKERS``) too.
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
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        lines = _whole_lines(folder / EVALUATIONS)[:evaluations]
        self.evaluations = [_parse(line, folder / EVALUATIONS, json.loads) for line in lines]
        header, *rows = _whole_lines(folder / LOSSES) or [""]
        kept = [row for row in rows if _parse(row, folder / LOSSES, _step_of) <= step]
        texts = {EVALUATIONS: "".join(lines), LOSSES: "".join([header, *kept]) if kept else ""}
        for name, text in texts.items():
            # A state may be resumed without its records; they then begin here.
            if checksums and (folder / name).is_file() and zlib.crc32(text.encode()) != checksums[name]:
                raise _unfit(folder / name)
        options = read_yaml(folder / OPTIONS, "options") if trackers else {}
        sent = [open_tracker(name, folder, options) for name in trackers]
        self._metrics, self._losses = (AppendedText(folder / name, text) for name, text in texts.items())
        self._curves: list[Curves | WandB | MLflow] = [Curves(folder / CURVES, step), *sent]

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
        self.evaluations.append(record)
        self._metrics.write(_line(record))
        found = flat_metrics(record["metrics"])
        self._draw({f"eval/{key}": value for key, value in found.items() if value is not None}, record["step"])
        self._write_table()

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

    def _write_table(self) -> None:
        rows = [{"step": r["step"], "epoch": r["epoch"], **flat_metrics(r["metrics"])} for r in self.evaluations]
        import pandas as pd

        write_text(self.folder / "metrics.csv", pd.DataFrame(rows).to_csv(index=False))


def _whole_lines(path: Path) -> list[str]:
    """Return the complete lines of a record; a killed run may leave the last one incomplete."""
    lines = read_text(path, "record").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def _parse(line: str, path: Path, read: Callable[[str], Parsed]) -> Parsed:
    try:
        return read(line)
    except ValueError as error:
        raise _unfit(path) from error


def _step_of(row: str) -> int:
    return int(row.split(",", 1)[0])


def _unfit(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged: it has changed since the state was saved; restore the file, "
        f"or move it away to continue with a new record"
    )


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(without_nan(record)) + "\n"


def flat_metrics(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested metrics into one row: ``map@0.1``."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        flat |= flat_metrics(value, f"{prefix}{name}@") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
