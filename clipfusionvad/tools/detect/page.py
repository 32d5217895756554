"""Write the results of detection: JSON, tables, a figure and a page for each video, and an index of a folder."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_text, write_csv, write_json, write_text
from clipfusionvad.metrics.segments import Segment
from clipfusionvad.report.page import render
from clipfusionvad.report.plots import save_figure
from clipfusionvad.tools.detect.detect import Detection

# Name of a segment if the method does not distinguish classes.
ANOMALY = "anomaly"
CURVE_COLOUR, THRESHOLD_COLOUR, ONE_CLASS_COLOUR = "#1f4e79", "#888888", "#c8452d"
DIGITS = 6


def write_detection(folder: Path, name: str, found: Detection, settings: Mapping[str, Any], video: str | None) -> None:
    """Write all files of one video, ``NAME.json`` last: if it exists, the others are complete.

    ``settings`` describe how they were made; ``video`` is the path of the video relative to the page.
    """
    stem, title = str(folder / name), Path(name).name
    _write_tables(stem, found)
    draw_scores(Path(f"{stem}.png"), title, found)
    write_text(f"{stem}.html", detection_page(title, found, video))
    write_json(f"{stem}.json", detection_record(found, settings))


def detection_record(found: Detection, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a detection as plain values."""
    seconds = found.bounds / found.info.fps
    return {
        "video": asdict(found.info) | {"frames_read": found.frames, "seconds": round(found.seconds, DIGITS)},
        "warning": found.broken,
        "settings": dict(settings),
        "thresholds": asdict(found.thresholds),
        "verdict": name_of(found.verdict) if found.verdict else "normal",
        "max_score": float(found.anomaly.max()),
        "segments": [asdict(segment) for segment in found.segments],
        "snippets": {
            "start": seconds[:-1].round(DIGITS).tolist(),
            "end": seconds[1:].round(DIGITS).tolist(),
            "anomaly": found.anomaly.tolist(),
            "classes": None if found.classes is None else _by_label(found),
        },
    }


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the ``detection_record`` of a finished video; None if the file is missing, damaged or something else."""
    if not path.is_file():
        return None
    try:
        content = json.loads(read_text(path, "detection"))
    except (ValueError, RecursionError, UserError):
        return None
    if not isinstance(content, dict) or not {"settings", "snippets", "thresholds"} <= content.keys():
        return None
    video, numbers = content.get("video"), [content.get("max_score")]
    numbers.append(video.get("seconds") if isinstance(video, dict) else None)
    if not all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers):
        return None
    # The index needs these.
    complete = isinstance(content.get("verdict"), str) and isinstance(content.get("segments"), list)
    return content if complete else None


def name_of(segment: Segment) -> str:
    return segment.label or ANOMALY


def _by_label(found: Detection) -> dict[str, list[float]]:
    columns = [] if found.classes is None else found.classes.T
    return {label: column.tolist() for label, column in zip(found.labels, columns, strict=True)}


def _write_tables(stem: str, found: Detection) -> None:
    """Write the scores of each snippet and of each second (means over its frames), and the segments."""
    labels = () if found.classes is None else found.labels
    bounds = (found.bounds / found.info.fps).round(DIGITS)
    snippets = zip(bounds[:-1], bounds[1:], _columns(found.anomaly, found.classes), strict=True)
    rows = [[index, start, end, *scores] for index, (start, end, scores) in enumerate(snippets)]
    write_csv(f"{stem}.csv", ["snippet", "start", "end", "anomaly", *labels], rows)
    second, anomaly, classes = found.by_second()
    rows = [[index, *scores] for index, scores in zip(second, _columns(anomaly, classes), strict=True)]
    write_csv(f"{stem}_seconds.csv", ["second", "anomaly", *labels], rows)
    write_csv(f"{stem}_segments.csv", [field.name for field in fields(Segment)], map(astuple, found.segments))


def _columns(anomaly: np.ndarray, classes: np.ndarray | None) -> np.ndarray:
    return np.column_stack([anomaly] if classes is None else [anomaly, classes]).astype(np.float64).round(DIGITS)


def draw_scores(path: Path, title: str, found: Detection) -> None:
    """Draw the anomaly score over time, the thresholds, and the segments in the colours of their classes."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    axis = figure.subplots()
    seconds = found.bounds / found.info.fps
    axis.stairs(found.anomaly, seconds, color=CURVE_COLOUR, lw=1.6, baseline=None)
    for value, style in ((found.thresholds.high, "--"), (found.thresholds.low, ":")):
        axis.axhline(value, color=THRESHOLD_COLOUR, lw=1, ls=style)
    for segment in found.segments:
        axis.axvspan(segment.start, segment.end, color=_colour(found, segment), alpha=0.35, lw=0)
    names = {name_of(segment): _colour(found, segment) for segment in found.segments}
    handles = [Patch(color=colour, alpha=0.35, lw=0, label=name) for name, colour in names.items()]
    if handles:
        figure.legend(handles=handles, loc="outside right upper", frameon=False)
    axis.set_title(
        f"{title}{' · decoding stopped early' if found.broken else ''}", loc="left", fontsize=11, parse_math=False
    )
    axis.set(xlim=(0, seconds[-1]), ylim=(-0.02, 1.02), xlabel="minutes:seconds", ylabel="anomaly probability")
    axis.xaxis.set_major_formatter(lambda value, _: clock(value))
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _colour(found: Detection, segment: Segment) -> Any:
    if segment.label is None:
        return ONE_CLASS_COLOUR
    return colormaps["tab20"](found.labels.index(segment.label) % 20)


