"""The page of a run or a test: metrics, errors by class and by video, the training, options and environment."""

import shlex
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipfusionvad.io.files import write_text
from clipfusionvad.report import PAGE
from clipfusionvad.report.curves import PooledScores, class_confusion, pool, video_error
from clipfusionvad.report.results import Run, read_run
from clipfusionvad.report.scores import TestResult, abnormal_spans
from clipfusionvad.report.table import BRANCHES, IOUS, VARIANTS, metrics_rows, published

# Scores in the page are whole multiples of 1 / SCALE.
SCALE = 10_000
# Shown large, beside what the paper has a figure for.
_HEADLINES = {"auc1", "ap1", "map_average"}
_PER_CLASS = {"video_auc": "video AUC", "video_ap": "video AP", "auc": "class AUC", "ap": "class AP"}


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page of a run's or a test's folder (default: into that folder); return its path."""
    output = output or folder / PAGE
    write_text(output, report_page(read_run(folder)))
    return output


def report_page(run: Run) -> str:
    """Return the page as HTML."""
    # Pages need Jinja and matplotlib, which the commands that may write one do not load at their start.
    from clipfusionvad.report.page import render
    from clipfusionvad.report.page_figures import ranking_figures, training_figures

    tested = run.tested
    pooled = pool(tested.scores, tested.videos) if tested and tested.videos.truth else None
    paper = _published(run)
    return render(
        "report.html.j2",
        title=f"{run.options.get('method', 'unknown method')} on {run.dataset_title}",
        facts=_facts(run),
        numbers=_numbers(run.results, paper),
        ranking=ranking_figures(pooled) if pooled else [],
        classes=_classes(run, tested, pooled) if tested and pooled else None,
        detection=_detection(run.results, paper),
        videos=_videos(tested) if tested else [],
        scores=_scores(tested) if tested else None,
        training=training_figures(run.losses, run.evaluations),
        options=sorted((str(name), _shown(value)) for name, value in run.options.items()),
        environment=_environment(run.environment),
    )


def _published(run: Run) -> dict[str, float]:
    """Return the paper's figures; none for made-up data."""
    options = run.options
    names = [str(options.get(key, "")) for key in ("method", "dataset", "protocol")]
    return {} if options.get("demo") else published(*names)


def _facts(run: Run) -> list[str]:
    facts = [f"protocol {run.options.get('protocol', 'unknown')}"]
    if run.options.get("demo"):
        facts.append("made-up data: numbers say nothing about the method")
    if run.tested:
        anomalous = int(run.tested.videos.anomalous.sum())
        facts.append(f"{len(run.tested.scores)} test videos, {anomalous} of them anomalous")
        if run.tested.videos.truth is None:
            facts.append("no truth of frames: whole videos are judged")
        facts.append(f"model {run.options.get('model_path')}")
    elif isinstance(seeds := run.options.get("seeds"), list):
        facts.append(f"{len(seeds)} seeds, each with its own page in its folder; the cards show their mean")
    else:
        facts.append("not tested yet, or tested by an older version: no scores.npz in the folder")
    return facts


def _numbers(results: Mapping[str, Mapping[str, Any]], paper: Mapping[str, float]) -> dict[str, Any] | None:
    """Return cards of the last result and the table that a test prints, without the rows of the table by IoU."""
    if not results:
        return None
    rows = metrics_rows(results, paper)
    chosen = _HEADLINES | paper.keys()
    cards = [
        {"name": title, "value": values[len(results) - 1], "paper": values[-1] if paper else "-"}
        for title, key, values in rows
        if key in chosen and "@" not in key
    ]
    # The variants of detection mAP are indented under their heading in the printed table.
    lines = [(title.replace("  ", "detection mAP, "), values) for title, key, values in rows if "map@" not in key]
    return {"cards": cards, "columns": [*results, *(["paper"] if paper else [])], "rows": lines}


def _classes(run: Run, tested: TestResult, pooled: PooledScores) -> dict[str, Any]:
    """Return the metrics of each class, and the confusion of classes."""
    labels = tested.videos.dataset.labels
    per_class = list(run.results.values())[-1].get("per_class", {}) if run.results else {}
    columns = {key: title for key, title in _PER_CLASS.items() if any(key in found for found in per_class.values())}
    rows = [(label, [_hundredths(found.get(key), 100) for key in columns]) for label, found in per_class.items()]
    return {"columns": list(columns.values()), "rows": rows, "confusion": _confusion(labels, pooled)}


