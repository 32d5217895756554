"""Rows and differences laid out as tables."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from clipfusionvad.report.formatting import Table
from clipfusionvad.tools.tables.compare import Difference, explain
from clipfusionvad.tools.tables.rows import OVER_SEEDS, OVER_VIDEOS, TITLES, MetricRow

SHORT = {"auc1": "AUC", "ap1": "AP", "ano_auc1": "Ano-AUC", "auc2": "AUC fine", "ap2": "AP fine"}
SHORT |= {"ano_auc2": "Ano-AUC fine", "mauc": "mAUC", "mean_ap": "mAP frames", "map_average": "mAP"}


def details(rows: Sequence[MetricRow]) -> list[Table]:
    """Return a table for each setting: its metrics by weights, with intervals and the paper's figure."""
    kinds = list(dict.fromkeys(row.weights for row in rows))
    tables = [
        _details_of([row for row in rows if (row.cell, row.data) == place], kinds)
        for place in dict.fromkeys((row.cell, row.data) for row in rows)
    ]
    return [*tables[:-1], replace(tables[-1], note=_explain_intervals(rows))]


def _details_of(rows: Sequence[MetricRow], kinds: Sequence[str]) -> Table:
    by_place = {(row.metric, row.weights): row for row in rows}
    header = ["in percent"]
    for kind in kinds:
        over = dict.fromkeys(row.interval for row in rows if row.weights == kind and row.interval)
        header += [f"{kind} (n)", " ".join(["95 %", *over])]
    lines = []
    for metric in dict.fromkeys(row.metric for row in rows):
        own = [by_place.get((metric, kind)) for kind in kinds]
        line = [TITLES.get(metric, metric)]
        for row in own:
            line.append(row.measured if row else "-")
            line.append("-" if row is None or row.low is None else f"[{row.low:.2f}, {row.high:.2f}]")
        first = next(row for row in own if row)
        lines.append([*line, "-" if first.paper is None else f"{first.paper:.2f} {first.verdict}"])
    header.append("paper")
    columns = len(header) - (not _has_paper(rows))
    title = f"{rows[0].method} on {rows[0].data}: {rows[0].cell}"
    return Table(header[:columns], [line[:columns] for line in lines], title)


def overview(rows: Sequence[MetricRow], by: str) -> Table:
    """Return methods down and datasets across (by "method") or the reverse (by "dataset"), each with its metrics."""

    def who(row: MetricRow) -> str:
        """The method, with the setting where the method has several on this data."""
        several = {other.cell for other in rows if (other.method, other.data) == (row.method, row.data)}
        return f"{row.method}: {row.cell}" if len(several) > 1 else row.method

    def data(row: MetricRow) -> str:
        return row.data

    down, group = (data, who) if by == "dataset" else (who, data)
    note = "Brackets: the paper's figure, and whether it lies in the 95 % interval." if _has_paper(rows) else ""
    return _pivot(rows, by, down, lambda row: f"{group(row)} {SHORT.get(row.metric, row.metric)}", note)


def ablation(rows: Sequence[MetricRow]) -> Table:
    """Return settings down, metrics across."""
    return _pivot(rows, "setting", lambda row: row.cell, lambda row: SHORT.get(row.metric, row.metric))


def _pivot(
    rows: Sequence[MetricRow],
    corner: str,
    down: Callable[[MetricRow], str],
    across: Callable[[MetricRow], str],
    note: str = "",
) -> Table:
    entries = {(down(row), across(row)): row for row in rows}
    columns = list(dict.fromkeys(map(across, rows)))
    lines = [
        [line, *(_entry(entries.get((line, column))) for column in columns)] for line in dict.fromkeys(map(down, rows))
    ]
    title = f"Mean ± standard deviation over (n) seeds, in percent; {rows[0].weights} weights"
    return Table([corner, *columns], lines, title, note=note)


def differences(reference: str, found: Sequence[tuple[str, Difference]]) -> list[Table]:
    """Return a table for each metric: how much settings differ from the reference, over test videos and over seeds."""
    header = ("setting", "pairs", "difference", "videos: 95 %", "p", "seeds: 95 %", "p")
    tables = []
    for metric in dict.fromkeys(one.metric for _, one in found):
        rows = [
            (cell, str(one.seeds), f"{one.difference:+.2f}", one.over_videos, f"{one.p:.4f}", *one.over_seeds)
            for cell, one in found
            if one.metric == metric
        ]
        title = f"{TITLES.get(metric, metric).strip()}: difference from {reference}, in percent points"
        tables.append(Table(header, rows, title))
    return [*tables[:-1], replace(tables[-1], note=explain([one for _, one in found]))] if tables else []


def _entry(row: MetricRow | None) -> str:
    if row is None:
        return "-"
    return row.measured if row.paper is None else f"{row.measured} [{row.paper:.2f} {row.verdict}]"


def _has_paper(rows: Iterable[MetricRow]) -> bool:
    return any(row.paper is not None for row in rows)


def _explain_intervals(rows: Sequence[MetricRow]) -> str:
    kinds = {row.interval for row in rows}
    parts = {
        OVER_SEEDS: "seeds: of the mean over seeds, by Student's t; it says nothing about other test videos",
        OVER_VIDEOS: "videos: of this one run over test videos, by bootstrap; it says nothing about other seeds",
        None: "-: a single run's weights whose scores are not stored, or a metric that is not resampled",
    }
    text = "Intervals. " + ". ".join(text for kind, text in parts.items() if kind in kinds) + "."
    return text + (" The paper's figure is inside or outside the first interval." if _has_paper(rows) else "")
