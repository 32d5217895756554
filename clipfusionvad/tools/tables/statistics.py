"""What runs have come to: a row for each setting and metric, and the tables that are laid out from such rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from clipfusionvad.report.table import BRANCHES, RANKING, VARIANTS, Figure, published_figures
from clipfusionvad.tools.tables.collect import BEST, Cell
from clipfusionvad.tools.tables.compare import Difference, mean_interval
from clipfusionvad.tools.tables.grid import Grid

OVER_SEEDS, OVER_VIDEOS = "seeds", "videos"
#: How the metrics are called, in the order in which tables have them.
TITLES = {f"{key}{number}": f"{name}, {branch}" for number, branch in BRANCHES.items() for key, name in RANKING.items()}
TITLES |= {"mauc": "mAUC, class against rest", "mean_ap": "mAP of frames", "map_average": "detection mAP"}
TITLES |= {f"{key}@average": f"  {title.removeprefix('corrected: ')}" for key, title in VARIANTS.items()}
SHORT = {"auc1": "AUC", "ap1": "AP", "ano_auc1": "Ano-AUC", "auc2": "AUC fine", "ap2": "AP fine"}
SHORT |= {"ano_auc2": "Ano-AUC fine", "mauc": "mAUC", "mean_ap": "mAP frames", "map_average": "mAP"}
#: What an overview shows of a run beside what was published, and what an ablation compares.
OVERVIEW = ("auc1", "ap1", "map_average")
HEADLINE = ("auc1", "ap1", "auc2", "ap2", "mauc", "mean_ap", "map_average")


@dataclass(frozen=True)
class Row:
    """A metric of a setting with the weights ``weights``, in percent: ``mean`` over ``n`` seeds, ``std`` of the sample.

    ``low`` and ``high`` bound a 95 % interval: ``interval`` says whether of the mean over seeds (Student's t) or, of
    a single run, over the test videos (bootstrap). ``inside`` says whether the ``paper``'s figure lies in it. None is
    what is not known.
    """

    cell: str
    method: str
    dataset: str
    data: str
    protocol: str
    weights: str
    metric: str
    mean: float
    std: float | None
    n: int
    low: float | None
    high: float | None
    interval: str | None
    paper: float | None
    source: str | None
    inside: bool | None


VideoInterval = Callable[[Cell, str], tuple[float, float] | None]


def tabulate(
    cells: Iterable[Cell],
    weights: Sequence[str],
    metrics: Sequence[str],
    over_videos: VideoInterval,
    changed: Sequence[str] = (),
) -> list[Row]:
    """The rows of all settings; a metric that not all seeds of a setting have has none.

    ``over_videos`` gives the interval of a single run's best weights. No published figure stands beside made-up data
    and the settings that ``changed`` names.
    """
    figures = published_figures()
    rows = []
    for cell in cells:
        for metric in metrics:
            figure = None if cell.demo or cell.name in changed else _figure(figures, cell, metric)
            for kind in weights:
                found = [result.metrics.get(kind, {}).get(metric) for result in cell.results]
                values = [_scale(metric) * value for value in found if value is not None]
                if len(values) == len(found):
                    rows.append(_row(cell, metric, kind, values, figure, over_videos))
    return rows


def _row(
    cell: Cell, metric: str, weights: str, values: list[float], figure: Figure | None, over_videos: VideoInterval
) -> Row:
    several = len(values) > 1
    bounds = mean_interval(values) if several else over_videos(cell, metric) if weights == BEST else None
    low, high = bounds or (None, None)
    paper = figure.percent if figure else None
    return Row(
        cell.name, cell.method, cell.dataset, cell.data, cell.protocol, weights, metric,
        mean=float(np.mean(values)),
        std=float(np.std(values, ddof=1)) if several else None,
        n=len(values),
        low=low,
        high=high,
        interval=(OVER_SEEDS if several else OVER_VIDEOS) if bounds else None,
        paper=paper,
        source=figure.source if figure else None,
        inside=None if paper is None or bounds is None else bounds[0] <= paper <= bounds[1],
    )  # fmt: skip


def _figure(figures: Sequence[Figure], cell: Cell, metric: str) -> Figure | None:
    """What was published of a metric: detection mAP by the released procedure, whatever ``map_average`` is here."""
    if metric == "map_average" and cell.protocol != "paper":
        return None
    wanted = "map_average" if metric == "map_released@average" else metric
    key = (cell.method, cell.dataset, wanted)
    return next((figure for figure in figures if (figure.method, figure.dataset, figure.metric) == key), None)


def _scale(metric: str) -> float:
    return 1.0 if metric.startswith("map") else 100.0


def title(metric: str) -> str:
    """How a metric is called; those of one IoU go by their key."""
    return TITLES.get(metric, metric)


def details(rows: Sequence[Row]) -> list[Grid]:
    """For each setting its metrics, of the best and the last weights, with intervals and the paper's figure."""
    kinds = list(dict.fromkeys(row.weights for row in rows))
    grids = []
    for cell, data in dict.fromkeys((row.cell, row.data) for row in rows):
        own = {(row.metric, row.weights): row for row in rows if row.cell == cell}
        paper = ["paper"] if _has_paper(own.values()) else []
        header = ["in percent"]
        for kind in kinds:
            over = {row.interval for row in own.values() if row.weights == kind and row.interval}
            header += [f"{kind} (n)", " ".join(["95 %", *over])]
        lines = tuple(
            _detail([own.get((metric, kind)) for kind in kinds], bool(paper))
            for metric in dict.fromkeys(metric for metric, _ in own)
        )
        method = next(iter(own.values())).method
        heading = f"{method} on {data}: {cell}"
        grids.append(Grid(heading, (*header, *paper), lines))
    return [*grids[:-1], replace(grids[-1], note=_meaning(rows))]


def _detail(rows: Sequence[Row | None], with_paper: bool) -> tuple[str, ...]:
    first = next(row for row in rows if row)
    cells = [title(first.metric)]
    for row in rows:
        cells += ["-", "-"] if row is None else [measured(row), _bounds(row)]
    paper = ["-" if first.paper is None else f"{first.paper:.2f} {_verdict(first)}"] if with_paper else []
    return (*cells, *paper)


def overview(rows: Sequence[Row], by: str) -> Grid:
    """Methods (or settings) down and datasets across, or the other way round; each with its metrics."""
    across = [(row.data if by != "dataset" else _who(row, rows), row.metric) for row in rows]
    columns = list(dict.fromkeys(across))
    lines = list(dict.fromkeys(_who(row, rows) if by != "dataset" else row.data for row in rows))
    entries = {
        (_who(row, rows) if by != "dataset" else row.data, place): row for row, place in zip(rows, across, strict=True)
    }
    return Grid(
        "Mean ± standard deviation over (n) seeds, in percent" + f"; {rows[0].weights} weights",
        ("dataset" if by == "dataset" else "method", *(f"{group} {SHORT.get(m, m)}" for group, m in columns)),
        tuple((line, *(_entry(entries.get((line, column))) for column in columns)) for line in lines),
        note="Brackets: the paper's figure, and whether it lies in the 95 % interval." if _has_paper(rows) else "",
    )


def ablation(rows: Sequence[Row]) -> Grid:
    """Settings down, metrics across."""
    metrics, by_place = list(dict.fromkeys(row.metric for row in rows)), {(row.cell, row.metric): row for row in rows}
    return Grid(
        f"Mean ± standard deviation over (n) seeds, in percent; {rows[0].weights} weights",
        ("setting", *(SHORT.get(metric, metric) for metric in metrics)),
        tuple(
            (cell, *(_entry(by_place.get((cell, metric))) for metric in metrics))
            for cell in dict.fromkeys(row.cell for row in rows)
        ),
    )


def differences(reference: str, found: Sequence[tuple[str, Difference]], note: str) -> list[Grid]:
    """For each metric how far settings are from the reference: over the test videos, and over the seeds."""
    metrics = list(dict.fromkeys(one.metric for _, one in found))
    grids = []
    for metric in metrics:
        rows = tuple(_difference(cell, one) for cell, one in found if one.metric == metric)
        header = ("setting", "pairs", "difference", "videos: 95 %", "p", "seeds: 95 %", "p")
        last = metric == metrics[-1]
        grids.append(
            Grid(
                f"{title(metric).strip()}: difference from {reference}, in percent points",
                header,
                rows,
                1,
                note if last else "",
            )
        )
    return grids


def _difference(cell: str, one: Difference) -> tuple[str, ...]:
    seeds = (
        ("-", "-") if one.seed_low is None else (f"[{one.seed_low:+.2f}, {one.seed_high:+.2f}]", f"{one.seed_p:.3f}")
    )
    return cell, str(one.seeds), f"{one.difference:+.2f}", f"[{one.low:+.2f}, {one.high:+.2f}]", f"{one.p:.4f}", *seeds


def measured(row: Row) -> str:
    return f"{row.mean:.2f}" + ("" if row.std is None else f" ± {row.std:.2f}") + f" ({row.n})"


def _who(row: Row, rows: Sequence[Row]) -> str:
    """The method, with the setting where there are several of it on this data."""
    several = {other.cell for other in rows if (other.method, other.data) == (row.method, row.data)}
    return f"{row.method}: {row.cell}" if len(several) > 1 else row.method


def _entry(row: Row | None) -> str:
    if row is None:
        return "-"
    return measured(row) if row.paper is None else f"{measured(row)} [{row.paper:.2f} {_verdict(row)}]".rstrip()


def _verdict(row: Row) -> str:
    if row.paper is None:
        return ""
    return "not judged" if row.inside is None else "inside" if row.inside else "outside"


def _bounds(row: Row) -> str:
    return "-" if row.low is None else f"[{row.low:.2f}, {row.high:.2f}]"


def _has_paper(rows: Iterable[Row]) -> bool:
    return any(row.paper is not None for row in rows)


def _meaning(rows: Sequence[Row]) -> str:
    """What the intervals in these rows are of."""
    kinds = {row.interval for row in rows}
    parts = {
        OVER_SEEDS: "seeds: of the mean over seeds, by Student's t; it says nothing of other test videos",
        OVER_VIDEOS: "videos: of this one run over test videos, by bootstrap; it says nothing of other seeds",
        None: "-: a single run's weights whose scores are not kept, or a metric that is not resampled",
    }
    text = "Intervals. " + ". ".join(text for kind, text in parts.items() if kind in kinds) + "."
    return text + (" The paper's figure lies inside or outside of the first column's." if _has_paper(rows) else "")
