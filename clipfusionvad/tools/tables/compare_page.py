"""Two tests of the same videos on one page: numbers with paired intervals, and both curves over the truth."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipfusionvad.engine.evaluator import VideoScores
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_page, check_writable, write_text
from clipfusionvad.metrics import bootstrap
from clipfusionvad.report import PAGE
from clipfusionvad.report.csv_tables import video_table
from clipfusionvad.report.curves import video_error
from clipfusionvad.report.page import curve_data, render
from clipfusionvad.report.results import read_run
from clipfusionvad.report.scores import TestResult
from clipfusionvad.tools.tables import RESAMPLES
from clipfusionvad.tools.tables.build import TITLES
from clipfusionvad.tools.tables.collect import PLACES
from clipfusionvad.tools.tables.compare import by_name, check_paired, difference, explain, resampled_metrics

_NOTE = (
    "Anomaly scores of the first branch over time, from 0 to 1. Click a video to enlarge its curves. Distance: mean "
    "difference between the two curves over the frames; the video where it is largest comes first."
)
_ERROR = " Error: mean difference between a curve and the truth (0 or 1); where B − A is negative, B is closer to it."


def write_comparison(one: Path, two: Path, output: Path | None = None) -> Path:
    """Write the page that compares the tests of two folders; return its path.

    The default is ``A_vs_B.html`` in the folder that holds both, named after what differs in their paths. Raises
    ``UserError`` where a folder has no scores, and where videos, labels, classes, lengths or truth differ.
    """
    folders = [one, two]
    # The scores that the page of a folder shows.
    tests = [by_name(read_run(folder).known_test) for folder in folders]
    check_paired(one, tests[0].videos, two, tests[1].videos)
    for index, entry in enumerate(tests[0].videos.entries):
        frames = [int(tested.edges(index)[-1]) for tested in tests]
        if frames[0] != frames[1]:
            raise UserError(f"{one} and {two} were tested on other features: {entry.video} has {frames} frames")
    above = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    names = [folder.resolve().relative_to(above).as_posix() for folder in folders]
    output = output or Path(os.path.relpath(above)) / ("_vs_".join(names).replace("/", "_") + ".html")
    check_writable(output)
    check_page(output)
    sides = [f"{side} {name}" for side, name in zip("AB", names, strict=True)]
    pages = {side: folder / PAGE for side, folder in zip(sides, folders, strict=True)}
    place = output.parent.resolve()
    links = {side: os.path.relpath(page.resolve(), place) for side, page in pages.items() if page.is_file()}
    write_text(output, comparison_page(tests, sides, links))
    return output


def comparison_page(tests: Sequence[TestResult], sides: Sequence[str], links: Mapping[str, str]) -> str:
    """Return the page as HTML; the tests are of the same videos in the same order, ``links`` lead to their pages."""
    options = [tested.options for tested in tests]
    facts = [f"{side}: {own.get('method')}" for side, own in zip(sides, options, strict=True)]
    facts += [f"{len(tests[0].scores)} test videos of {tests[0].videos.dataset.title}", "last: the options that differ"]
    demo, judged = any(own.get("demo") for own in options), bool(tests[0].videos.truth)
    facts += [] if judged else ["no truth of frames: the curves are compared, but no metrics"]
    keys = sorted({*options[0], *options[1]} - PLACES | {"seed", "model_path"})
    pairs = [(key, [str(own.get(key, "-")) for own in options]) for key in keys]
    videos, scores = _videos(tests, sides)
    return render(
        "report.html.j2",
        title=" and ".join(sides),
        facts=facts,
        links=links,
        lines=["made-up data: numbers say nothing about the method"] if demo else [],
        numbers=_numbers(tests) if judged else None,
        videos=videos,
        videos_note=_NOTE + _ERROR * judged,
        scores=scores,
        options=[(key, f"A {one} · B {two}") for key, (one, two) in pairs if one != two],
        **dict.fromkeys(("ranking", "classes", "confusion", "detection", "training", "environment")),
    )


def _numbers(tests: Sequence[TestResult]) -> dict[str, Any]:
    """Return the metrics of both, their differences, and the intervals of these over the same resamples."""
    weights = bootstrap.draw_videos(len(tests[0].scores), RESAMPLES, 0)
    one, two = (resampled_metrics(tested, weights) for tested in tests)
    # Of two protocols it is two variants.
    apart = {"map_average"} if len({tested.options.get("protocol") for tested in tests}) > 1 else set()
    shared = [key for key in TITLES if key in one.keys() & two.keys() - apart]
    found = [own for key in shared if np.isfinite((own := difference(key, one[key][None], two[key][None])).difference)]
    rows = [
        (
            TITLES[own.metric].replace("  ", "detection mAP, "),
            [f"{own.reference:.2f}", f"{own.other:.2f}", f"{own.difference:+.2f}", own.over_videos, f"{own.p:.3f}"],
        )
        for own in found
    ]
    notes = [explain(found, of_seeds=False)] if found else []
    return {"cards": [], "columns": ["A", "B", "B − A", "95 % interval", "p"], "rows": rows, "notes": notes}


def _videos(tests: Sequence[TestResult], names: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of the videos, the one whose curves differ most first, and their curves in the same order."""
    # The curves of both are drawn over the snippets of the test that has more of them.
    grid = max(tests, key=lambda tested: sum(one.anomaly.shape[1] for one in tested.scores))
    rows, joined = list[dict[str, Any]](), list[VideoScores]()
    for index, (one, two) in enumerate(zip(*(video_table(tested).itertuples() for tested in tests), strict=True)):
        edges = grid.edges(index)
        middles = (edges[:-1] + edges[1:]) // 2
        at = [np.searchsorted(tested.edges(index)[1:-1], middles, side="right") for tested in tests]
        curves = np.stack([tested.scores[index].anomaly[0][own] for tested, own in zip(tests, at, strict=True)])
        joined.append(VideoScores(curves, None))
        gap = video_error(np.abs(curves[1] - curves[0]), 0 * edges[1:], np.diff(edges))
        errors = {"error A": one.error1, "error B": two.error1, "error B − A": two.error1 - one.error1}
        values = {"distance": gap} | (errors if grid.videos.truth else {})
        row = {"name": one.video, "label": one.label, "groups": grid.videos.dataset.codes(one.label)}
        rows.append(row | {"values": values, "seconds": one.seconds})
    order = sorted(range(len(rows)), key=lambda index: -np.nan_to_num(rows[index]["values"]["distance"]))
    return [rows[index] for index in order], curve_data(replace(grid, scores=joined).only(order), names)
