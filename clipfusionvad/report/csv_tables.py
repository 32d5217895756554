"""A test's scores as CSV files beside it: a row per video, a row per snippet."""

from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfusionvad.engine.run_folder import DATA, LOSSES, METRICS
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import write_text
from clipfusionvad.metrics import snippet_metrics
from clipfusionvad.report.curves import PooledScores, pool, video_error
from clipfusionvad.report.results import RUN_SCORES, Run
from clipfusionvad.report.scores import TestResult

if TYPE_CHECKING:
    import pandas as pd

VIDEOS, SNIPPETS = "videos.csv", "snippets.csv"


# Files of a run or a test that a reader of its page may want.
_FILES = (VIDEOS, SNIPPETS, RUN_SCORES, METRICS, DATA)


def _beside(scores: Path, name: str) -> Path:
    """Return the path of another file of the same test: ``test_videos.csv`` beside ``test_scores.npz``."""
    return scores.with_name(scores.name.replace(RUN_SCORES, name))


def result_files(run: Run) -> list[Path]:
    """Return the files to download that lie in a run's or a test's folder."""
    paths = [_beside(run.scores or run.folder / RUN_SCORES, name) for name in _FILES] + [run.folder / LOSSES]
    return [path for path in paths if path.is_file()]


def write_tables(run: Run, snippets: bool = False) -> list[Path]:
    """Write a row per video, and with ``snippets`` a row per snippet; return the paths."""
    if not (run.scores and run.tested):
        raise UserError(
            f"{run.folder} holds no {RUN_SCORES}: test its model into a folder (--output-dir) and give that"
        )
    pooled = pool(run.tested.scores, run.tested.videos) if run.tested.videos.truth else None
    texts = {VIDEOS: video_table(run.tested, pooled).to_csv(index=False, float_format="%.6f", lineterminator="\n")}
    if snippets:
        texts[SNIPPETS] = snippet_table(run.tested, pooled).to_csv(index=False, lineterminator="\n")
    paths = [_beside(run.scores, name) for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_text(path, text)
    return paths


def video_table(tested: TestResult, pooled: PooledScores | None) -> "pd.DataFrame":
    """Return a row for each test video: ``video``, ``label``, ``snippets``, ``frames``, ``seconds``.

    Of each branch n also ``peakn``, and over its frames the mean score ``meann``, ``errorn`` (``video_error``) and
    ``aucn``. The last two are NaN where the truth is unknown (``pooled`` None), AUC also where all frames are of one
    kind.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    start = 0
    for index, (entry, found) in enumerate(zip(tested.videos.entries, tested.scores, strict=True)):
        edges, snippets = tested.edges(index), found.anomaly.shape[1]
        frames, length = np.diff(edges), int(edges[-1])
        row = {"video": entry.video, "label": entry.label, "snippets": snippets, "frames": length}
        row["seconds"] = length / tested.videos.dataset.fps
        for branch, anomaly in enumerate(found.anomaly, start=1):
            # The mean score is the error of a video that is normal throughout.
            row |= {f"peak{branch}": float(anomaly.max()), f"mean{branch}": video_error(anomaly, 0 * frames, frames)}
            error = auc = float("nan")
            if pooled:
                positives = pooled.positives[start : start + snippets]
                error = video_error(anomaly, positives, frames)
                auc = snippet_metrics(anomaly, positives, frames)["auc"]
            row |= {f"error{branch}": error, f"auc{branch}": auc}
        rows.append(row)
        start += snippets
    return pd.DataFrame(rows)


def snippet_table(tested: TestResult, pooled: PooledScores | None) -> "pd.DataFrame":
    """Return a row for each snippet: its frames and seconds [start, end), scores of the branches, class probabilities.

    With ``pooled`` also ``abnormal_frames`` and ``truth``, the classes annotated in the snippet.
    """
    import pandas as pd

    labels, fps = tested.videos.dataset.labels, tested.videos.dataset.fps
    edges = [tested.edges(index) for index in range(len(tested.scores))]
    counts = [len(own) - 1 for own in edges]
    start, end = (np.concatenate(parts) for parts in ([own[:-1] for own in edges], [own[1:] for own in edges]))
    columns: dict[str, Any] = {
        "video": np.repeat([entry.video for entry in tested.videos.entries], counts),
        "snippet": np.concatenate([np.arange(count) for count in counts]),
        "start_frame": start,
        "end_frame": end,
        "start_seconds": np.round(start / fps, 3),
        "end_seconds": np.round(end / fps, 3),
    }
    for branch, anomaly in enumerate(np.concatenate([one.anomaly for one in tested.scores], axis=1), start=1):
        columns[f"score{branch}"] = anomaly
    parts = [pd.DataFrame(columns)]
    classes = [one.classes for one in tested.scores if one.classes is not None]
    if classes:
        parts.append(pd.DataFrame(np.concatenate(classes), columns=labels))
    if pooled:
        annotated = (pooled.truth[:, 1:] > 0).tolist()
        named = [", ".join(compress(labels[1:], own)) for own in annotated]
        truth = [name or ("" if count else labels[0]) for name, count in zip(named, pooled.positives, strict=True)]
        parts.append(pd.DataFrame({"abnormal_frames": pooled.positives, "truth": truth}))
    return pd.concat(parts, axis=1)
