"""A test's scores as CSV files beside it: a row per video, a row per snippet."""

import math
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfusionvad.io.files import write_text
from clipfusionvad.metrics import snippet_metrics
from clipfusionvad.report.curves import PooledScores, pool, video_error
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
    pooled = pool(tested.scores, tested.videos) if tested.videos.truth else None
    tables = {VIDEOS: video_table(tested, pooled).round(6)}
    if snippets:
        tables[SNIPPETS] = snippet_table(tested, pooled)
    paths = [scores.with_name(scores.name.replace(RUN_SCORES, name)) for name in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        write_text(path, table.to_csv(index=False, lineterminator="\n"))
    return paths


def video_table(tested: TestResult, pooled: PooledScores | None) -> "pd.DataFrame":
    """Return a row for each test video: ``video``, ``label``, ``snippets``, ``frames``, ``seconds``.

    Of each branch n also ``peakn``, and over the frames the mean ``meann``, ``errorn`` (``video_error``) and ``aucn``,
    NaN where the truth is unknown (``pooled`` None), and AUC where all frames are of one kind.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    ends = np.cumsum([one.anomaly.shape[1] for one in tested.scores])
    for index, (entry, found, end) in enumerate(zip(tested.videos.entries, tested.scores, ends, strict=True)):
        edges = tested.edges(index)
        frames, length = np.diff(edges), int(edges[-1])
        row = {"video": entry.video, "label": entry.label, "snippets": len(frames), "frames": length}
        row["seconds"] = length / tested.videos.dataset.fps
        for branch, anomaly in enumerate(found.anomaly, start=1):
            # The mean score is the error of a video that is normal throughout.
            row |= {f"peak{branch}": float(anomaly.max()), f"mean{branch}": video_error(anomaly, 0 * frames, frames)}
            row |= {f"error{branch}": math.nan, f"auc{branch}": math.nan}
            if pooled:
                positives = pooled.positives[end - len(frames) : end]
                row[f"error{branch}"] = video_error(anomaly, positives, frames)
                row[f"auc{branch}"] = snippet_metrics(anomaly, positives, frames)["auc"]
        rows.append(row)
    return pd.DataFrame(rows)


def snippet_table(tested: TestResult, pooled: PooledScores | None) -> "pd.DataFrame":
    """Return a row for each snippet: its frames and seconds [start, end), scores of the branches, class probabilities.

    With ``pooled`` also ``abnormal_frames`` and ``truth``, the classes annotated in the snippet.
    """
    import pandas as pd

    labels, parts = tested.videos.dataset.labels, []
    for index, (entry, found) in enumerate(zip(tested.videos.entries, tested.scores, strict=True)):
        edges = tested.edges(index)
        seconds = np.round(edges / tested.videos.dataset.fps, 3)
        columns: dict[str, Any] = {"video": entry.video, "snippet": np.arange(len(edges) - 1)}
        columns |= {"start_frame": edges[:-1], "end_frame": edges[1:]}
        columns |= {"start_seconds": seconds[:-1], "end_seconds": seconds[1:]}
        columns |= {f"score{branch}": anomaly for branch, anomaly in enumerate(found.anomaly, start=1)}
        if found.classes is not None:
            columns |= dict(zip(labels, found.classes.T, strict=True))
        parts.append(pd.DataFrame(columns))
    table = pd.concat(parts, ignore_index=True)
    if pooled:
        named = [", ".join(compress(labels[1:], own)) for own in (pooled.truth[:, 1:] > 0).tolist()]
        table["abnormal_frames"] = pooled.positives
        table["truth"] = np.where((pooled.positives == 0) & (np.array(named) == ""), labels[0], named)
    return table
