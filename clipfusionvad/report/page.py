"""HTML pages in one file each, styles, script and data inside, nothing loaded; the page of a run or a test."""

import os
import shlex
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from clipfusionvad.datasets import DATASETS
from clipfusionvad.io.files import check_page, remove_leftovers, without_nan, write_text
from clipfusionvad.report import PAGE
from clipfusionvad.report.csv_tables import video_table, write_tables
from clipfusionvad.report.curves import pool
from clipfusionvad.report.formatting import Table
from clipfusionvad.report.plots import CLASS_COLOURS, colour_number
from clipfusionvad.report.results import Run, read_run
from clipfusionvad.report.scores import TestResult, abnormal_spans
from clipfusionvad.report.table import (
    AP_NOTE,
    BRANCHES,
    IOUS,
    VARIANTS,
    Results,
    metrics_rows,
    percent,
    published_beside,
    smoothing_lines,
    undefined_lines,
)

if TYPE_CHECKING:
    from jinja2 import Environment

# Scores in the page are whole multiples of 1 / SCALE.
SCALE = 10_000
# Shown large, beside what the paper has a figure for.
_HEADLINES = {"auc1", "ap1", "map_average"}
# The first two: of the anomaly score, over the frames of the class's videos.
_PER_CLASS = {"video_auc": "AUC in its videos", "video_ap": "AP in its videos", "auc": "class AUC", "ap": "class AP"}


def render(template: str, **values: Any) -> str:
    """Render a template with the values that its head lists; all are escaped, a missing one is ``UndefinedError``."""
    text = _environment().get_template(template).render(**values)
    # A file name may hold bytes that are not text: they become question marks.
    return text.encode("utf-8", "replace").decode("utf-8")


def table_page(table: Table) -> str:
    """Return a page of one table."""
    shown = {"header": table.header, "rows": table.rows, "labels": table.labels, "notes": table.note.splitlines()}
    return render("table.html.j2", title=table.title, **shown)


@cache
def _environment() -> "Environment":
    # Here: the commands that may write a page do not load Jinja at their start.
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from jinja2.utils import htmlsafe_json_dumps

    loader = ChoiceLoader([PackageLoader("clipfusionvad.report"), PackageLoader("clipfusionvad.tools.detect")])
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {
        # Compact strict JSON that is safe inside a script element.
        "json": lambda value: htmlsafe_json_dumps(without_nan(value), allow_nan=False, separators=(",", ":")),
        # A relative path as a link in which every character of the name means itself.
        "url": lambda path: quote(os.fsencode(path).replace(os.sep.encode(), b"/")),
        "clock": clock,
        # The CSS variable with the colour of a class, by its number in the dataset.
        "class_colour": lambda number: f"--class-{colour_number(number)}",
    }
    pages.globals["class_colours"] = CLASS_COLOURS
    return pages


