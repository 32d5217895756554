"""From settings to tables: metrics over seeds, intervals, published figures, differences from a reference."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from clipfusionvad.io.errors import UserError, nearest, warn
from clipfusionvad.report.formatting import Table
from clipfusionvad.report.table import AP_NOTE, BRANCHES, IOUS, RANKING, VARIANTS, published_figures
from clipfusionvad.tools.tables import BEST, FULL, HEADLINE, LAST, OVERVIEW, TableOptions
from clipfusionvad.tools.tables.collect import Setting
from clipfusionvad.tools.tables.compare import Difference, Resampler, explain, explain_stars, student_t

#: The names of the metrics, in the order of tables.
TITLES = {f"{key}{number}": f"{name}, {branch}" for number, branch in BRANCHES.items() for key, name in RANKING.items()}
TITLES |= {"mauc": "mAUC, class against rest", "mean_ap": "mAP of frames", "map_average": "detection mAP"}
TITLES |= {f"{key}@average": f"  {title.removeprefix('corrected: ')}" for key, title in VARIANTS.items()}
SHORT = {f"{key}{number}": name + end for number, end in (("1", ""), ("2", " fine")) for key, name in RANKING.items()}
SHORT |= {"mauc": "mAUC", "mean_ap": "mAP frames", "map_average": "mAP"} | {f"map@{iou}": f"mAP@{iou}" for iou in IOUS}
#: What a caption says of metrics, by their names without the branch.
DEFINITIONS = dict(zip(("ap", "ap_trapezoid"), AP_NOTE.split("; "), strict=True))
DEFINITIONS |= {"mauc": "mAUC: mean over classes of the AUC of a class's frames against all others"}
DEFINITIONS |= {"mean_ap": "mAP frames: mean over classes of the AP of a class's frames"}
DEFINITIONS |= {"map_average": "mAP: detection mAP, mean over IoU 0.1 to 0.5"}
_WHOLE_VIDEOS = "frames have no truth: these numbers rank whole videos, so they have no interval over test videos"

#: How a setting differs from a reference in one metric: the names of both, and the difference.
Compared = tuple[str, str, Difference]


@dataclass(frozen=True)
class MetricRow:
    """A metric of a setting (``cell``) with some ``weights``, in percent: ``mean`` and sample ``std`` over seeds.

    ``low`` and ``high`` bound a 95 % interval of the mean over "seeds" (Student's t) or of one run over test "videos"
    (bootstrap), as ``interval`` says. ``inside``: whether the ``paper``'s figure lies in it. None means unknown.
    ``note``: a remark on the setting, for example why it has no interval.
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
    #: The standard deviations, in snippets, with which the seeds' scores were smoothed over time; empty without.
    smooth: str = ""
    note: str = ""

    @property
    def measured(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}") + f" ({self.n})"

    @property
    def judged(self) -> str:
        """The paper's figure and, where there is an interval, whether it lies in it; empty without a figure."""
        verdict = "" if self.inside is None else " inside" if self.inside else " outside"
        return "" if self.paper is None else f"{self.paper:.2f}{verdict}"


def build_tables(settings: Sequence[Setting], options: TableOptions) -> tuple[list[Table], str]:
    """Return the tables of settings, and all their rows as CSV.

    Raises ``UserError`` for an unknown metric or reference, and where a given reference cannot be compared with.
    """
    counts = Counter((setting.method, setting.data) for setting in settings)
    by = options.rows or ("cell" if len(counts) < len(settings) else "method")
    references = _references(settings, options.reference, by)
    single = any(len(setting.results) == 1 for setting in settings)
    in_latex = options.format == "latex"
    metrics = options.metrics or (OVERVIEW if in_latex else tuple(TITLES) if single else HEADLINE)
    resampler = Resampler(options.bootstrap, options.bootstrap_seed, metrics) if options.bootstrap else None
    # The paper's figure does not belong to the changed settings of an ablation.
    changed = [one.name for one in settings if counts[one.method, one.data] > 1 and references.get(one.data) is not one]
    weights = (BEST, LAST) if options.weights == "both" else (options.weights,)
    if not any(kind in run.metrics for one in settings for run in one.results for kind in weights):
        raise UserError(f"no run has {options.weights} weights; a test has one model: leave --weights out")
    bar = tqdm(settings, "runs", disable=None, leave=False)
    rows = metric_rows(bar, weights, metrics if in_latex else options.metrics or tuple(TITLES), resampler, changed)
    if missing := set(options.metrics or ()) - {row.metric for row in rows}:
        known = sorted({name for setting in settings for run in setting.results for name in run.metrics.get(BEST, {})})
        word = min(missing)
        raise UserError(f"no run has a metric {word!r}{nearest(word, known)}; there are: {', '.join(known)}")
    compared = _compare(settings, references, resampler, bool(options.reference)) if resampler else []
    have_figures = {(figure.method, figure.dataset) for figure in published_figures()}
    reasons: dict[str, list[str]] = {}
    for one in settings:
        if one.name not in changed and (one.method, one.dataset) in have_figures and one.no_comparison:
            reasons.setdefault(one.no_comparison, []).append(one.name)
    hidden = [f"The paper's figures are not shown for {', '.join(cells)}: {why}." for why, cells in reasons.items()]
    tables = [_paper_table(rows, by, compared)] if in_latex else []
    return tables or _lay_out(rows, by, compared, options.metrics, hidden), _csv(rows, compared)


def _references(settings: Sequence[Setting], given: str | None, by: str) -> dict[str, Setting]:
    """Return, by their data, the settings that others are compared with."""
    if given:
        for one in settings:
            folders = {one.folder.resolve(), *(result.folder.resolve() for result in one.results)}
            if given == one.name or Path(given).resolve() in folders:
                return {one.data: one}
        names = [setting.name for setting in settings]
        raise UserError(f"--reference {given} is not one of the runs{nearest(given, names)}: {', '.join(names)}")
    # The first of each data, unless a sweep's unchanged cell is there.
    ordered = sorted(settings, key=lambda setting: setting.folder.name != FULL)
    return {setting.data: setting for setting in reversed(ordered)} if by == "cell" else {}


def metric_rows(
    settings: Iterable[Setting], weights: Sequence[str], metrics: Sequence[str],
    resampler: Resampler | None = None, changed: Sequence[str] = (),
) -> list[MetricRow]:  # fmt: skip
    """Return the rows of all settings; a metric that one of a setting's seeds lacks has no row.

    ``resampler`` gives the interval of a run's best weights. ``changed`` settings get no published figure.
    """
    figures = {(one.method, one.dataset, one.metric): one for one in reversed(published_figures())}
    rows = []
    for setting in settings:
        first = setting.results[0]
        # Metrics of frames include this one.
        whole = "ano_auc1" not in next(iter(first.metrics.values()))
        unpublished, note = setting.name in changed, _WHOLE_VIDEOS if whole else ""
        shared = (setting.name, setting.method, setting.dataset, setting.data, setting.protocol)
        for metric in metrics:
            # Papers report detection mAP by the released procedure.
            wanted = "map_average" if metric == "map_released@average" else metric
            hidden = unpublished or (metric == "map_average" and setting.protocol != "paper")
            figure = None if hidden else figures.get((setting.method, setting.dataset, wanted))
            figure = None if figure and setting.no_comparison else figure
            paper, source = (figure.percent, figure.source) if figure else (None, None)
            for kind in weights:
                found = [result.metrics.get(kind, {}).get(metric) for result in setting.results]
                values = [(1 if metric.startswith("map") else 100) * value for value in found if value is not None]
                if len(values) < len(found):
                    continue
                several = student_t(values)
                bounds = several[:2] if several else None
                if resampler and not (several or note) and kind == BEST and first.scores:
                    try:
                        bounds = resampler.interval([first.folder], metric)
                    except UserError as error:
                        note = f"no interval: {error}"
                low, high = bounds or (None, None)
                inside = None if paper is None or bounds is None else bounds[0] <= paper <= bounds[1]
                std = float(np.std(values, ddof=1)) if several else None
                interval = ("seeds" if several else "videos") if bounds else None
                center = (kind, metric, float(np.mean(values)), std, len(values))
                sigmas = sorted({result.sigma for result in setting.results} - {0})
                smooth = ", ".join(f"{sigma:g}" for sigma in sigmas)
                rows.append(MetricRow(*shared, *center, low, high, interval, paper, source, inside, smooth, note))
    return rows


def _compare(
    settings: Sequence[Setting], references: dict[str, Setting], resampler: Resampler, asked: bool
) -> list[Compared]:
    """Compare each setting with its reference.

    A setting that cannot be compared is an error where the user ``asked`` for the reference, else a warning.
    """
    others = [one for one in settings if one.data in references and one is not references[one.data]]
    compared: list[Compared] = []
    for setting in tqdm(others, "paired bootstrap", disable=None, leave=False):
        reference = references[setting.data]
        try:
            found = resampler.compare(*([run.folder for run in one.results] for one in (reference, setting)))
        except UserError as error:
            if asked:
                raise
            warn(f"{setting.name} is not compared with {reference.name}: {error}")
        else:
            compared += [(setting.name, reference.name, one) for one in found]
    return compared


def _csv(rows: Sequence[MetricRow], compared: Sequence[Compared]) -> str:
    """Return a line for each setting, metric and weights, with differences beside the best weights, whose they are."""
    names = ("difference", "low", "high", "p", "seeds", "seed_low", "seed_high", "seed_p")
    keys = ["cell", "metric", "weights"]
    lines = [
        (setting, one.metric, BEST, reference, *(getattr(one, name) for name in names))
        for setting, reference, one in compared
    ]
    gaps = pd.DataFrame(lines, columns=[*keys, "reference", *(f"difference_{name}" for name in names)])
    gaps = gaps.astype({"difference_seeds": "Int64"})
    text: str = pd.DataFrame(rows).merge(gaps, how="left", on=keys).to_csv(index=False, lineterminator="\n")
    return text


def _lay_out(
    rows: list[MetricRow], by: str, compared: list[Compared], metrics: Sequence[str] | None, hidden: Sequence[str]
) -> list[Table]:
    wanted = metrics or (HEADLINE if by == "cell" else OVERVIEW)
    shown = [row for row in rows if row.metric in wanted or (row.paper is not None and "@" not in row.metric)]
    kinds = [[row for row in shown if row.weights == kind] for kind in dict.fromkeys(row.weights for row in shown)]
    tables = [_pivot(kind, by) for kind in (kinds if by == "cell" else kinds[:1])]
    if by != "cell":
        tables += _details(rows)
    notes = [tables[0].note, *hidden, f"{AP_NOTE}.", *_remarks(shown)]
    tables[0] = replace(tables[0], note="\n".join(filter(None, notes)))
    for reference in dict.fromkeys(reference for _, reference, _ in compared):
        found = [(one[0], one[2]) for one in compared if one[1] == reference and one[2].metric in (metrics or HEADLINE)]
        tables += _differences(reference, found)
    return tables


def _remarks(rows: Sequence[MetricRow]) -> list[str]:
    """Return a line on smoothed scores, and one for each setting without an interval."""
    smoothed = {row.cell: row.smooth for row in rows if row.smooth}
    smoothing = "; ".join(f"{cell} {sigmas}" for cell, sigmas in smoothed.items())
    lines = [f"Scores smoothed over time, standard deviation in snippets: {smoothing}."] if smoothed else []
    return lines + list(dict.fromkeys(f"{row.cell}: {row.note}." for row in rows if row.note))


def _details(rows: Sequence[MetricRow]) -> list[Table]:
    """Return a table for each setting: its metrics by weights, with intervals and the paper's figure."""
    kinds = dict.fromkeys(row.weights for row in rows)
    tables = []
    for place in dict.fromkeys((row.cell, row.data) for row in rows):
        own = {(row.metric, row.weights): row for row in rows if (row.cell, row.data) == place}
        header, lines = ["in percent"], []
        for kind in kinds:
            over = dict.fromkeys(row.interval for row in own.values() if row.weights == kind and row.interval)
            header += [f"{kind} (n)", " ".join(["95 %", *over])]
        for metric in dict.fromkeys(metric for metric, _ in own):
            line = [TITLES.get(metric, metric)]
            for row in (own.get((metric, kind)) for kind in kinds):
                line.append(row.measured if row else "-")
                line.append("-" if row is None or row.low is None else f"[{row.low:.2f}, {row.high:.2f}]")
            first = next(row for row in own.values() if row.metric == metric)
            lines.append([*line, first.judged or "-"])
        columns = len(header) + _has_paper(own.values())
        title = f"{first.method} on {first.data}: {first.cell}"
        tables.append(Table([*header, "paper"][:columns], [line[:columns] for line in lines], title))
    parts = {
        "seeds": "seeds: of the mean over seeds, by Student's t; it says nothing about other test videos",
        "videos": "videos: of this one run over test videos, by bootstrap; it says nothing about other seeds",
        None: "-: no interval, because the scores of these weights are not stored or the metric is not resampled",
    }
    there = {row.interval for row in rows}
    note = "Intervals. " + ". ".join(text for kind, text in parts.items() if kind in there) + "."
    note += " The paper's figure is inside or outside the first interval." if _has_paper(rows) else ""
    return [*tables[:-1], replace(tables[-1], note=note)]


def _pivot(rows: Sequence[MetricRow], by: str) -> Table:
    """Return the table of ``_grid`` with the means, and the paper's figures beside them."""
    header, lines = _grid(rows, by, lambda row: row.measured + (row.judged and f" [paper {row.judged}]"))
    title = f"Mean ± standard deviation over (n) seeds, in percent; {rows[0].weights} weights"
    note = "Brackets: the paper's figure, and whether it is inside or outside the 95 % interval, where there is one."
    return Table(header, lines, title, note=note if _has_paper(rows) else "")


def _grid(rows: Sequence[MetricRow], by: str, show: Callable[[MetricRow], str]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines: settings down and metrics across (by "cell"), or methods down and datasets with their
    metrics across (by "method"), or the reverse (by "dataset").
    """
    several = Counter((method, data) for method, data, _ in {(row.method, row.data, row.cell) for row in rows})
    one_data = len({row.data for row in rows}) == 1
    entries = {}
    for row in rows:
        metric = SHORT.get(row.metric, row.metric)
        # With the setting where the method has several on this data.
        who = f"{row.method}: {row.cell}" if several[row.method, row.data] > 1 else row.method
        down, group = (row.data, who) if by == "dataset" else (who, row.data)
        cell = row.cell if one_data else f"{row.cell} ({row.data})"
        entries[(cell, metric) if by == "cell" else (down, f"{group}\n{metric}")] = show(row)
    names, columns = (dict.fromkeys(keys) for keys in zip(*entries, strict=True))
    lines = [[name, *(entries.get((name, column), "-") for column in columns)] for name in names]
    return ["setting" if by == "cell" else by, *columns], lines


def _paper_table(rows: Sequence[MetricRow], by: str, compared: Sequence[Compared]) -> Table:
    """Return the one table of a paper: means with intervals below them, and stars; its note explains all of it."""
    references = dict.fromkeys(name for _, name, _ in compared)
    rows = [row for row in rows if row.weights == rows[0].weights]
    rows.sort(key=lambda row: row.cell not in references)
    metrics = dict.fromkeys(row.metric for row in rows)
    found: dict[str, list[Difference]] = {}
    for name, _, one in compared:
        if one.metric in metrics:
            found.setdefault(name, []).append(one)
    clear = {(name, one.metric) for name, own in found.items() for one in own if one.clear}
    seeds = sorted({row.n for row in rows})

    def show(row: MetricRow) -> str:
        value = row.measured if len(seeds) > 1 else row.measured.rpartition(" (")[0]
        bounds = "" if row.low is None else f"\n[{row.low:.2f}, {row.high:.2f}]".replace("-", "−")
        return value + "*" * ((row.cell, row.metric) in clear) + bounds

    data, protocols = (", ".join(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("data", "protocol"))
    over = {"seeds": "of the mean over seeds, by Student's t", "videos": "of one run over test videos, by bootstrap"}
    kinds = [text for kind, text in over.items() if kind in {row.interval for row in rows}]
    count = f"{seeds[0]} seeds" if len(seeds) == 1 else "(n) seeds"
    count = "One seed" if seeds == [1] else f"Mean ± standard deviation over {count}"
    shown = {name.rstrip("12") for name in metrics}
    notes = [
        f"{count}; {rows[0].weights} weights, protocol {protocols}",
        f"Brackets: 95 % interval {'; or '.join(kinds)}" if kinds else "",
        f"Compared with {', '.join(references)}: {explain_stars(found)}" if found else "",
        *(text for name, text in DEFINITIONS.items() if name in shown),
        *(line.rstrip(".") for line in _remarks(rows)),
    ]
    return Table(*_grid(rows, by, show), f"{data}, in percent", note=". ".join(filter(None, notes)) + ".")


def _differences(reference: str, found: Sequence[tuple[str, Difference]]) -> list[Table]:
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


def _has_paper(rows: Iterable[MetricRow]) -> bool:
    return any(row.paper is not None for row in rows)
