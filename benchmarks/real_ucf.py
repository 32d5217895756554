"""All methods on real features of UCF-Crime, by the public commands, against a logistic regression on bag labels.

    python benchmarks/real_ucf.py ucf_40seg_f16.npz Temporal_Anomaly_Annotation.txt lengths.csv [--output real_ucf]

docs/real-benchmark.md says where the features are, what the numbers are and how to read them. ``lengths.csv`` has the
columns video,frames. What has been done is skipped, so that the same command goes on after an interruption.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import yaml

from clipfusionvad.datasets import UCF
from clipfusionvad.engine.evaluator import VideoDataset, VideoScores
from clipfusionvad.io.files import write_text
from clipfusionvad.models import find_method, method_names
from clipfusionvad.report.formatting import Table, to_markdown
from clipfusionvad.report.results import RUN_SCORES
from clipfusionvad.report.scores import read_scores, save_scores
from clipfusionvad.tools.tables.compare import Resampler

RATES = (1e-4, 3e-4, 1e-3)
METRICS = ("auc1", "ap1", "ano_auc1")
#: The rows of a video; features; sizes of a text tower without weights of CLIP.
COMMON = {"clip": "toy", "embed_dim": 128, "visual_width": 128, "feature_dim": 400, "feature_norm": "standardize"}
COMMON |= {"segments": "equal", "max_epoch": 10, "batch_size": 64, "scheduler_milestones": [], "eval_every": 0}
WINDOWS, GRID = {"visual_length": 40}, {"num_segments": 8, "seg_length": 5, "emb_size": 64, "warmup_epochs": 1}
#: The transformer of UR-DMU and BN-WVAD, as wide as the features.
NARROW = {"hidden_width": 128, "mlp_width": 128, "head_width": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("lengths", type=Path)
    parser.add_argument("--output", type=Path, default=Path("real_ucf"))
    # IEF-VAD reads two streams; there is one. Zero-shot CLIP needs features of CLIP.
    single = [name for name in method_names() if name not in ("iefvad", "zeroshot")]
    parser.add_argument("--methods", nargs="+", choices=single, default=single)
    parser.add_argument("--protocols", nargs="+", choices=("paper", "clean"), default=["paper", "clean"])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    args = parser.parse_args()
    out = args.output
    prepare(args.features, [args.annotations, args.lengths], out)
    rates = {method: choose_rate(method, out) for method in args.methods}
    folders = {}
    for method, rate in rates.items():
        for protocol in args.protocols:
            cell = f"{method}_{protocol}"
            options = {**options_of(method), "protocol": protocol, "lr": rate}
            folders[cell] = sweep(out, cell, options, args.seeds, out / "runs")
    reference, controls = logistic_regression(out, sum(folders.values(), []))
    write_table(out, folders, rates, reference, controls)


def run(*words: object) -> None:
    print("$ python -m clipfusionvad", *words, flush=True)
    subprocess.run([sys.executable, "-m", "clipfusionvad", *map(str, words)], check=True)


def prepare(features: Path, annotations: Sequence[Path], out: Path) -> None:
    """Convert the features, and make lists, findings and packed features of them."""
    if not (out / "features").exists():
        run("convert-features", features, out / "features")
    if not (out / "list").exists():
        source = ["--features", out / "features", "--annotations", *annotations]
        run("lists", "--dataset", "ucf", *source, "--segments", "equal", "--output", out / "list")
        # Its findings, among them copies of test videos in the training list, are those of UCF-Crime: they stay.
        words = [sys.executable, "-m", "clipfusionvad", "doctor", *data_flags(out), "--json", out / "doctor.json"]
        subprocess.run([*map(str, words), "--segments", "equal", "--feature-dim", "400"], check=False)


def data_flags(out: Path) -> list[object]:
    lists = [out / "list" / UCF.list_files[name] for name in ("train", "test", "truth")]
    return ["--dataset", "ucf", "--train-list", lists[0], "--test-list", lists[1], "--gt-path", lists[2]]


def options_of(method: str) -> dict[str, object]:
    known = find_method(method).option_names()
    options = {"method": method, **COMMON, **(GRID if method == "anomalyclip" else WINDOWS)}
    options |= NARROW if "mlp_width" in known else {}
    return {key: value for key, value in options.items() if key != "embed_dim" or key in known}


def sweep(out: Path, cell: str, options: dict[str, object], seeds: int, folder: Path) -> list[Path]:
    """Train one setting with several seeds; return the folders of the runs."""
    path = out / f"{cell}.yaml"
    write_text(path, yaml.safe_dump({"method": options["method"], "cells": {cell: options}}))
    run("sweep", path, *data_flags(out), "--no-full", "--seeds", seeds, "--output-dir", folder)
    return sorted((folder / cell).glob("seed*"))


def choose_rate(method: str, out: Path) -> float:
    """Return the learning rate whose best epoch scores the held-out training videos best (``--protocol clean``)."""
    found = {}
    for rate in RATES:
        cell = f"{method}_lr{rate:g}"
        (folder,) = sweep(out, cell, {**options_of(method), "protocol": "clean", "lr": rate}, 1, out / "rates")
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        found[rate] = max(json.loads(line)["metrics"]["auc1"] for line in lines)
    print(f"{method}: held-out video-level AUC by learning rate: {found}")
    return max(found, key=found.__getitem__)


def logistic_regression(out: Path, runs: Sequence[Path]) -> tuple[list[Path], dict[str, float]]:
    """Write the scores of the reference for the seed of each run; return their folders and the AUC of the controls.

    It is trained on the mean rows of the training videos and their labels, and scores single rows.
    """
    from sklearn.linear_model import LogisticRegression

    result = read_scores(runs[0] / RUN_SCORES)
    seeds = sorted({int(run.name.removeprefix("seed")) for run in runs})
    with open(out / "list" / UCF.list_files["train"]) as file:
        rows = [(Path(out / "list" / row["path"]), row["label"]) for row in csv.DictReader(file)]
    train = np.stack([np.load(path) for path, _ in rows]).astype(np.float32)
    labels = np.array([label != "Normal" for _, label in rows])
    mean, deviation = train.mean(axis=(0, 1)), train.std(axis=(0, 1))
    bags = ((train - mean) / deviation).mean(axis=1)
    test = [(np.load(out / "features/test" / f"{e.video}.npy") - mean) / deviation for e in result.videos.entries]

    def scored(labels: np.ndarray, rng: np.random.Generator | None = None) -> list[VideoScores]:
        model = LogisticRegression(C=0.01, max_iter=1000).fit(bags, labels)
        videos = [model.predict_proba(video if rng is None else rng.permutation(video))[:, 1] for video in test]
        return [VideoScores(video[None].astype(np.float32), None) for video in videos]

    def write(folder: Path, scores: list[VideoScores], videos: VideoDataset, seed: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        save_scores(folder / RUN_SCORES, scores, videos, {"method": "logistic regression", "seed": seed})
        return folder

    folders = [write(out / f"logistic/seed{seed}", scored(labels), result.videos, seed) for seed in seeds]
    rng, controls = np.random.default_rng(0), {}
    for name, scores in (
        ("labels shuffled", [scored(rng.permutation(labels)) for _ in range(10)]),
        ("time shuffled", [scored(labels, rng) for _ in range(10)]),
    ):
        made = [write(out / f"controls/{name}{n}", one, result.videos, n) for n, one in enumerate(scores)]
        values = [Resampler(0, metrics=["auc1"]).compare([folder], [folder])[0].other for folder in made]
        controls[name] = float(np.mean(values))
    return folders, controls


def write_table(
    out: Path,
    folders: dict[str, list[Path]],
    rates: dict[str, float],
    reference: list[Path],
    controls: dict[str, float],
) -> None:
    """Print and write mean and deviation over the seeds, the interval over test videos, and the paired difference."""
    resampler, rows = Resampler(metrics=METRICS), []
    for name, runs in {"logistic regression": reference, **folders}.items():
        cells = [name, f"{rates[name.rpartition('_')[0]]:g}" if name in folders else "-"]
        for one in resampler.compare(reference, runs):
            values = np.array([Resampler(0, metrics=[one.metric]).compare([run], [run])[0].other for run in runs])
            bounds = np.array([resampler.interval([run], one.metric) for run in runs]).mean(axis=0)
            low, high = bounds
            cells.append(f"{values.mean():.2f} ± {values.std(ddof=1):.2f} [{low:.1f}, {high:.1f}]")
            if one.metric == "auc1":
                difference = "-" if name not in folders else f"{one.difference:+.2f} {one.over_videos}, p {one.p:.3f}"
        rows.append((*cells, difference))
    header = ("method, protocol", "lr", "AUC", "AP (step)", "Ano-AUC", "AUC − logistic regression, paired")
    text = to_markdown(Table(header, rows))
    text += "".join(f"\n{name}: AUC {value:.2f}" for name, value in controls.items())
    write_text(out / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
