"""The table of every method on every dataset's demo data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from clipfusionvad.datasets import Dataset
from clipfusionvad.report.table import published

METRICS = {
    "auc1": "AUC",
    "ap1": "AP",
    "ano_auc1": "Ano-AUC",
    "mauc": "mAUC",
    "map_average": "detection mAP",
}


@dataclass(frozen=True)
class Cell:
    """One method on one dataset: mean loss of the first and the last epoch, metrics before and after training."""

    method: str
    dataset: Dataset
    first_loss: float
    last_loss: float
    untrained: Mapping[str, Any]
    trained: Mapping[str, Any]
    seconds: float

    @property
    def learned(self) -> bool:
        """Whether the loss fell and AUC and AP of the main branch rose."""
        rose = all(self.trained[key] > self.untrained[key] for key in ("auc1", "ap1"))
        return rose and self.last_loss < self.first_loss

    @property
    def notes(self) -> list[str]:
        """What is missing in the cell, and why."""
        notes = []
        if not published(self.method, self.dataset.name):
            notes.append(
                f"{self.method} was not published on {self.dataset.title}: trained with general options, no figure"
            )
        if "map_average" not in self.trained:
            notes.append(f"{self.method} tells no classes apart: no mAUC, no detection mAP")
        return notes

    def line(self) -> str:
        mark = "" if self.learned else "  DID NOT LEARN"
        return (
            f"{self.method:14} {self.dataset.title:14} loss {self.first_loss:7.3f} → {self.last_loss:7.3f}   "
            f"AUC {self._change('auc1')}   AP {self._change('ap1')}   {self.seconds:4.0f} s{mark}"
        )

    def _change(self, key: str) -> str:
        return f"{100 * self.untrained[key]:4.1f} → {100 * self.trained[key]:4.1f}"


def matrix_table(cells: Sequence[Cell]) -> pd.DataFrame:
    """A row per cell: losses, every metric before and after (percent), seconds, notes."""
    rows = []
    for cell in cells:
        row: dict[str, Any] = {"method": cell.method, "dataset": cell.dataset.name}
        row |= {"first_loss": cell.first_loss, "last_loss": cell.last_loss}
        for key, name in METRICS.items():
            scale = 1 if key.startswith("map") else 100
            for when, metrics in (("untrained", cell.untrained), ("trained", cell.trained)):
                value = metrics.get(key)
                row[f"{name} {when}"] = None if value is None else scale * value
        rows.append(row | {"seconds": cell.seconds, "learned": cell.learned, "notes": "; ".join(cell.notes)})
    return pd.DataFrame(rows)


def matrix_text(cells: Sequence[Cell]) -> str:
    """Methods down, datasets across, as Markdown; footnotes say why something is not defined."""
    datasets = list(dict.fromkeys(cell.dataset.title for cell in cells))
    notes = list(dict.fromkeys(note for cell in cells for note in cell.notes))
    lines = [
        "Demo data: AUC of the main branch in percent, untrained → trained (mean loss of the first → last epoch).",
        "",
        f"| | {' | '.join(datasets)} |",
        "|---" * (len(datasets) + 1) + "|",
    ]
    for method in dict.fromkeys(cell.method for cell in cells):
        row = {cell.dataset.title: _entry(cell, notes) for cell in cells if cell.method == method}
        lines.append(f"| {method} | " + " | ".join(row.get(title, "") for title in datasets) + " |")
    lines += ["", *(f"[{number}] {note}" for number, note in enumerate(notes, 1))]
    return "\n".join(lines).rstrip() + "\n"


def _entry(cell: Cell, notes: list[str]) -> str:
    marks = "".join(f"[{notes.index(note) + 1}]" for note in cell.notes)
    failed = "" if cell.learned else " DID NOT LEARN"
    return f"{cell._change('auc1')} ({cell.first_loss:.2f} → {cell.last_loss:.2f}) {marks}{failed}".strip()
