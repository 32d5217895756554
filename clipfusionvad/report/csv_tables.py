"""A test's scores as CSV files beside it: a row per video, a row per snippet."""

import math
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfusionvad.io.files import write_text
from clipfusionvad.metrics import count_frames, snippet_metrics
from clipfusionvad.report.curves import pool, video_error
from clipfusionvad.report.results import RUN_SCORES, Run
from clipfusionvad.report.scores import TestResult

if TYPE_CHECKING:
    import pandas as pd

VIDEOS, SNIPPETS = "videos.csv", "snippets.csv"


def write_tables(run: Run, snippets: bool = False) -> list[Path]:
    """Write a row per video, and with ``snippets`` a row per snippet, beside the scores; return the paths.

    ``test_videos.csv`` lies beside ``test_scores.npz``. Raises ``UserError`` for a run without scores.
    """
    tested, scores = run.known_test, run.scores or run.folder / RUN_SCORES
    videos, rows = (scores.with_name(scores.name.replace(RUN_SCORES, name)) for name in (VIDEOS, SNIPPETS))
    tables = {videos: video_table(tested).round(6)}
    # The snippets of earlier scores are replaced as well.
    if snippets or rows.is_file():
        tables[rows] = snippet_table(tested)
    for path, table in tables.items():
        write_text(path, table.to_csv(index=False, lineterminator="\n"))
    return list(tables)


def video_table(tested: TestResult) -> "pd.DataFrame":
    """Return a row for each test video: ``video``, ``label``, ``snippets``, ``frames``, ``seconds``.

    Of each branch n also ``peakn``, and over the frames the mean ``meann``, ``errorn`` (``video_error``) and ``aucn``,
    NaN where the truth is unknown, and AUC where all frames are of one kind.
    """
    import pandas as pd

    rows, videos = list[dict[str, Any]](), tested.videos
    for index, (entry, found) in enumerate(zip(videos.entries, tested.scores, strict=True)):
        frames = np.diff(tested.edges(index))
        row = {"video": entry.video, "label": entry.label, "snippets": len(frames), "frames": frames.sum()}
        row["seconds"] = frames.sum() / videos.dataset.fps
        for n, anomaly in enumerate(found.anomaly, start=1):
            # The mean score is the error of a video that is normal throughout.
            row |= {f"peak{n}": float(anomaly.max()), f"mean{n}": video_error(anomaly, 0 * frames, frames)}
            row |= {f"error{n}": math.nan, f"auc{n}": math.nan}
            if videos.truth:
                positives, _ = count_frames(videos.truth.frames[index], len(frames), videos.frames_per_snippet)
                row[f"error{n}"] = video_error(anomaly, positives, frames)
                row[f"auc{n}"] = snippet_metrics(anomaly, positives, frames)["auc"]
        rows.append(row)
    return pd.DataFrame(rows)


def snippet_table(tested: TestResult) -> "pd.DataFrame":
    """Return a row for each snippet: its frames and seconds [start, end), scores of the branches, class probabilities.

    Where the truth is known also ``abnormal_frames`` and ``truth``, the classes annotated in the snippet.
    """
    import pandas as pd

    labels, parts = tested.videos.dataset.labels, []
    for index, (entry, found) in enumerate(zip(tested.videos.entries, tested.scores, strict=True)):
        edges = tested.edges(index)
        columns: dict[str, Any] = {"video": entry.video, "snippet": np.arange(len(edges) - 1)}
        for unit, places in (("frame", edges), ("seconds", np.round(edges / tested.videos.dataset.fps, 3))):
            columns |= {f"start_{unit}": places[:-1], f"end_{unit}": places[1:]}
        columns |= {f"score{n}": anomaly for n, anomaly in enumerate(found.anomaly, start=1)}
        if found.classes is not None:
            # A class may be named as another column.
            taken = {*columns, "abnormal_frames", "truth"}
            names = (f"class {label}" if label in taken else label for label in labels)
            columns |= dict(zip(names, found.classes.T, strict=True))
        parts.append(pd.DataFrame(columns))
    table = pd.concat(parts, ignore_index=True)
    if tested.videos.truth:
        pooled = pool(tested.scores, tested.videos)
        named = [", ".join(compress(labels[1:], own)) for own in (pooled.truth[:, 1:] > 0).tolist()]
        table["abnormal_frames"] = pooled.positives
        table["truth"] = np.where((pooled.positives == 0) & (np.array(named) == ""), labels[0], named)
    return table
