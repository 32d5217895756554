"""The trainings of a sweep, each in a folder of its own, and the table of results that is made from those folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from clipfusionvad.engine.run_folder import METRICS, flat_metrics, seed_folder
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_json, write_json, write_text

RESULTS = "results.csv"
_DONE = "done.json"


@dataclass(frozen=True)
class Trial:
    """One training: a cell with a seed. ``flags`` are those of the training script, complete but for --use-checkpoint.

    ``changed`` are the options that the cell sets, ``resolved`` all that the result depends on.
    """

    cell: str
    seed: int
    folder: Path
    dataset: str
    flags: tuple[str, ...]
    changed: Mapping[str, Any]
    resolved: Mapping[str, Any]

    def is_done(self) -> bool:
        """Whether its result is there; raises ``UserError`` for a result of other options."""
        path = self.folder / _DONE
        if not path.is_file():
            return False
        before = read_json(path, "record").get("options", {})
        if before != self.resolved:
            differing = sorted(
                key for key in before.keys() | self.resolved.keys() if before.get(key) != self.resolved.get(key)
            )
            raise UserError(
                f"{self.folder} was trained with another {', '.join(differing)}: name another --output-dir, or train "
                f"anew with --overwrite"
            )
        return True

    def finish(self, seconds: float) -> None:
        """Note that the result is there."""
        write_json(self.folder / _DONE, {"seconds": round(seconds, 3), "options": self.resolved})

    def metrics(self) -> dict[str, Any]:
        """The metrics of its best model, nested ones as ``map@0.1``."""
        return flat_metrics(read_json(self.folder / METRICS, "metrics")["best"])


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: with a result (both are false), stopped half-way, or refused for a reason."""

    error: str = ""
    stopped: bool = False


def trial_folder(folder: Path, cell: str, seed: int) -> Path:
    return seed_folder(folder / cell, seed)


def write_results(folder: Path, trials: Iterable[Trial], errors: Mapping[tuple[str, int], str]) -> pd.DataFrame:
    """Write ``results.csv``, a row for each trial, anew from what their folders hold."""
    rows = []
    for trial in trials:
        row: dict[str, Any] = {"cell": trial.cell, "seed": trial.seed, "state": "open", "error": ""}
        changed = dict(trial.changed)
        if trial.is_done():
            row |= {"state": "done"} | changed | trial.metrics()
        elif (trial.cell, trial.seed) in errors:
            row |= {"state": "failed", "error": errors[trial.cell, trial.seed]} | changed
        else:
            row |= changed
        rows.append(row)
    table = pd.DataFrame(rows)
    write_text(folder / RESULTS, table.to_csv(index=False))
    return table
