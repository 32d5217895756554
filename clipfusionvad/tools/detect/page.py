"""What is written of a detection: JSON, tables, a picture and a page for each video, and an index of a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
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

# What a segment is called where the method does not tell classes apart.
ANOMALY = "anomaly"
CURVE_COLOUR, THRESHOLD_COLOUR, ONE_CLASS_COLOUR = "#1f4e79", "#888888", "#c8452d"
DIGITS = 6


def write_detection(folder: Path, name: str, found: Detection, settings: Mapping[str, Any], video: str | None) -> None:
    """Write every file of one video, ``NAME.json`` last: its presence says that the others are complete.

    ``settings`` say how it was made; ``video`` is where the page finds the video, relative to itself.
    """
    stem = folder / name
    write_snippets(stem.with_name(f"{stem.name}.csv"), found)
    write_seconds(stem.with_name(f"{stem.name}_seconds.csv"), found)
    write_segments(stem.with_name(f"{stem.name}_segments.csv"), found.segments)
    draw_timeline(stem.with_name(f"{stem.name}.png"), stem.name, found)
    write_text(stem.with_name(f"{stem.name}.html"), detection_page(stem.name, found, video))
    write_json(stem.with_name(f"{stem.name}.json"), describe(found, settings))


def describe(found: Detection, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A detection in plain values."""
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


def read_description(path: Path) -> dict[str, Any] | None:
    """What ``describe`` gave of a video that is finished; None where there is none."""
    if not path.is_file():
        return None
    try:
        content = json.loads(read_text(path, "detection"))
    except (ValueError, RecursionError, UserError):
        return None
    return content if _is_description(content) else None


def _is_description(content: Any) -> bool:
    """Whether it is what ``describe`` gave, as far as an index needs it."""
    if not isinstance(content, dict) or not {"settings", "snippets", "thresholds"} <= content.keys():
        return False
    video, numbers = content.get("video"), [content.get("max_score")]
    numbers.append(video.get("seconds") if isinstance(video, dict) else None)
    if not all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers):
        return False
    return isinstance(content.get("verdict"), str) and isinstance(content.get("segments"), list)


def name_of(segment: Segment) -> str:
    return segment.label or ANOMALY


def _by_label(found: Detection) -> dict[str, list[float]]:
    columns = [] if found.classes is None else found.classes.T
    return {label: column.tolist() for label, column in zip(found.labels, columns, strict=True)}


def write_snippets(path: Path, found: Detection) -> None:
    """A row per snippet: its bounds in seconds, its score, its class probabilities."""
    seconds = found.bounds / found.info.fps
    bounds = zip(seconds[:-1].round(DIGITS), seconds[1:].round(DIGITS), strict=True)
    rows = [
        [index, *pair, *scores]
        for index, (pair, scores) in enumerate(zip(bounds, _columns(found.anomaly, found.classes), strict=True))
    ]
    write_csv(path, ["snippet", "start", "end", "anomaly", *_labels(found)], rows)


def write_seconds(path: Path, found: Detection) -> None:
    """A row per second: the mean over its frames."""
    second, anomaly, classes = found.by_second()
    rows = [[index, *scores] for index, scores in zip(second, _columns(anomaly, classes), strict=True)]
    write_csv(path, ["second", "anomaly", *_labels(found)], rows)


def write_segments(path: Path, segments: Sequence[Segment]) -> None:
    header = list(Segment.__dataclass_fields__)
    write_csv(path, header, [list(asdict(segment).values()) for segment in segments])


def _columns(anomaly: np.ndarray, classes: np.ndarray | None) -> np.ndarray:
    columns = [anomaly[:, None]] if classes is None else [anomaly[:, None], classes]
    return np.concatenate(columns, axis=1).astype(np.float64).round(DIGITS)


def _labels(found: Detection) -> Sequence[str]:
    return () if found.classes is None else found.labels


def draw_timeline(path: Path, title: str, found: Detection) -> None:
    """The anomaly score over time, the thresholds, and the segments in the colour of their class."""
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
        f"{title}{' · decoding broke off' if found.broken else ''}", loc="left", fontsize=11, parse_math=False
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
    """1:02.5 or 2:01:02.5; no tenth where there is none."""
    tenths = round(seconds * 10)
    hours, minutes, rest = tenths // 36000, tenths // 600 % 60, tenths % 600
    text = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{text}:{rest // 10:02d}" + (f".{rest % 10}" if rest % 10 else "")


def detection_page(title: str, found: Detection, video: str | None) -> str:
    """The page of one video: the video and its curves side by side in time."""
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


def index_row(name: str, description: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a finished video in the index."""
    return {
        "name": name,
        "page": f"{name}.html",
        "verdict": description["verdict"],
        "max_score": description["max_score"],
        "segments": len(description["segments"]),
        "seconds": description["video"]["seconds"],
    }


def failed_row(name: str, reason: str) -> dict[str, Any]:
    return {"name": name, "page": None, "verdict": reason, "max_score": None, "segments": None, "seconds": None}


def write_index(folder: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """``index.html`` and ``index.csv``: a row per video."""
    write_text(folder / "index.html", render("index.html.j2", title=title, rows=rows))
    header = ["name", "verdict", "max_score", "segments", "seconds"]
    write_csv(folder / "index.csv", header, [[row[key] for key in header] for row in rows])
