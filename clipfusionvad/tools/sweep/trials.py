"""The trainings of a sweep, each in its own folder, and the table of results built from these folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipfusionvad.engine.run_folder import METRICS, flat_metrics
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_json, write_json, write_text

if TYPE_CHECKING:
    import pandas as pd

RESULTS = "results.csv"
_DONE = "done.json"


@dataclass(frozen=True)
class Trial:
    """One training: a cell with a seed. ``flags`` are the command line of the training, without --use-checkpoint.

    ``changed`` are the options that the cell sets, ``resolved`` all options that the result depends on.
    """

    cell: str
    seed: int
    folder: Path
    dataset: str
    flags: tuple[str, ...]
    changed: Mapping[str, Any]
    resolved: Mapping[str, Any]

    @property
    def is_done(self) -> bool:
        return (self.folder / _DONE).is_file()

    def check(self, current_options: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        """Raise ``UserError`` for a result with other options; ``current_options`` translates older names."""
        if not self.is_done:
            return
        before = current_options(read_json(self.folder / _DONE, "record").get("options", {}))
        keys = before.keys() | self.resolved.keys()
        differing = sorted(key for key in keys if before.get(key) != self.resolved.get(key))
        if differing:
            raise UserError(
                f"{self.folder} was trained with another {', '.join(differing)}: name another --output-dir, or train "
                f"again with --overwrite"
            )

    def reset(self) -> None:
        """Forget that the training is finished."""
        (self.folder / _DONE).unlink(missing_ok=True)

    def finish(self, seconds: float) -> None:
        """Record that the training is finished."""
        write_json(self.folder / _DONE, {"seconds": round(seconds, 3), "options": self.resolved})

    def metrics(self) -> dict[str, Any]:
        """Return the metrics of the best model, nested ones as ``map@0.1``."""
        return flat_metrics(read_json(self.folder / METRICS, "metrics")["best"])


@dataclass(frozen=True)
class TrialEnd:
    """How a trial ended: finished (both are false), stopped half-way, or failed with an ``error``."""

    error: str = ""
    stopped: bool = False


def write_results(folder: Path, trials: Iterable[Trial], errors: Mapping[tuple[str, int], str]) -> pd.DataFrame:
    """Write ``results.csv``, a row for each trial, from the content of their folders."""
    import pandas as pd

    rows = []
    for trial in trials:
        error = errors.get((trial.cell, trial.seed), "")
        state = "done" if trial.is_done else "failed" if error else "open"
        row = {"cell": trial.cell, "seed": trial.seed, "state": state, "error": error if state == "failed" else ""}
        rows.append(row | dict(trial.changed) | (trial.metrics() if trial.is_done else {}))
    table = pd.DataFrame(rows)
    write_text(folder / RESULTS, table.to_csv(index=False))
    return table
