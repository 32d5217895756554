"""Results of a made-up test, and pages of them."""

from pathlib import Path

import numpy as np

from clipfusionvad.data.lists import Entry
from clipfusionvad.data.truth import Truth, frames_from_segments
from clipfusionvad.datasets import UCF
from clipfusionvad.engine.evaluator import VideoDataset, VideoScores, evaluate, evaluate_classes
from clipfusionvad.io.files import write_json, write_text
from clipfusionvad.report.page import render
from clipfusionvad.report.results import TEST_SCORES
from clipfusionvad.report.scores import save_scores

HOSTILE = "<img src=x onerror=alert(1)>\"'{{7*7}}"
OPTIONS = {"method": "vadclip", "dataset": "ucf", "protocol": "paper", "model_path": "</script><script>alert(2)"}


def made_test(videos=8, classes=True, truth=True, dataset=UCF, seed=0):
    """Scores and videos: the even ones hold an abnormal stretch of one or two classes, which the scores half see."""
    rng, labels = np.random.default_rng(seed), dataset.labels
    entries, scores, known = [], [], Truth([], [], [])
    for index in range(videos):
        snippets = int(rng.integers(3, 60))
        label = labels[0] if index % 2 else labels[1 + index // 2 % (len(labels) - 1)]
        name = HOSTILE if index == 0 else f"v{index}.a__#1_{label}"
        entries.append(Entry(Path(f"{name}__5.npy"), label, index + 2))
        frames = 16 * snippets + int(rng.integers(-5, 12))
        spans = [] if index % 2 else [(frames // 3, frames // 2), (frames // 2 - 2, 2 * frames // 3)]
        known.segments.append(spans or [(0, frames)])
        known.labels.append([label, labels[-1]] if spans else ["A"])
        known.frames.append(frames_from_segments(spans, frames))
        seen = np.array([chunk.mean() for chunk in np.array_split(known.frames[-1], snippets)])
        # Few levels, so that many scores are equal.
        anomaly = np.round(np.clip(0.5 * seen + 0.6 * rng.random((2, snippets)), 0, 1), 2).astype(np.float32)
        found = rng.dirichlet(np.ones(len(labels)), snippets).astype(np.float32)
        scores.append(VideoScores(anomaly if classes else anomaly[:1], found if classes else None))
    return scores, VideoDataset(entries, dataset, 4, known if truth else None)


def write_test(folder, *test, options=OPTIONS):
    """The folder that a test with --output-dir leaves, its page aside."""
    scores, videos = test or made_test()
    metrics = evaluate(scores, videos) | evaluate_classes(scores, videos)
    write_json(folder / "test_metrics.json", metrics)
    save_scores(folder / TEST_SCORES, scores, videos, options)
    return metrics


def detection_page(**changed):
    """The page of a video of three snippets."""
    values = {"title": HOSTILE, "video": "a b/#1 100%?.mp4", "fps": 30.0, "seconds": [0.27, 0.8, 1.33]}
    values |= {"anomaly": [0.1, 0.9, float("nan")], "threshold": 0.5}
    values |= {"classes": {"normal": [0.5, 0.2, 0.3], "</script>" + HOSTILE: [0.5, 0.8, 0.7]}}
    values |= {"segments": [{"start": 0.5, "end": 1.1, "label": "</script>" + HOSTILE, "confidence": 0.9}]}
    values |= {"how": {"model": HOSTILE}, "moments": [], "truth": None} | changed
    values["segments"] = [{"line": segment["label"]} | segment for segment in values["segments"]]
    return render("detection.html.j2", **values)


def index_page(title, *rows):
    """The index of videos: each row of what is not as below; without a score it is one that failed."""
    plain = {"page": "detection.html", "max_score": 0.5, "segments": 1, "seconds": 3.0, "confidence": 0.4}
    failed = dict.fromkeys([*plain, "thumbnail"])
    rows = [failed | (plain if row.get("max_score", 1) is not None else {}) | row for row in rows]
    return render("index.html.j2", title=title, rows=rows)


def write_training(folder, steps=900):
    """The logs of a training run."""
    rng = np.random.default_rng(1)
    rows = [f"{at},{at // 300},{2 / at + 0.1 * rng.random():.5f},{1 / at:.5f},0.001" for at in range(1, steps)]
    write_text(folder / "losses.csv", "step,epoch,loss,coarse,lr\n" + "\n".join(rows) + "\n")
    rows = [f"{step},0,{0.5 + step / 2000},{0.3 + step / 3000},{step / 100}" for step in range(300, steps + 1, 300)]
    write_text(folder / "metrics.csv", "step,epoch,auc1,ap1,map_average\n" + "\n".join(rows) + "\n")
    write_text(folder / "options.yaml", "method: vadclip\ndataset: ucf\nprotocol: paper\nseed: 5\n")
    about = {"command": ["ucf_train.py", "a b"], "packages": {"torch": "2"}, "gpu": None}
    write_json(folder / "environment.json", about)