def clock(seconds: float) -> str:
    """Return seconds as 1:02.3 or 1:01:02.3."""
    tenths = round(10 * seconds)
    hours, minutes, rest = tenths // 36000, tenths // 600 % 60, tenths % 600
    return (f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{rest // 10:02}.{rest % 10}"


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page of a run's or a test's folder, by default into it and with ``videos.csv``; return its path."""
    run = read_run(folder)
    if output is None and run.tested:
        write_tables(run)
    output = output or folder / PAGE
    check_page(output)
    remove_leftovers(output.parent, output.name)
    write_text(output, report_page(run, output.parent))
    return output


def report_page(run: Run, place: Path | None = None) -> str:
    """Return the page as HTML, with links for a page in the folder ``place`` (default: that of the run)."""
    from clipfusionvad.report.figures import confusion_figure, ranking_figures, training_figures

    tested, options, results = run.tested, run.options, run.results
    main = "mean" if run.seed_folders else next(reversed(results), "")
    last = results.get(main, {})
    pooled = pool(tested.scores, tested.videos) if tested and tested.videos.truth else None
    method, name = (str(options.get(key, "unknown")) for key in ("method", "dataset"))
    dataset = tested.videos.dataset if tested else DATASETS.get(name)
    place = (place or run.folder).resolve()
    pages = {name: folder.resolve() / PAGE for name, folder in run.seed_folders.items()}
    seed_links = {name: os.path.relpath(page, place) for name, page in pages.items() if page.is_file()}
    paper, lines = published_beside(options, run.judged)
    return render(
        "report.html.j2",
        title=f"{'/'.join(run.folder.resolve().parts[-2:])}: {method} on {dataset.title if dataset else name}",
        facts=_facts(run),
        links=_downloads(run.folder, place),
        lines=lines if results else [],
        numbers=_numbers(results, main, paper, seed_links) if results else None,
        ranking=ranking_figures(pooled) if pooled else [],
        classes=_classes(last) if pooled else None,
        confusion=confusion_figure(tested.videos.dataset.labels, pooled) if tested and pooled else None,
        detection=_detection(last, paper) if "map" in last else None,
        videos=_videos(tested) if tested else [],
        videos_note="",
        scores=curve_data(tested) if tested else None,
        training=training_figures(run.losses, run.evaluations),
        # A training of several seeds has no seed of its own.
        options=sorted((str(k), _shown(v)) for k, v in options.items() if k != "seed" or not run.seed_folders),
        environment=_environment_rows(run.environment),
    )


def _downloads(folder: Path, place: Path) -> dict[str, str]:
    """Return relative paths to the tables and arrays of a folder by their names."""
    files = sorted(path for path in folder.resolve().iterdir() if path.suffix in (".csv", ".json", ".npz"))
    return {path.name: os.path.relpath(path, place) for path in files}


def _facts(run: Run) -> list[str]:
    facts = [f"protocol {run.options.get('protocol', 'unknown')}"]
    if run.options.get("demo"):
        facts.append("made-up data: numbers say nothing about the method")
    if run.tested:
        anomalous = int(run.tested.videos.anomalous.sum())
        facts.append(f"{len(run.tested.scores)} test videos, {anomalous} of them anomalous")
        facts.append(f"model {run.options.get('model_path')}")
    elif run.seed_folders:
        facts.append(f"{len(run.seed_folders)} seeds; the large numbers are means; a seed's name leads to its page")
    else:
        facts.append("not tested yet, or tested by an older version: no scores.npz in the folder")
    return facts + smoothing_lines(run.results)


def _numbers(results: Results, main: str, paper: Mapping[str, float], links: Mapping[str, str]) -> dict[str, Any]:
    """Return cards of the ``main`` result and the table that a test prints, without the rows of the table by IoU."""
    rows, shown = metrics_rows(results, paper), list(results).index(main)
    cards = [
        {"name": title, "value": values[shown], "paper": values[-1] if paper else "-"}
        for title, key, values in rows
        if key in _HEADLINES | paper.keys() and "@" not in key
    ]
    # The variants of detection mAP are indented under their heading in the printed table.
    lines = [(title.replace("  ", "detection mAP, "), values) for title, key, values in rows if "map@" not in key]
    columns = [*results, *(["paper"] if paper else [])]
    notes = [AP_NOTE, *undefined_lines(results)]
    return {"cards": cards, "columns": columns, "rows": lines, "notes": notes, "links": links}


def _classes(metrics: Mapping[str, Any]) -> dict[str, Any]:
    per_class = metrics.get("per_class", {})
    columns = {key: title for key, title in _PER_CLASS.items() if any(key in found for found in per_class.values())}
    rows = [(label, [percent(key, found.get(key)) for key in columns]) for label, found in per_class.items()]
    return {"columns": list(columns.values()), "rows": rows}


def _detection(metrics: Mapping[str, Any], paper: Mapping[str, float]) -> dict[str, Any]:
    """Return detection mAP in its variants, by IoU."""
    keys = [*IOUS, "average"]
    rows = [(title, [percent("map", metrics[name][key]) for key in keys]) for name, title in VARIANTS.items()]
    figures = [paper.get("map_released@average" if key == "average" else f"map@{key}") for key in keys]
    if any(figures):
        rows.append(("paper", [percent("map", value) for value in figures]))
    return {"columns": [f"IoU {iou}" for iou in IOUS] + ["mean"], "rows": rows}


def _videos(tested: TestResult) -> list[dict[str, Any]]:
    """Return a row for each test video."""
    rows = []
    for own in video_table(tested).itertuples():
        values = ({"error": own.error1} if tested.videos.truth else {}) | {"highest score": own.peak1}
        row = {"name": own.video, "label": own.label, "groups": tested.videos.dataset.codes(own.label)}
        rows.append(row | {"values": values, "seconds": own.seconds})
    return rows


def curve_data(tested: TestResult, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return the curves of all test videos for ``videos.js``, compact; ``names`` (default: the branches).

    Scores (branches, n) are packed branch by branch, as two bytes each, the lower first, in base64. Spans are the
    abnormal intervals in seconds, with the classes annotated there.
    """
    videos, fps = tested.videos, tested.videos.dataset.fps
    names = names or [BRANCHES.get(str(n), f"branch {n}") for n in range(1, len(tested.scores[0].anomaly) + 1)]
    step = videos.frames_per_snippet and videos.frames_per_snippet / fps
    data: dict[str, Any] = {"branches": names, "step": step, "scale": SCALE, "seconds": [], "curves": [], "spans": []}
    for index, found in enumerate(tested.scores):
        if videos.truth:
            named = list(zip(videos.truth.segments[index], videos.truth.labels[index], strict=True))
            spans = []
            for begin, end in abnormal_spans(videos.truth.frames[index]):
                labels = dict.fromkeys(label for (first, last), label in named if first < end and begin < last)
                spans.append((round(begin / fps, 3), round(end / fps, 3), ", ".join(labels)))
            data["spans"].append(spans)
        packed = np.rint(SCALE * np.clip(np.nan_to_num(found.anomaly.ravel()), 0, 1)).astype("<u2")
        data["curves"].append(b64encode(packed.tobytes()).decode("ascii"))
        data["seconds"].append(round(int(tested.edges(index)[-1]) / fps, 3))
    return data


def _environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and values, the command as a shell line, packages one by one."""
    known = dict(environment)
    packages = known.pop("packages", None)
    known |= packages if isinstance(packages, dict) else {}
    if isinstance(known.get("command"), list):
        known["command"] = shlex.join(map(str, known["command"])).replace("__main__.py", "python -m clipfusionvad", 1)
    return [(name, _shown(value)) for name, value in known.items()]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "-"}[value]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
