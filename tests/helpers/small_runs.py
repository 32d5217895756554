"""Folders of runs, as trainings leave them, and the table command on them."""

import json

import numpy as np
import yaml
from small_report import made_test
from tiny import quietly, strings

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.engine.evaluator import VideoScores, evaluate, evaluate_classes
from clipfusionvad.report.scores import save_scores

OPTIONS = {"method": "vadclip", "dataset": "ucf", "protocol": "paper", "lr": 0.1}


def table(*argv):
    return quietly(package_main, strings(["table"], argv))


def write_run(folder, seed, noise=0.0, sees=0.0, **options):
    """The folder of a run, whose scores are those of ``made_test`` with noise of the seed; ``sees`` adds the truth."""
    scores, videos = made_test(24)
    rng = np.random.default_rng([seed, 7])
    changed = []
    for index, video in enumerate(scores):
        edges = np.linspace(0, len(videos.truth.frames[index]), video.anomaly.shape[1] + 1).astype(int)
        truth = np.array([videos.truth.frames[index][a:b].mean() for a, b in zip(edges, edges[1:], strict=False)])
        anomaly = video.anomaly + noise * rng.normal(size=video.anomaly.shape) + sees * truth
        changed.append(VideoScores(anomaly.astype(np.float32), video.classes))
    options = OPTIONS | {"seed": seed, "output_dir": str(folder)} | options
    metrics = evaluate(changed, videos) | evaluate_classes(changed, videos)
    last = evaluate(scores, videos)
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"last": last, "best": metrics}))
    (folder / "options.yaml").write_text(yaml.safe_dump(options))
    save_scores(folder / "scores.npz", changed, videos, options)
    return metrics


def best(setting, metric):
    """A metric of each seed's best weights."""
    files = [setting / f"seed{seed}" / "metrics.json" for seed in (1, 2, 3)]
    return np.array([json.loads(file.read_text())["best"][metric] for file in files])


def two_settings(folder):
    """Fill a folder with two settings of three seeds each, the second of which knows some of the truth."""
    for name, sees in {"full": 0.0, "better": 0.6}.items():
        for seed in (1, 2, 3):
            write_run(folder / name / f"seed{seed}", seed, 0.1, sees, lr=sees)
    return folder
