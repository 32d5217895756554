"""The results of detection: JSON, tables, a figure and a page for each video, and an index of a folder."""

import math
import os
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from clipfusionvad.engine.run_folder import BEST, LAST
from clipfusionvad.extraction.decode import VideoInfo
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_json, read_text, write_csv, write_json, write_text
from clipfusionvad.metrics.segments import Segment, Thresholds
from clipfusionvad.models.clip import TOY
from clipfusionvad.report.page import clock, render
from clipfusionvad.report.plots import CLASS_COLOURS, colour_number, save_figure
from clipfusionvad.tools.detect.config import CHUNK

# Name of a segment if the method does not distinguish classes.
ANOMALY = "anomaly"
CURVE_COLOUR, THRESHOLD_COLOUR, TRUTH_COLOUR = "#1f4e79", "#888888", "#444444"
DIGITS = 6
_SECONDS, _SEGMENTS, ANNOTATED = "_seconds", "_segments", "_annotated"
#: What follows the name of a video in the names of some of its results.
ENDINGS = (_SECONDS, _SEGMENTS, ANNOTATED)
#: How the names of the files beside a video's page end.
FILES = (".json", ".csv", f"{_SECONDS}.csv", f"{_SEGMENTS}.csv", ".png")
_NAV = re.compile(r'<nav class="pages">.*?</nav>', re.DOTALL)
_INDEX = ["name", "verdict", "max_score", "segments", "seconds", "confidence", "class_probability", "class_unsure"]


@dataclass(frozen=True)
class Detection:
    """The result of one video of n snippets: ``anomaly`` (n,) of the main branch, ``classes`` (n, C) or None.

    Snippet i has the frames bounds[i] … bounds[i + 1] - 1; ``times`` (frames + 1,) are the seconds of all frames and of
    the end. ``broken`` says why decoding stopped early, if it did. ``pictures`` are small JPEGs, one of every
    ``CHUNK`` frames; ``truth`` are the annotated intervals as in JSON, None where they are unknown.
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
    pictures: Sequence[bytes] = ()
    truth: Sequence[Mapping[str, Any]] | None = None

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

    def peaks(self) -> list[tuple[int, Segment | None]]:
        """Return the highest snippet of each segment (40 at most); without segments, of each third of the video."""
        starts, ends = self.bounds[:-1], self.bounds[1:]
        spans = [np.flatnonzero((starts >= one.start_frame) & (ends <= one.end_frame)) for one in self.segments]
        spans = spans or np.array_split(np.arange(len(starts)), min(3, len(starts)))
        peaks = [int(span[self.anomaly[span].argmax()]) for span in spans]
        highest = sorted(zip_longest(peaks, self.segments), key=lambda peak: -self.anomaly[peak[0]])[:40]
        return sorted(highest, key=itemgetter(0))

    def picture(self, snippet: int) -> str:
        """Return the picture nearest to the middle of a snippet in base64; nothing without pictures."""
        middle = int(self.bounds[snippet] + self.bounds[snippet + 1]) // 2
        return b64encode(self.pictures[middle // CHUNK]).decode() if self.pictures else ""

    def colour_of(self, segment: Segment, dark: bool = False) -> str:
        """Return the colour of a segment's class on light or on dark ground."""
        number = 1 if segment.label is None else self.labels.index(segment.label)
        return CLASS_COLOURS[colour_number(number)][dark]

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
    stem, seconds, own, model = str(folder / name), found.seconds, Path(name).name, Path(settings["checkpoint"])
    # Weights in the folder of a run are named after it.
    title = f"{own} · {model.parent.name + '/' if model.name in (BEST, LAST) else ''}{model.name}"
    verdict = max(found.segments, key=lambda segment: segment.confidence, default=None)
    record = {
        "video": asdict(found.info) | {"frames_read": found.frames, "seconds": round(float(seconds[-1]), DIGITS)},
        "warning": found.broken,
        "settings": dict(settings),
        "thresholds": asdict(found.thresholds),
        "verdict": name_of(verdict) if verdict else "normal",
        "max_score": float(found.anomaly.max()),
        "segments": [asdict(segment) for segment in found.segments],
        "truth": found.truth,
        "thumbnail": found.picture(int(found.anomaly.argmax())),
        "snippets": {
            "start": seconds[:-1].round(DIGITS).tolist(),
            "end": seconds[1:].round(DIGITS).tolist(),
            "anomaly": found.anomaly.tolist(),
            "classes": {label: column.tolist() for label, column in found.by_label.items()} or None,
        },
    }
    for table, ending in zip(found.tables(), ("", _SECONDS), strict=True):
        write_text(f"{stem}{ending}.csv", table.round(DIGITS).to_csv(lineterminator="\n"))
    header = [field.name for field in fields(Segment)]
    write_csv(f"{stem}{_SEGMENTS}.csv", header, [[*asdict(segment).values()] for segment in found.segments])
    draw_scores(Path(f"{stem}.png"), title, found)
    info, length = found.info, float(seconds[-1])
    facts = {"length": short_clock(length), "video": f"{info.width}×{info.height}, {info.fps:.6g} fps, {info.codec}"}
    middles = ((seconds[:-1] + seconds[1:]) / 2).round(3).tolist()
    page = render(
        "detection.html.j2",
        title=title,
        files=[f"{own}{ending}" for ending in FILES],
        video=video,
        seconds=middles,
        anomaly=found.anomaly.astype(np.float64).round(4).tolist(),
        classes={label: np.round(column, 3).tolist() for label, column in found.by_label.items()},
        segments=[
            asdict(segment) | {"label": name_of(segment), "line": class_line(segment)} for segment in found.segments
        ],
        moments=[
            {"time": middles[at], "score": found.anomaly[at], "picture": found.picture(at)}
            | {"label": segment and name_of(segment)}
            for at, segment in (found.peaks() if found.pictures else ())
        ],
        truth=found.truth,
        how=_how(settings, found),
        threshold=found.thresholds.high,
        duration=length,
        facts=facts | ({"warning": found.broken} if found.broken else {}),
    )
    write_text(f"{stem}.html", page)
    write_json(f"{stem}.json", record)
    return record


