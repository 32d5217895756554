"""The results store, a CSV file of measured metrics, and the tables in a page that are generated from it."""

import textwrap
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import clipfusionvad
from clipfusionvad.datasets import DATASETS
from clipfusionvad.engine.run_folder import ENVIRONMENT
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_csv, read_json, read_text, write_csv, write_text
from clipfusionvad.report.formatting import Table, to_markdown
from clipfusionvad.report.table import made_up, published_figures
from clipfusionvad.tools.tables import BEST, CLIPS, DATA, DEMO, FULL_SET
from clipfusionvad.tools.tables.build import SHORT, TITLES, metric_rows
from clipfusionvad.tools.tables.collect import Setting

_KEY = ("method", "dataset", "data", "protocol", "metric")
_COLUMNS = (*_KEY, "mean", "std", "n", "command", "version", "commit", "date")
_WIDTH = 120


def write_store(path: Path, rows: Sequence[dict[str, str]]) -> None:
    kept = {_key(row): [row[column] for column in _COLUMNS] for row in rows}
    write_csv(path, _COLUMNS, [cells for _, cells in sorted(kept.items())])


def merge(path: Path, settings: Sequence[Setting], data: str | None) -> tuple[list[dict[str, str]], int]:
    """Replace a store's rows by the best weights' metrics (percent) of runs; return all rows and how many are theirs.

    ``data``: what the runs but the demo's were tested on; ``UserError`` without it, and for two of the same key.
    """
    stored, measured = read_store(path) if path.exists() else [], list[dict[str, str]]()
    owner: dict[tuple[str, ...], Setting] = {}
    for setting in settings:
        key = (setting.method, setting.dataset, _kind(setting, data), setting.protocol)
        if any(run.sigma for run in setting.results):
            raise UserError(f"the scores of {setting.name} are smoothed over time: a store holds unsmoothed results")
        if key in owner:
            names = f"{owner[key].name} and {setting.name}"
            raise UserError(f"{names} are two settings of {' '.join(key)}: store one of them")
        owner[key] = setting
        measured += _rows_of(setting, key)
    return [row for row in stored if _key(row)[:4] not in owner] + measured, len(measured)


def read_store(path: Path) -> list[dict[str, str]]:
    """Read the rows of a store; ``UserError`` for any other file."""
    rows = [row for _, row in read_csv(path, "results store", _COLUMNS)]
    for row in rows:
        try:
            float(row["mean"]), float(row["std"] or 0), int(row["n"])
        except ValueError as error:
            raise UserError(f"results store {path}: {', '.join(_key(row))} has cells that are not numbers") from error
        if row["data"] not in DATA:
            raise UserError(f"results store {path}: data is {row['data']!r}; it may be {', '.join(DATA)}")
    return rows


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in _KEY)


def _kind(setting: Setting, data: str | None) -> str:
    if setting.demo and data in (None, DEMO):
        return DEMO
    if setting.demo or data in (None, DEMO):
        what = "is of the demo: it cannot be stored as anything else" if setting.demo else "is not of the demo"
        raise UserError(f"{setting.name} {what}: say by --data what its videos are ({', '.join(DATA)})")
    if reason := setting.no_comparison if data == FULL_SET else made_up(setting.results[0].options):
        raise UserError(f"{setting.name} cannot be stored as {data}: {reason}")
    return data


def _rows_of(setting: Setting, key: tuple[str, ...]) -> list[dict[str, str]]:
    environment = setting.results[0].folder / ENVIRONMENT
    about = read_json(environment, "environment") if environment.is_file() else {}
    measured = datetime.fromtimestamp(max(run.folder.stat().st_mtime for run in setting.results), timezone.utc)
    shared = {
        **dict(zip(_KEY, key, strict=False)),
        "command": " ".join(map(str, about.get("command", []))).replace("__main__.py", "python -m clipfusionvad"),
        "version": str(about.get("version", clipfusionvad.__version__)),
        "commit": str(about.get("commit") or ""),
        "date": measured.date().isoformat(),
    }
    return [
        {**shared, "metric": row.metric, "mean": f"{row.mean:.4f}", "n": str(row.n)}
        | {"std": "" if row.std is None else f"{row.std:.4f}"}
        for row in metric_rows([setting], [BEST], tuple(TITLES))
    ]


