"""Two tests of the same videos on one page: numbers with paired intervals, and both curves over the truth."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipfusionvad.engine.evaluator import VideoScores, evaluate, evaluate_classes
from clipfusionvad.engine.run_folder import which_run
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_writable, write_text
from clipfusionvad.metrics import bootstrap
from clipfusionvad.report import PAGE
from clipfusionvad.report.csv_tables import video_table
from clipfusionvad.report.curves import pool, video_error
from clipfusionvad.report.page import curve_data, relative, render
from clipfusionvad.report.results import RUN_SCORES, read_run
from clipfusionvad.report.scores import TestResult
from clipfusionvad.report.table import metrics_rows
from clipfusionvad.tools.tables import RESAMPLES
from clipfusionvad.tools.tables.collect import PLACES
from clipfusionvad.tools.tables.compare import by_name, check_paired, difference, explain, resampled_metrics

SIDES = ["A", "B"]


def write_comparison(one: Path, two: Path, output: Path | None = None) -> Path:
    """Write the page that compares the tests of two folders; return its path.

    The default is ``A_vs_B.html`` in the folder that holds both, named after what differs in their paths. Raises
    ``UserError`` where a folder has no scores, and where videos, labels, classes, lengths or truth differ.
    """
    folders = [one, two]
    tests = [_read(folder) for folder in folders]
    check_paired(one, tests[0].videos, two, tests[1].videos)
    for index, entry in enumerate(tests[0].videos.entries):
        # With a truth both have its length.
        lengths = [int(tested.edges(index)[-1]) for tested in tests]
        if lengths[0] != lengths[1]:
            what = f"{entry.video} has {lengths[0]} and {lengths[1]} frames"
            raise UserError(f"{one} and {two} were tested on other features, without truth: {what}")
    above = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    names = [folder.resolve().relative_to(above).as_posix() for folder in folders]
    if names[0] == names[1]:
        raise UserError(f"{one} and {two} are the same folder: give two")
    output = output or Path(os.path.relpath(above)) / ("_vs_".join(names).replace("/", "_") + ".html")
    check_writable(output)
    pages = [folder / PAGE for folder in folders]
    links = [relative(page, output) if page.is_file() else None for page in pages]
    write_text(output, comparison_page(tests, names, links))
    return output


def _read(folder: Path) -> TestResult:
    """Read the scores that the page of a folder shows, sorted by the names of its videos."""
    tested = read_run(folder).tested
    if tested is None:
        hint = which_run(folder) or "test its model into a folder (--output-dir) and give that"
        raise UserError(f"{folder} holds no {RUN_SCORES}: {hint}")
    return by_name(tested)


def comparison_page(tests: Sequence[TestResult], names: Sequence[str], links: Sequence[str | None]) -> str:
    """Return the page as HTML; the tests are of the same videos in the same order, ``links`` lead to their pages."""
    options = [tested.options for tested in tests]
    known = tests[0].videos.truth is not None
    sides = [
        {"side": side, "name": name, "page": link, "facts": _facts(own)}
        for side, name, link, own in zip(SIDES, names, links, options, strict=True)
    ]
    keys = sorted({*options[0], *options[1]} - PLACES)
    videos, scores = _videos(tests)
    return render(
        "comparison.html.j2",
        title=" and ".join(names),
        dataset=tests[0].videos.dataset.title,
        demo=any(own.get("demo") for own in options),
        sides=sides,
        numbers=_numbers(tests) if known else None,
        videos=videos,
        scores=scores,
        options=[
            (key, [own.get(key, "-") for own in options]) for key in keys if options[0].get(key) != options[1].get(key)
        ],
    )


def _facts(options: dict[str, Any]) -> str:
    facts = [str(options.get("method", "unknown method")), f"seed {options.get('seed')}"]
    facts += [f"protocol {options.get('protocol')}", f"smoothing {options.get('smooth') or 'none'}"]
    return " · ".join([*facts, f"model {options.get('model_path')}"])


def _numbers(tests: Sequence[TestResult]) -> dict[str, Any]:
    """Return the rows of a test's table for both, with differences and their intervals over the same resamples."""
    weights = bootstrap.draw_videos(len(tests[0].scores), RESAMPLES, 0)
    values = [resampled_metrics(tested, weights) for tested in tests]
    protocols = [str(tested.options.get("protocol", "paper")) for tested in tests]
    shared = values[0].keys() & values[1].keys()
    found = {key: difference(key, values[0][key][None], values[1][key][None]) for key in shared}
    titles = dict[str, str]()
    for tested, protocol in zip(tests, protocols, strict=True):
        metrics = evaluate(tested.scores, tested.videos, protocol) | evaluate_classes(tested.scores, tested.videos)
        titles |= {key: title.replace("  ", "detection mAP, ") for title, key, _ in metrics_rows({"": metrics}, {})}
    if protocols[0] != protocols[1]:
        # It is of another variant in each.
        titles.pop("map_average", None)
    rows = []
    for key, title in titles.items():
        if key not in values[0].keys() | values[1].keys():
            continue
        sides = [f"{own[key][0]:.2f}" if np.isfinite(own.get(key, [np.nan])[0]) else "-" for own in values]
        rest = ["-"] * 3
        if "-" not in sides:
            rest = [f"{found[key].difference:+.2f}", found[key].over_videos, f"{found[key].p:.3f}"]
        rows.append((title, sides + rest))
    return {"columns": [*SIDES, "B − A", "95 % interval", "p"], "rows": rows, "note": explain([*found.values()])}


def _videos(tests: Sequence[TestResult]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of the videos, the one whose curves differ most first, and their curves in the same order."""
    # The curves of both are drawn over the snippets of the test that has more of them.
    grid = max(tests, key=lambda tested: sum(one.anomaly.shape[1] for one in tested.scores))
    dataset, rows, joined = grid.videos.dataset, list[dict[str, Any]](), list[VideoScores]()
    tables = [video_table(one, pool(one.scores, one.videos) if one.videos.truth else None) for one in tests]
    for index, (one, two) in enumerate(zip(*(table.itertuples() for table in tables), strict=True)):
        curves = np.stack([_on_grid(tested, grid, index) for tested in tests])
        gap = np.abs(curves[1] - curves[0])
        joined.append(VideoScores(curves, None))
        row = {"name": one.video, "label": one.label, "groups": dataset.codes(one.label), "seconds": one.seconds}
        row |= {"gap": video_error(gap, np.zeros(len(gap)), np.diff(grid.edges(index)))}
        rows.append(row | {"errors": [one.error1, two.error1], "gain": two.error1 - one.error1})
    order = sorted(range(len(rows)), key=lambda index: -rows[index]["gap"])
    return [rows[index] for index in order], curve_data(replace(grid, scores=joined).only(order), SIDES)


def _on_grid(tested: TestResult, grid: TestResult, index: int) -> np.ndarray:
    """Return the first branch's score of a video at the middle of each snippet of another test of it."""
    curve, own, wanted = tested.scores[index].anomaly[0], tested.edges(index), grid.edges(index)
    if np.array_equal(own, wanted):
        return curve
    at = np.searchsorted(own, (wanted[:-1] + wanted[1:]) // 2, side="right") - 1
    return curve[np.clip(at, 0, len(curve) - 1)]
