"""The results of detection: JSON, tables, a figure and a page for each video, and an index of a folder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from clipfusionvad.extraction.decode import VideoInfo
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_json, write_csv, write_json, write_text
from clipfusionvad.metrics.segments import Segment, Thresholds
from clipfusionvad.report.page import clock, render
from clipfusionvad.report.plots import save_figure

# Name of a segment if the method does not distinguish classes.
ANOMALY = "anomaly"
CURVE_COLOUR, THRESHOLD_COLOUR, ONE_CLASS_COLOUR = "#1f4e79", "#888888", "#c8452d"
DIGITS = 6
_INDEX = ["name", "verdict", "max_score", "segments", "seconds"]


@dataclass(frozen=True)
class Detection:
    """The result of one video of n snippets: ``anomaly`` (n,) of the main branch, ``classes`` (n, C) or None.

    Snippet i has the frames bounds[i] … bounds[i + 1] - 1; ``times`` (frames + 1,) are the seconds of all frames and of
    the end. ``broken`` says why decoding stopped early, if it did.
    """

    info: VideoInfo
    anomaly: np.ndarray
    classes: np.ndarray | None
    bounds: np.ndarray
    times: np.ndarray
    labels: tuple[str, ...]
    thresholds: Thresholds
    segments: Sequence[Segment]
    broken: str | None = None

    @property
    def frames(self) -> int:
        return int(self.bounds[-1])

    @property
    def seconds(self) -> np.ndarray:
        """The bounds (n + 1,) of the snippets in seconds."""
        return self.times[self.bounds]

    @property
    def by_label(self) -> dict[str, np.ndarray]:
        """The class probabilities (n,) by label; empty for a method without classes."""
        return {} if self.classes is None else dict(zip(self.labels, self.classes.T, strict=True))

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return scores with a row per snippet, and per second that has frames: means over those frames."""
        labels = ["anomaly", *self.by_label]
        scores = np.stack([self.anomaly, *self.by_label.values()], axis=1).astype(np.float64)
        seconds = self.seconds
        rows = np.column_stack([seconds[:-1], seconds[1:], scores])
        snippets = pd.DataFrame(rows, columns=["start", "end", *labels]).rename_axis("snippet")
        of_frames = pd.DataFrame(np.repeat(scores, np.diff(self.bounds), axis=0), columns=labels)
        second = self.times[:-1].astype(np.int64)
        return snippets, of_frames.groupby(second).mean().rename_axis("second")