def write_into_page(path: Path, store: Sequence[dict[str, str]]) -> None:
    """Write the tables of a store between the markers of a page; ``UserError`` for a page without markers.

    Between ``<!-- results: begin -->`` and ``<!-- results: end -->`` go all figures, between the same lines with
    ``headline`` the first published figure of each method and dataset.
    """
    text, found = read_text(path, "page"), False
    for kind, make in (("results", results_text), ("headline", headline_text)):
        begin, end = f"<!-- {kind}: begin -->", f"<!-- {kind}: end -->"
        if text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end):
            before, rest = text.split(begin)
            text, found = f"{before}{begin}\n{make(store)}{end}{rest.split(end)[1]}", True
    if not found:
        raise UserError(
            f"{path} needs one line '<!-- results: begin -->' and below it one line '<!-- results: end -->': the "
            f"tables go between them"
        )
    write_text(path, text)


def headline_text(store: Sequence[dict[str, str]]) -> str:
    """Render each paper's first figure by dataset beside what was measured here on the full test set, in percent."""
    measured = _by_place(store, FULL_SET)
    claims = {(figure.method, figure.dataset): figure for figure in reversed(published_figures())}
    cells = {
        key: f"{_name(figure.metric)} {figure.percent:.2f} / {_measured(measured.get((*key, figure.metric)))}"
        for key, figure in claims.items()
    }
    methods = dict.fromkeys(figure.method for figure in published_figures())
    rows = [(method, *(cells.get((method, name), "–") for name in DATASETS)) for method in methods]
    return to_markdown(Table(("published / measured here", *(item.title for item in DATASETS.values())), rows))


def results_text(store: Sequence[dict[str, str]]) -> str:
    """Render published figures beside what was measured here, and the demo's results in a table of their own.

    In percent; only results of the protocol of the papers.
    """
    full, clips, demo = (_by_place(store, kind) for kind in (FULL_SET, CLIPS, DEMO))
    intro = (
        "Published figures in percent and, beside them, what was measured with this repository by the same protocol. "
        + ("" if full or clips else "**None of them was measured here yet.** ")
        + "*unverified*: no public source could be checked."
    )
    rows = []
    for figure in published_figures():
        if "@" not in figure.metric:
            mark = " *unverified*" if "unverified" in figure.source else ""
            place = (figure.method, figure.dataset, figure.metric)
            shown = (figure.method, DATASETS[figure.dataset].title, _name(figure.metric), f"{figure.percent:.2f}{mark}")
            here = (_measured(kind.get(place)) for kind in (full, clips))
            rows.append((*shown, figure.source.replace(" (unverified)", ""), *here))
    header = ("method", "dataset", "metric", "published", "source", "here: full test set", "here: some real clips")
    parts = [textwrap.fill(intro, _WIDTH), "", to_markdown(Table(header, rows, labels=3))]
    if demo:
        parts += [textwrap.fill(_DEMO, _WIDTH), "", to_markdown(_demo_table(demo))]
    return "\n".join(parts)


_DEMO = (
    "**Made-up demo data**, which is easy and has nothing but class names in common with the benchmarks: the numbers "
    "below say that training works, and cannot be set beside those above. AUC / AP of the main branch, mean ± standard "
    "deviation over (n) seeds."
)


def _demo_table(demo: Mapping[tuple[str, str, str], dict[str, str]]) -> Table:
    names = [name for name in DATASETS if any(dataset == name for _, dataset, _ in demo)]
    there, published = {method for method, *_ in demo}, [figure.method for figure in published_figures()]
    rows = []
    for method in dict.fromkeys([*(method for method in published if method in there), *sorted(there)]):
        cells = [[demo.get((method, name, metric)) for metric in ("auc1", "ap1")] for name in names]
        shown = (" / ".join(_measured(row, "-") for row in pair) if pair[0] else "not run" for pair in cells)
        rows.append((method, *shown))
    return Table(("made-up data shaped like", *(DATASETS[name].title for name in names)), rows)


def _by_place(store: Sequence[dict[str, str]], kind: str) -> dict[tuple[str, str, str], dict[str, str]]:
    """Return the rows of one kind of data, by the protocol of the papers, by method, dataset and metric."""
    own = [row for row in store if row["data"] == kind and row["protocol"] == "paper"]
    return {(row["method"], row["dataset"], row["metric"]): row for row in own}


def _name(metric: str) -> str:
    """Return the papers' name of a metric, without our branch."""
    return "detection mAP, average" if metric == "map_average" else SHORT[metric].removesuffix(" fine")


def _measured(row: dict[str, str] | None, missing: str = "not measured") -> str:
    if row is None:
        return missing
    std = f" ± {float(row['std']):.2f}" if row["std"] else ""
    return f"{float(row['mean']):.2f}{std} ({row['n']})"