def _how(settings: Mapping[str, Any], found: Detection) -> dict[str, str]:
    """Return what made the scores, for a reader of the page."""
    limits, sigma, clips = found.thresholds, settings.get("smooth"), ", ".join(dict.fromkeys(settings["clip"].values()))
    unknown = found.truth is None and "annotations" in settings
    return {
        "model": f"{settings['checkpoint']} ({settings['method']}, trained on {settings['dataset']})",
        "CLIP": clips + ": random weights, so scores mean nothing" * (clips == TOY),
        "features": settings["features"],
        "segments": f"start at {limits.high:g} and last while scores reach {limits.low:g}, {limits.min_seconds:g} s or "
        f"longer; gaps up to {limits.merge_seconds:g} s are merged",
        "seconds": f"by {found.info.times}",
        **({"smoothed over time": f"σ = {sigma:g} snippets"} if sigma else {}),
        **({"annotation": "does not name this video"} if unknown else {}),
    }


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the content of a finished video's JSON file; None if it is missing, damaged or something else."""
    try:
        content = read_json(path, "detection")
        row = index_row("", content)
        numbers = [row[key] for key in ("max_score", "seconds", "confidence", "class_probability")]
        complete = all(number is None or 0 <= number < math.inf for number in numbers) and isinstance(row["line"], str)
    except (UserError, KeyError, TypeError, ValueError):
        return None
    return content if complete and {"settings", "snippets", "thresholds"} <= content.keys() else None


def name_of(segment: Segment) -> str:
    return segment.label or ANOMALY


def class_line(segment: Segment) -> str:
    """Return a segment's class with its probability, ``Fighting 0.12 (unsure)``, as far as they are known."""
    unsure = " (unsure)" if segment.class_unsure else ""
    return ANOMALY if segment.label is None else f"{segment.label} {segment.class_probability:.2f}{unsure}"


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
    count = Counter(segment.label for segment in found.segments)
    for segment in sorted(found.segments, key=lambda segment: -segment.confidence):
        look: dict[str, Any] = {"color": found.colour_of(segment), "alpha": 0.35, "lw": 0}
        axis.axvspan(segment.start, segment.end, **look)
        label = f"class {class_line(segment)}, " if segment.label else ""
        label += f"anomaly score {segment.confidence:.2f}"
        label += f" (best of {count[segment.label]})" if count[segment.label] > 1 else ""
        patches.setdefault(name_of(segment), Patch(**look, label=label))
    for one in found.truth or ():
        axis.axvspan(one["start"], one["end"], 0, 0.06, color=TRUTH_COLOUR, lw=0)
        label = f"annotated: {one['label']}"
        patches[label] = Patch(color=TRUTH_COLOUR, label=label)
    if patches:
        figure.legend(handles=list(patches.values()), loc="outside lower left", ncols=3, frameon=False)
    title += " · decoding stopped early" if found.broken else ""
    axis.set_title(title, loc="left", fontsize=11)
    axis.set(xlim=(0, seconds[-1]), ylim=(-0.02, 1.02), xlabel="minutes:seconds", ylabel="anomaly score")
    axis.xaxis.set_major_formatter(lambda value, _: short_clock(value))
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def index_row(name: str, record: Mapping[str, Any] | None = None, error: str = "") -> dict[str, Any]:
    """Return the row of a video in the index: of its record, or of the error that it failed with.

    ``line`` is the class of the segment with the highest confidence; confidence and class are those of that segment.
    """
    if record is None:
        return dict.fromkeys([*_INDEX, "page", "thumbnail"]) | {"name": name, "verdict": error, "line": error}
    segments = [Segment(**segment) for segment in record["segments"]]
    best = max(segments, key=lambda segment: segment.confidence, default=None)
    row = {key: getattr(best, key, None) for key in _INDEX} | {"name": name, "page": f"{name}.html"}
    row |= {key: record[key] for key in ("verdict", "max_score", "thumbnail")} | {"segments": len(segments)}
    return row | {"seconds": record["video"]["seconds"], "line": class_line(best) if best else record["verdict"]}


def write_index(folder: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``index.html`` and ``index.csv`` with a row per video, and link the pages of the videos with each other."""
    write_text(folder / "index.html", render("index.html.j2", title=title, rows=rows))
    write_csv(folder / "index.csv", _INDEX, [[row[key] for key in _INDEX] for row in rows])
    pages = [row["page"] for row in rows if row["page"] and (folder / row["page"]).is_file()]
    for at, page in enumerate(pages):
        near = {"all videos": "index.html", "previous": pages[at - 1] if at else None, "next": (*pages, None)[at + 1]}
        links = {title: os.path.relpath(other, os.path.dirname(page)) for title, other in near.items() if other}
        text = read_text(folder / page, "page")
        if (place := _NAV.search(text)) and (nav := render("links.html.j2", links=links)) != place[0]:
            write_text(folder / page, text[: place.start()] + nav + text[place.end() :])
