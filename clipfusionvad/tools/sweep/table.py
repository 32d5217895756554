"""The table of a sweep: cells over seeds, how far each is from the reference, and what was printed of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from clipfusionvad.datasets import find_dataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.tools.sweep.plan import Published
from clipfusionvad.tools.tables.compare import LEVEL, Difference, Resampler, explain

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


def differences_text(reference: str, runs: Mapping[str, Sequence[Path]]) -> str:
    """A Markdown table: how far each cell is from ``reference``, with the interval over test videos, and what of it is
    more than chance. ``runs`` are the folders of each cell's finished runs; a cell that cannot be compared says why.
    """
    resampler, found, refused = Resampler(metrics=METRICS), dict[str, dict[str, Difference]](), list[str]()
    for cell, folders in runs.items():
        if cell == reference:
            continue
        try:
            found[cell] = {one.metric: one for one in resampler.compare(runs[reference], folders)}
        except UserError as error:
            refused.append(f"{cell} is not compared: {error}")
    metrics = [metric for metric in METRICS if any(metric in own for own in found.values())]
    if not metrics:
        return "\n".join(refused) + "\n" if refused else ""
    lines = [
        f"Difference from {reference}, in points:",
        "",
        _row(["cell", *metrics]),
        _row(["---"] + ["---:"] * len(metrics)),
    ]
    lines += [_row([cell, *(_difference(own.get(metric)) for metric in metrics)]) for cell, own in found.items()]
    everything = [one for own in found.values() for one in own.values()]
    return "\n".join([*lines, "", *_conclusions(found, metrics), "", explain(everything), *refused]) + "\n"


def _difference(one: Difference | None) -> str:
    return (
        "-"
        if one is None
        else f"{one.difference:+.2f} [{one.low:+.2f}, {one.high:+.2f}]{' *' if _is_clear(one) else ''}"
    )


def _is_clear(one: Difference) -> bool:
    """Whether neither other test videos nor, where several were tried, other seeds would likely turn it."""
    limit = 1 - LEVEL
    return one.p < limit and (one.seed_p is None or one.seed_p < limit)


def _conclusions(found: Mapping[str, Mapping[str, Difference]], metrics: Sequence[str]) -> list[str]:
    """For each metric the cells that make a clear difference, the largest first."""
    lines = ["* p < 0.05 for the test videos and for the seeds:"]
    for metric in metrics:
        clear = [(cell, own[metric]) for cell, own in found.items() if metric in own and _is_clear(own[metric])]
        clear.sort(key=lambda pair: -abs(pair[1].difference))
        said = ", ".join(f"{cell} {one.difference:+.2f}" for cell, one in clear)
        lines.append(f"- {metric}: {said or 'no cell is clearly apart'}")
    return lines


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
