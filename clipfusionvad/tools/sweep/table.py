"""The tables of a sweep: cells over seeds, their differences from the reference, published figures beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from clipfusionvad.datasets import find_dataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.report.formatting import Table, to_markdown
from clipfusionvad.report.table import AP_NOTE
from clipfusionvad.tools.sweep.cost import COLUMNS, NOTE, Cost
from clipfusionvad.tools.sweep.plan import Published
from clipfusionvad.tools.tables import HEADLINE
from clipfusionvad.tools.tables.compare import Difference, Resampler, explain, explain_stars


class Compared(NamedTuple):
    """The differences of cells by name and metric, and a line for each cell that cannot be compared."""

    differences: Mapping[str, Mapping[str, Difference]]
    refused: Sequence[str]


NOT_COMPARED = Compared({}, [])


def sweep_text(
    table: pd.DataFrame,
    reference: str,
    published: Mapping[str, Published] | None = None,
    notes: Sequence[str] = (),
    compared: Compared = NOT_COMPARED,
    metrics: Sequence[str] = HEADLINE,
    costs: Mapping[str, Cost] | None = None,
) -> str:
    """Render a Markdown table: mean ± standard deviation (n - 1) over seeds in percent, and in brackets the mean
    difference from ``reference`` over the seeds of both, starred if it is clear. ``table`` is that of ``results.csv``.

    Figures that were ``published`` have their own columns, with the sources and then the ``notes`` below. So have
    ``costs``, if there are any.
    """
    published, costs = published or {}, costs or {}
    done = table[table["state"] == "done"].set_index("seed")
    printed = {metric for paper in published.values() for metric in paper.figures}
    columns = [name for name in metrics if name in printed or (name in done and done[name].notna().any())]
    columns += sorted(printed.difference(metrics))
    # Detection mAP is in percent already.
    measured = done.reindex(columns=columns).astype(float) * [1 if name.startswith("map") else 100 for name in columns]
    base, rows = measured[done["cell"] == reference], []
    for cell, count in table.groupby("cell", sort=False).size().items():
        own = measured[done["cell"] == cell]
        row = [cell, f"{len(own)} of {count}"]
        for metric in columns:
            one = compared.differences.get(cell, {}).get(metric)
            row.append(_entry(own[metric], None if cell == reference else base[metric], bool(one and one.clear)))
            if metric in printed:
                figure = published[cell].figures.get(metric) if cell in published else None
                row.append("" if figure is None else f"{figure:.2f}")
        rows.append([*row, *(costs[cell].columns() if cell in costs else [""] * len(COLUMNS) if costs else [])])
    titles = [title for metric in columns for title in (metric, *[f"{metric}, paper"] * (metric in printed))]
    sources = dict.fromkeys(f"paper: {one.source} ({find_dataset(one.dataset).title})" for one in published.values())
    failed = table[table["state"] == "failed"]
    below = [
        AP_NOTE,
        *sources,
        *notes,
        *([NOTE] if costs else []),
        *(f"failed: {row.cell}, seed {row.seed}: {row.error}" for row in failed.itertuples()),
    ]
    return to_markdown(Table(["cell", "seeds", *titles, *(COLUMNS if costs else [])], rows, note="\n".join(below)))


def _entry(own: pd.Series, base: pd.Series | None, clear: bool) -> str:
    values = own.dropna()
    if values.empty:
        return "-"
    text = f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")
    mean = float("nan") if base is None else (own - base).reindex(own.index.intersection(base.index)).mean(skipna=False)
    return text if np.isnan(mean) else f"{text} ({mean:+.2f}{'*' if clear else ''})"


def compare_cells(reference: str, runs: Mapping[str, Sequence[Path]], metrics: Sequence[str] = HEADLINE) -> Compared:
    """Compare every cell with ``reference``; ``runs`` are the folders of each cell's finished runs."""
    resampler, found, refused = Resampler(metrics=metrics), dict[str, dict[str, Difference]](), list[str]()
    for cell, folders in runs.items():
        if cell == reference:
            continue
        try:
            found[cell] = {one.metric: one for one in resampler.compare(runs[reference], folders)}
        except UserError as error:
            refused.append(f"{cell} is not compared: {error}")
    return Compared(found, refused)


def differences_text(reference: str, compared: Compared, metrics: Sequence[str] = HEADLINE) -> str:
    """Render a Markdown table: how much each cell differs from ``reference``, with intervals over test videos."""
    found, refused = compared
    metrics = [metric for metric in metrics if any(metric in own for own in found.values())]
    if not metrics:
        return "".join(f"{line}\n" for line in refused)
    rows = [[cell, *(_difference(own[key]) if key in own else "-" for key in metrics)] for cell, own in found.items()]
    everything = [one for own in found.values() for one in own.values()]
    below = [*_conclusions(found, metrics), "", explain(everything), *refused]
    table = to_markdown(Table(["cell", *metrics], rows, note="\n".join(below)))
    return f"Difference from {reference}, in points:\n\n{table}"


def _difference(one: Difference) -> str:
    return f"{one.difference:+.2f} {one.over_videos}{' *' if one.clear else ''}"


def _conclusions(found: Mapping[str, Mapping[str, Difference]], metrics: Sequence[str]) -> list[str]:
    """Return a line for each metric with the cells that differ clearly, the largest difference first."""
    lines = [f"{explain_stars({cell: list(own.values()) for cell, own in found.items()})}:"]
    for metric in metrics:
        clear = [(cell, own[metric]) for cell, own in found.items() if metric in own and own[metric].clear]
        clear.sort(key=lambda pair: -abs(pair[1].difference))
        text = ", ".join(f"{cell} {one.difference:+.2f}" for cell, one in clear)
        lines.append(f"- {metric}: {text or 'no cell differs clearly'}")
    return lines