def write_detection(
    folder: Path, name: str, found: Detection, settings: Mapping[str, Any], video: str | None
) -> dict[str, Any]:
    """Write all files of one video, ``NAME.json`` last: if it exists, the others are complete. Return its content.

    ``settings`` describe how they were made; ``video`` is the path of the video relative to the page.
    """
    stem, title, seconds = str(folder / name), Path(name).name, found.seconds
    verdict = max(found.segments, key=lambda segment: segment.confidence, default=None)
    record = {
        "video": asdict(found.info) | {"frames_read": found.frames, "seconds": round(float(seconds[-1]), DIGITS)},
        "warning": found.broken,
        "settings": dict(settings),
        "thresholds": asdict(found.thresholds),
        "verdict": name_of(verdict) if verdict else "normal",
        "max_score": float(found.anomaly.max()),
        "segments": [asdict(segment) for segment in found.segments],
        "snippets": {
            "start": seconds[:-1].round(DIGITS).tolist(),
            "end": seconds[1:].round(DIGITS).tolist(),
            "anomaly": found.anomaly.tolist(),
            "classes": {label: column.tolist() for label, column in found.by_label.items()} or None,
        },
    }
    for table, ending in zip(found.tables(), ("", "_seconds"), strict=True):
        write_text(f"{stem}{ending}.csv", table.round(DIGITS).to_csv(lineterminator="\n"))
    header = [field.name for field in fields(Segment)]
    write_csv(f"{stem}_segments.csv", header, [[*asdict(segment).values()] for segment in found.segments])
    draw_scores(Path(f"{stem}.png"), title, found)
    info, length = found.info, float(seconds[-1])
    facts = {"length": short_clock(length), "video": f"{info.width}×{info.height}, {info.fps:.6g} fps, {info.codec}"}
    facts |= {"times by": info.times}
    if sigma := settings.get("smooth"):
        facts |= {"smoothed over time": f"σ = {sigma:g} snippets"}
    page = render(
        "detection.html.j2",
        title=title,
        video=video,
        seconds=((seconds[:-1] + seconds[1:]) / 2).round(3).tolist(),
        anomaly=found.anomaly.astype(np.float64).round(4).tolist(),
        classes={label: np.round(column, 4).tolist() for label, column in found.by_label.items()},
        segments=[asdict(segment) | {"label": name_of(segment)} for segment in found.segments],
        threshold=found.thresholds.high,
        duration=length,
        facts=facts | ({"warning": found.broken} if found.broken else {}),
    )
    write_text(f"{stem}.html", page)
    write_json(f"{stem}.json", record)
    return record


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the content of a finished video's JSON file; None if it is missing, damaged or something else."""
    try:
        content = read_json(path, "detection")
        # The index needs these.
        numbers = content["max_score"], content["video"]["seconds"]
        complete = isinstance(content["verdict"], str) and isinstance(content["segments"], list)
        complete &= all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers)
    except (UserError, KeyError, TypeError):
        return None
    return content if complete and {"settings", "snippets", "thresholds"} <= content.keys() else None


def name_of(segment: Segment) -> str:
    return segment.label or ANOMALY


def short_clock(seconds: float) -> str:
    """Return 1:02.5 or 2:01:02.5; a tenth of 0 is left out."""
    return clock(seconds).removesuffix(".0")


def draw_scores(path: Path, title: str, found: Detection) -> None:
    """Draw the anomaly score over time, the thresholds, and the segments in the colours of their classes."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    axis = figure.subplots()
    seconds = found.seconds
    axis.stairs(found.anomaly, seconds, color=CURVE_COLOUR, lw=1.6, baseline=None)
    for value, style in ((found.thresholds.high, "--"), (found.thresholds.low, ":")):
        axis.axhline(value, color=THRESHOLD_COLOUR, lw=1, ls=style)
    patches: dict[str, Patch] = {}
    for segment in found.segments:
        colour: Any = ONE_CLASS_COLOUR
        if segment.label is not None:
            colour = colormaps["tab20"](found.labels.index(segment.label) % 20)
        axis.axvspan(segment.start, segment.end, color=colour, alpha=0.35, lw=0)
        patches[name_of(segment)] = Patch(color=colour, alpha=0.35, lw=0, label=name_of(segment))
    if patches:
        figure.legend(handles=list(patches.values()), loc="outside right upper", frameon=False)
    title += " · decoding stopped early" if found.broken else ""
    axis.set_title(title, loc="left", fontsize=11)
    axis.set(xlim=(0, seconds[-1]), ylim=(-0.02, 1.02), xlabel="minutes:seconds", ylabel="anomaly probability")
    axis.xaxis.set_major_formatter(lambda value, _: short_clock(value))
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def index_row(name: str, record: Mapping[str, Any] | None = None, error: str = "") -> dict[str, Any]:
    """Return the row of a video in the index: of its record, or of the error that it failed with."""
    if record is None:
        return dict.fromkeys([*_INDEX, "page"]) | {"name": name, "verdict": error}
    found = {"segments": len(record["segments"]), "seconds": record["video"]["seconds"], "page": f"{name}.html"}
    return {"name": name, "verdict": record["verdict"], "max_score": record["max_score"]} | found


def write_index(folder: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``index.html`` and ``index.csv`` with a row per video."""
    write_text(folder / "index.html", render("index.html.j2", title=title, rows=rows))
    write_csv(folder / "index.csv", _INDEX, [[row[key] for key in _INDEX] for row in rows])