def _confusion(labels: list[str], pooled: PooledScores) -> dict[str, Any] | None:
    """Return, for each true class that occurs, its frames by predicted class and their shares."""
    found = class_confusion(labels, pooled)
    if found is None:
        return None
    rows = []
    for column, (label, own) in enumerate(zip(found.labels, found.table.tolist(), strict=True)):
        if total := sum(own):
            rows.append({"label": label, "column": column, "cells": [(count, count / total) for count in own]})
    return {"labels": found.labels, "rows": rows, "threshold": found.threshold}


def _detection(results: Mapping[str, Mapping[str, Any]], paper: Mapping[str, float]) -> dict[str, Any] | None:
    """Return detection mAP of the last result in its variants, by IoU."""
    metrics = list(results.values())[-1] if results else {}
    if "map" not in metrics:
        return None
    keys = [*IOUS, "average"]
    rows = [(title, [_hundredths(metrics[name][key]) for key in keys]) for name, title in VARIANTS.items()]
    figures = [paper.get("map_released@average" if key == "average" else f"map@{key}") for key in keys]
    if any(figures):
        rows.append(("paper", [_hundredths(value) for value in figures]))
    return {"columns": [f"IoU {iou}" for iou in IOUS] + ["mean"], "rows": rows}


def _videos(tested: TestResult) -> list[dict[str, Any]]:
    """Return a row for each test video; ``error`` is None where the truth is unknown."""
    videos = tested.videos
    pooled = pool(tested.scores, videos) if videos.truth else None
    ends = np.cumsum([scores.anomaly.shape[1] for scores in tested.scores])
    rows = []
    for index, (entry, scores, end) in enumerate(zip(videos.entries, tested.scores, ends, strict=True)):
        own, error = slice(end - scores.anomaly.shape[1], end), None
        if pooled:
            error = video_error(scores.anomaly[0], pooled.positives[own], pooled.frames[own])
        rows.append(
            {
                "name": entry.video,
                "label": entry.label,
                "groups": videos.dataset.codes(entry.label),
                "error": error,
                "max_score": float(scores.anomaly[0].max()),
                "seconds": _seconds(tested, index),
            }
        )
    return rows


def _seconds(tested: TestResult, index: int) -> float:
    """Return the length of a video by its truth, or else by its snippets."""
    videos = tested.videos
    covered = tested.scores[index].anomaly.shape[1] * videos.frames_per_snippet
    return (len(videos.known_truth.frames[index]) if videos.truth else covered) / videos.dataset.fps


def _scores(tested: TestResult) -> dict[str, Any]:
    """Return the curves of all videos for ``videos.js``, compact."""
    videos = tested.videos
    branches = len(tested.scores[0].anomaly)
    return {
        "branches": [BRANCHES.get(str(number), f"branch {number}") for number in range(1, branches + 1)],
        "step": videos.frames_per_snippet / videos.dataset.fps,
        "scale": SCALE,
        "seconds": [round(_seconds(tested, index), 3) for index in range(len(tested.scores))],
        "curves": [_packed(scores.anomaly) for scores in tested.scores],
        "spans": [_spans(tested, index) for index in range(len(tested.scores))] if videos.truth else [],
    }


def _packed(anomaly: np.ndarray) -> str:
    """Pack scores (branches, n), branch by branch, as two bytes each, the lower first; in base64."""
    rounded = np.rint(SCALE * np.clip(np.nan_to_num(anomaly.ravel()), 0, 1)).astype("<u2")
    return b64encode(rounded.tobytes()).decode("ascii")


def _spans(tested: TestResult, index: int) -> list[tuple[float, float, str]]:
    """Return the abnormal intervals of a video in seconds, with the classes annotated there."""
    truth, fps = tested.videos.known_truth, tested.videos.dataset.fps
    named = list(zip(truth.segments[index], truth.labels[index], strict=True))
    return [
        (
            round(start / fps, 3),
            round(end / fps, 3),
            ", ".join(dict.fromkeys(label for (first, last), label in named if first < end and start < last)),
        )
        for start, end in abnormal_spans(truth.frames[index])
    ]


def _environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and values, the command as a shell line, packages one by one."""
    packages = environment.get("packages")
    known = {name: value for name, value in environment.items() if name != "packages"}
    known |= packages if isinstance(packages, dict) else {}
    if isinstance(known.get("command"), list):
        known["command"] = shlex.join(map(str, known["command"]))
    return [(name, _shown(value)) for name, value in known.items()]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "-"}[value]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _hundredths(value: float | None, scale: int = 1) -> str:
    return "-" if value is None else f"{scale * value:.2f}"
