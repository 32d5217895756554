"""The table of a sweep: cells over seeds, and how far each is from the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

#: Shown where the method has them: the ranking metrics of its branches and the averages of detection mAP.
METRICS = ("auc1", "ap1", "auc2", "ap2", "mauc", "mean_ap", "map_average")
_PERCENT = {"map_average": 1.0}


def sweep_text(table: pd.DataFrame, reference: str) -> str:
    """A Markdown table: mean ± standard deviation (n - 1) over the seeds in percent, and in brackets the mean
    difference from ``reference`` over the seeds that both have. ``table`` is that of ``results.csv``."""
    done = table[table["state"] == "done"]
    metrics = [metric for metric in METRICS if metric in done and done[metric].notna().any()]
    lines = [_row(["cell", "seeds", *metrics]), _row(["---"] + ["---:"] * (1 + len(metrics)))]
    for cell in dict.fromkeys(table["cell"]):
        own = done[done["cell"] == cell].set_index("seed")
        base = done[done["cell"] == reference].set_index("seed")
        counted = f"{len(own)} of {(table['cell'] == cell).sum()}"
        lines.append(_row([cell, counted, *(_cell(own, base, metric, cell == reference) for metric in metrics)]))
    failed = table[table["state"] == "failed"]
    notes = [f"failed: {row.cell}, seed {row.seed}: {row.error}" for row in failed.itertuples()]
    return "\n".join(lines + ([""] + notes if notes else [])) + "\n"


def _cell(own: pd.DataFrame, base: pd.DataFrame, metric: str, is_reference: bool) -> str:
    values = own[metric].dropna().astype(float) * _PERCENT.get(metric, 100.0)
    if values.empty:
        return "-"
    text = f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")
    shared = own.index.intersection(base.index)
    if is_reference or shared.empty:
        return text
    gaps = (own[metric][shared].astype(float) - base[metric][shared].astype(float)) * _PERCENT.get(metric, 100.0)
    mean = float(np.mean(gaps))
    return text if np.isnan(mean) else f"{text} ({mean:+.2f})"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
