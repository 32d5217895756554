"""From settings to the tables that the options ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from clipfusionvad.io.errors import UserError, nearest, warn
from clipfusionvad.report.formatting import Table
from clipfusionvad.tools.tables import BEST, FULL, HEADLINE, LAST, OVERVIEW, TableOptions
from clipfusionvad.tools.tables.collect import Setting
from clipfusionvad.tools.tables.compare import Difference, Resampler
from clipfusionvad.tools.tables.layout import ablation, details, differences, overview
from clipfusionvad.tools.tables.rows import TITLES, MetricRow, metric_rows


@dataclass(frozen=True)
class Compared:
    """How a setting differs from a reference in one metric; both by name."""

    setting: str
    reference: str
    difference: Difference


def build_tables(settings: Sequence[Setting], options: TableOptions) -> tuple[list[Table], str]:
    """Return the tables of settings, and all their rows as CSV.

    Raises ``UserError`` for an unknown metric or reference, and where a given reference cannot be compared with.
    """
    by = options.rows or ("cell" if _is_ablation(settings) else "method")
    references = _references(settings, options.reference, by)
    single = any(len(setting.results) == 1 for setting in settings)
    metrics = options.metrics or (tuple(TITLES) if single else HEADLINE)
    resampler = Resampler(options.bootstrap, options.bootstrap_seed, metrics)
    rows = _rows(settings, references, options, resampler)
    compared = _compare(settings, references, resampler, bool(options.reference)) if options.bootstrap else []
    return _lay_out(rows, by, compared, options.metrics), _csv(rows, compared)


def _is_ablation(settings: Sequence[Setting]) -> bool:
    return len({(setting.method, setting.data) for setting in settings}) < len(settings)


def _references(settings: Sequence[Setting], given: str | None, by: str) -> dict[str, Setting]:
    """Return, by their data, the settings that others are compared with."""
    if given:
        folder = Path(given).resolve()
        for setting in settings:
            if given == setting.name or folder in _folders(setting):
                return {setting.data: setting}
        names = [setting.name for setting in settings]
        raise UserError(f"--reference {given} is not one of the runs{nearest(given, names)}: {', '.join(names)}")
    # The first of each data, unless a sweep's unchanged cell is there.
    ordered = sorted(settings, key=lambda setting: setting.folder.name != FULL)
    return {setting.data: setting for setting in reversed(ordered)} if by == "cell" else {}


def _folders(setting: Setting) -> set[Path]:
    return {setting.folder.resolve(), *(result.folder.resolve() for result in setting.results)}


def _rows(
    settings: Sequence[Setting], references: dict[str, Setting], options: TableOptions, resampler: Resampler
) -> list[MetricRow]:
    def over_videos(setting: Setting, metric: str) -> tuple[float, float] | None:
        result = setting.results[0]
        return resampler.interval(result.folder, metric) if options.bootstrap and result.scores else None

    # The paper's figure does not belong to the changed settings of an ablation.
    counts = pd.Series([(setting.method, setting.data) for setting in settings]).value_counts()
    changed = [
        setting.name
        for setting in settings
        if counts[(setting.method, setting.data)] > 1 and references.get(setting.data) is not setting
    ]
    weights = (BEST, LAST) if options.weights == "both" else (options.weights,)
    bar = tqdm(settings, "runs", disable=None, leave=False)
    rows = metric_rows(bar, weights, options.metrics or tuple(TITLES), over_videos, changed)
    if missing := set(options.metrics or ()) - {row.metric for row in rows}:
        known = sorted({name for setting in settings for run in setting.results for name in run.metrics.get(BEST, {})})
        word = sorted(missing)[0]
        raise UserError(f"no run has a metric {word!r}{nearest(word, known)}; there are: {', '.join(known)}")
    return rows


def _compare(
    settings: Sequence[Setting], references: dict[str, Setting], resampler: Resampler, asked: bool
) -> list[Compared]:
    """Compare each setting with its reference.

    A setting that cannot be compared is an error where the user ``asked`` for the reference, else a warning.
    """
    others = [one for one in settings if one.data in references and one is not references[one.data]]
    compared = []
    for setting in tqdm(others, "paired bootstrap", disable=None, leave=False):
        reference = references[setting.data]
        try:
            found = resampler.compare(*([run.folder for run in one.results] for one in (reference, setting)))
        except UserError as error:
            if asked:
                raise
            warn(f"{setting.name} is not compared with {reference.name}: {error}")
            continue
        compared += [Compared(setting.name, reference.name, one) for one in found]
    return compared


def _lay_out(
    rows: Sequence[MetricRow], by: str, compared: Sequence[Compared], metrics: Sequence[str] | None
) -> list[Table]:
    wanted = metrics or (HEADLINE if by == "cell" else OVERVIEW)
    shown = [row for row in rows if row.metric in wanted or (row.paper is not None and "@" not in row.metric)]
    kinds = [[row for row in shown if row.weights == kind] for kind in dict.fromkeys(row.weights for row in shown)]
    tables = (
        list(map(ablation, kinds)) if by == "cell" else [*(overview(kind, by) for kind in kinds[:1]), *details(rows)]
    )
    for reference in dict.fromkeys(one.reference for one in compared):
        own = [one for one in compared if one.reference == reference and one.difference.metric in (metrics or HEADLINE)]
        tables += differences(reference, [(one.setting, one.difference) for one in own])
    return tables


def _csv(rows: Sequence[MetricRow], compared: Sequence[Compared]) -> str:
    """Return a line for each setting, metric and weights, with differences beside the best weights, whose they are."""
    names = ("difference", "low", "high", "p", "seeds", "seed_low", "seed_high", "seed_p")
    keys = ["cell", "metric", "weights", "reference"]
    lines = [
        (one.setting, one.difference.metric, BEST, one.reference, *(getattr(one.difference, name) for name in names))
        for one in compared
    ]
    gaps = pd.DataFrame(lines, columns=[*keys, *(f"difference_{name}" for name in names)])
    gaps = gaps.astype({"difference_seeds": "Int64"})
    text: str = pd.DataFrame(rows).merge(gaps, how="left", on=keys[:3]).to_csv(index=False, lineterminator="\n")
    return text
