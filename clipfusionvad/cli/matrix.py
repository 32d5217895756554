"""Train and test every method on the demo data of every dataset, and write the table."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipfusionvad.cli.demo import demo_run, run_demo
from clipfusionvad.cli.parser import Parser
from clipfusionvad.datasets import DATASETS, Dataset, find_dataset
from clipfusionvad.engine.run_folder import LOSSES
from clipfusionvad.io.errors import warn
from clipfusionvad.io.files import write_text
from clipfusionvad.models import method_names
from clipfusionvad.report.formatting import Table, to_markdown
from clipfusionvad.report.table import published
from clipfusionvad.tools.demo import FOLDER

METRICS = {"auc1": "AUC", "ap1": "AP", "ano_auc1": "Ano-AUC", "mauc": "mAUC", "map_average": "detection mAP"}


@dataclass(frozen=True)
class DemoResult:
    """One method on one dataset: mean loss of the first and the last epoch, metrics before and after training.

    The losses are None for a method that has nothing to train.
    """

    method: str
    dataset: Dataset
    first_loss: float | None
    last_loss: float | None
    untrained: Mapping[str, Any]
    trained: Mapping[str, Any]
    seconds: float

    @property
    def learned(self) -> bool:
        """Whether the loss fell and AUC and AP of the main branch rose, if there was something to train."""
        if self.first_loss is None or self.last_loss is None:
            return True
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
            f"{self.method:14} {self.dataset.title:14} loss {self.losses:17}   "
            f"AUC {self.change('auc1')}   AP {self.change('ap1')}   {self.seconds:4.0f} s{mark}"
        )

    @property
    def losses(self) -> str:
        return "nothing to train" if self.first_loss is None else f"{self.first_loss:.2f} → {self.last_loss:.2f}"

    def change(self, key: str) -> str:
        """Return a metric before and after training, in percent."""
        return f"{100 * self.untrained[key]:4.1f} → {100 * self.trained[key]:4.1f}"


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)

    pairs = [(method, find_dataset(name)) for method in args.methods for name in args.datasets]
    results = []
    for method, dataset in (bar := tqdm(pairs, "matrix", disable=None)):
        bar.set_postfix_str(f"{method} on {dataset.title}")
        results.append(_run_pair(method, dataset))
        print(results[-1].line(), flush=True)
    text = matrix_text(results)
    write_text(args.output / "matrix.md", text)
    write_text(args.output / "matrix.csv", matrix_csv(results))
    print(f"\n{text}\nwritten to {args.output}: matrix.md, matrix.csv; the runs: {FOLDER}/DATASET/run_METHOD")
    return 0 if all(result.learned for result in results) else 1


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad matrix", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=method_names(), default=method_names())
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="folder of matrix.csv and matrix.md")
    return parser


def _run_pair(method: str, dataset: Dataset) -> DemoResult:
    """Train, unless the run exists, and test; what both print is written to ``matrix.log`` in the run's folder."""
    run, start = demo_run(method, dataset), time.perf_counter()
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "matrix.log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        trained = (run / "metrics.json").exists() or run_demo(method, dataset) == 0
        if not trained or run_demo(method, dataset) != 0:
            # A training that was stopped by a signal has saved its state and returned.
            warn(f"stopped at {method} on {dataset.title}; the same command continues from there")
            raise KeyboardInterrupt
    results = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    import pandas as pd

    first = last = None
    if (run / LOSSES).stat().st_size:
        losses = pd.read_csv(run / LOSSES).groupby("epoch")["loss"].mean()
        first, last = losses.iloc[0], losses.iloc[-1]
    seconds = time.perf_counter() - start
    return DemoResult(method, dataset, first, last, results["untrained"], results["best"], seconds)


def matrix_csv(results: Sequence[DemoResult]) -> str:
    """Return a line per result: losses, every metric before and after (percent), seconds, notes."""
    import pandas as pd

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
    return str(pd.DataFrame(rows).to_csv(index=False))


def matrix_text(results: Sequence[DemoResult]) -> str:
    """Render methods down, datasets across as Markdown; footnotes explain what is missing."""
    notes = list(dict.fromkeys(note for result in results for note in result.notes))
    entries = {}
    for result in results:
        marks = "".join(f"[{notes.index(note) + 1}]" for note in result.notes)
        failed = "" if result.learned else " DID NOT LEARN"
        text = f"{result.change('auc1')} ({result.losses}) {marks}{failed}".strip()
        entries[result.method, result.dataset.title] = text
    methods, datasets = (dict.fromkeys(names) for names in zip(*entries, strict=True))
    rows = [[method, *(entries.get((method, title), "") for title in datasets)] for method in methods]
    title = "Demo data: AUC of the main branch in percent, untrained → trained (mean loss of the first → last epoch)."
    footnotes = "\n".join(f"[{number}] {note}" for number, note in enumerate(notes, 1))
    return f"{title}\n\n{to_markdown(Table(['method', *datasets], rows, note=footnotes))}"