def clock(seconds: float) -> str:
    """Return 1:02.5 or 2:01:02.5; a tenth of 0 is left out."""
    tenths = round(seconds * 10)
    hours, minutes, rest = tenths // 36000, tenths // 600 % 60, tenths % 600
    text = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{text}:{rest // 10:02d}" + (f".{rest % 10}" if rest % 10 else "")


def detection_page(title: str, found: Detection, video: str | None) -> str:
    """Render the page of one video, which plays the video along its curves."""
    seconds = found.bounds / found.info.fps
    return render(
        "detection.html.j2",
        title=title,
        video=video,
        fps=found.info.fps,
        seconds=((seconds[:-1] + seconds[1:]) / 2).round(3).tolist(),
        anomaly=found.anomaly.astype(np.float64).round(4).tolist(),
        classes={} if found.classes is None else {k: np.round(v, 4).tolist() for k, v in _by_label(found).items()},
        segments=[
            {"start": s.start, "end": s.end, "label": name_of(s), "confidence": s.confidence} for s in found.segments
        ],
        threshold=found.thresholds.high,
        duration=found.seconds,
        facts=_facts(found),
    )


def _facts(found: Detection) -> dict[str, str]:
    info = found.info
    facts = {"length": clock(found.seconds), "video": f"{info.width}×{info.height}, {info.fps:.6g} fps, {info.codec}"}
    return facts | ({"warning": found.broken} if found.broken else {})


def index_row(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a finished video in the index."""
    return {
        "name": name,
        "page": f"{name}.html",
        "verdict": record["verdict"],
        "max_score": record["max_score"],
        "segments": len(record["segments"]),
        "seconds": record["video"]["seconds"],
    }


def failed_row(name: str, reason: str) -> dict[str, Any]:
    return {"name": name, "page": None, "verdict": reason, "max_score": None, "segments": None, "seconds": None}


def write_index(folder: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``index.html`` and ``index.csv`` with a row per video."""
    write_text(folder / "index.html", render("index.html.j2", title=title, rows=rows))
    header = ["name", "verdict", "max_score", "segments", "seconds"]
    write_csv(folder / "index.csv", header, [[row[key] for key in header] for row in rows])
