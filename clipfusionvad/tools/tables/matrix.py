"""The table of every method on every dataset's demo data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipfusionvad.datasets import Dataset
from clipfusionvad.report.formatting import Table, to_markdown
from clipfusionvad.report.table import published

if TYPE_CHECKING:
    import pandas as pd

METRICS = {"auc1": "AUC", "ap1": "AP", "ano_auc1": "Ano-AUC", "mauc": "mAUC", "map_average": "detection mAP"}


@dataclass(frozen=True)
class DemoResult:
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
        """What is missing, and why."""
        notes = []
        if not published(self.method, self.dataset.name):
            title = self.dataset.title
            notes.append(f"{self.method} was not published on {title}: trained with general options, no figure")
        if "map_average" not in self.trained:
            notes.append(f"{self.method} does not predict classes: no mAUC, no detection mAP")
        return notes

    def line(self) -> str:
        mark = "" if self.learned else "  DID NOT LEARN"
        return (
            f"{self.method:14} {self.dataset.title:14} loss {self.first_loss:7.3f} → {self.last_loss:7.3f}   "
            f"AUC {self.change('auc1')}   AP {self.change('ap1')}   {self.seconds:4.0f} s{mark}"
        )

    def change(self, key: str) -> str:
        """Return a metric before and after training, in percent."""
        return f"{100 * self.untrained[key]:4.1f} → {100 * self.trained[key]:4.1f}"


def matrix_table(results: Sequence[DemoResult]) -> pd.DataFrame:
    """Return a row per result: losses, every metric before and after (percent), seconds, notes."""
    rows = []
    for result in results:
        row: dict[str, Any] = {"method": result.method, "dataset": result.dataset.name}
        row |= {"first_loss": result.first_loss, "last_loss": result.last_loss}
        for key, name in METRICS.items():
            scale = 1 if key.startswith("map") else 100
            for when, metrics in (("untrained", result.untrained), ("trained", result.trained)):
                value = metrics.get(key)
                row[f"{name} {when}"] = None if value is None else scale * value
        rows.append(row | {"seconds": result.seconds, "learned": result.learned, "notes": "; ".join(result.notes)})
    import pandas as pd

    return pd.DataFrame(rows)


def matrix_text(results: Sequence[DemoResult]) -> str:
    """Render methods down, datasets across as Markdown; footnotes explain what is missing."""
    notes = list(dict.fromkeys(note for result in results for note in result.notes))
    entries = {(result.method, result.dataset.title): _entry(result, notes) for result in results}
    datasets = list(dict.fromkeys(title for _, title in entries))
    rows = [
        [method, *(entries.get((method, title), "") for title in datasets)]
        for method in dict.fromkeys(method for method, _ in entries)
    ]
    title = "Demo data: AUC of the main branch in percent, untrained → trained (mean loss of the first → last epoch)."
    footnotes = "\n".join(f"[{number}] {note}" for number, note in enumerate(notes, 1))
    return f"{title}\n\n{to_markdown(Table(['method', *datasets], rows, note=footnotes))}"


def _entry(result: DemoResult, notes: list[str]) -> str:
    marks = "".join(f"[{notes.index(note) + 1}]" for note in result.notes)
    failed = "" if result.learned else " DID NOT LEARN"
    return f"{result.change('auc1')} ({result.first_loss:.2f} → {result.last_loss:.2f}) {marks}{failed}".strip()
