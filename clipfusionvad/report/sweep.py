"""The table of a sweep: cells over seeds, how far each is from the reference, and what was printed of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from clipfusionvad.datasets import find_dataset
from clipfusionvad.sweep.plan import Published

#: Shown where the method has them: the ranking metrics of its branches and the averages of detection mAP.
METRICS = ("auc1", "ap1", "auc2", "ap2", "mauc", "mean_ap", "map_average")


def sweep_text(
    table: pd.DataFrame, reference: str, published: Mapping[str, Published] | None = None, notes: Sequence[str] = ()
) -> str:
    """A Markdown table: mean ± standard deviation (n - 1) over the seeds in percent, and in brackets the mean
    difference from ``reference`` over the seeds that both have. ``table`` is that of ``results.csv``.

    What was ``published`` of cells stands in columns of its own, its sources below, and ``notes`` after them.
    """
    published = published or {}
    done = table[table["state"] == "done"]
    printed = {metric for paper in published.values() for metric in paper.figures}
    metrics = [metric for metric in _ordered(printed) if metric in printed or _measured(done, metric)]
    titles = [title for metric in metrics for title in (metric, *[f"{metric}, paper"] * (metric in printed))]
    lines = [_row(["cell", "seeds", *titles]), _row(["---"] + ["---:"] * (1 + len(titles)))]
    base = done[done["cell"] == reference].set_index("seed")
    for cell in dict.fromkeys(table["cell"]):
        own = done[done["cell"] == cell].set_index("seed")
        counted = f"{len(own)} of {(table['cell'] == cell).sum()}"
        figures = published[cell].figures if cell in published else {}
        values = _values(own, None if cell == reference else base, metrics, printed, figures)
        lines.append(_row([cell, counted, *values]))
    sources = dict.fromkeys(f"paper: {one.source} ({find_dataset(one.dataset).title})" for one in published.values())
    failed = table[table["state"] == "failed"]
    below = [*sources, *notes]
    below += [f"failed: {row.cell}, seed {row.seed}: {row.error}" for row in failed.itertuples()]
    return "\n".join(lines + ([""] + below if below else [])) + "\n"


def _ordered(printed: set[str]) -> list[str]:
    return [*METRICS, *sorted(printed - {*METRICS})]


def _measured(done: pd.DataFrame, metric: str) -> bool:
    return metric in done and bool(done[metric].notna().any())


def _values(
    own: pd.DataFrame,
    base: pd.DataFrame | None,
    metrics: Sequence[str],
    printed: set[str],
    figures: Mapping[str, float],
) -> list[str]:
    """The row of a cell: what was measured of each metric and, where somebody printed that one, the figure."""
    row = []
    for metric in metrics:
        row.append(_cell(own, base, metric) if metric in own else "-")
        if metric in printed:
            row.append(f"{figures[metric]:.2f}" if metric in figures else "")
    return row


def _cell(own: pd.DataFrame, base: pd.DataFrame | None, metric: str) -> str:
    # Detection mAP is in percent already.
    scale = 1.0 if metric.startswith("map") else 100.0
    values = own[metric].dropna().astype(float) * scale
    if values.empty:
        return "-"
    text = f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")
    shared = own.index.intersection(base.index) if base is not None else own.index[:0]
    if base is None or shared.empty:
        return text
    gaps = (own[metric][shared].astype(float) - base[metric][shared].astype(float)) * scale
    mean = float(np.mean(gaps))
    return text if np.isnan(mean) else f"{text} ({mean:+.2f})"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
