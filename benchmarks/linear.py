"""What a snippet costs in videos of 1,000 to 64,000 snippets: scoring them, and the metrics of their scores.

    python benchmarks/linear.py [--quick] [--device cuda --precision bf16]

Flat columns mean a cost that is linear in the length. Memory is the most that the process has held, less the features;
it stops growing once a forward pass is full.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.machine import peak_memory, seconds
from benchmarks.made import made_features, made_model, made_probabilities, made_truth, pick_size
from benchmarks.report import Report, main_options
from clipfusionvad.data.config import FRAMES_PER_SNIPPET
from clipfusionvad.datasets import UCF
from clipfusionvad.engine.device import compile_model, pick_device
from clipfusionvad.engine.evaluator import score_videos
from clipfusionvad.metrics import count_frames, detection_map, snippet_metrics

SNIPPETS = (1000, 2000, 4000, 8000, 16000, 32000, 64000)
#: How much dearer a snippet of the longest video may be, and memory beyond that of one full forward pass.
AT_MOST = 1.25


def main(argv: Sequence[str] | None = None) -> None:
    args = main_options(__doc__, model=True).parse_args(argv)
    report = Report("cost by length", args)
    counts = [40, 80, 160] if args.quick else SNIPPETS
    with torch.inference_mode():
        scoring, memory, full = measure_scoring(args, counts, report)
    metrics = measure_metrics(counts, report)
    goal = None if args.quick else AT_MOST
    for what, found in (("scoring a snippet", scoring), ("metrics of a snippet", metrics)):
        report.claim(f"{what}, {counts[-1]} against {counts[0]} snippets", found[-1] / found[0], "x", goal=goal,
                     at_most=True)  # fmt: skip
    report.claim(f"memory, {counts[-1]} against {counts[full]} snippets", memory[-1] / memory[full], "x", goal=goal,
                 at_most=True)  # fmt: skip
    report.write()


def measure_scoring(
    args: argparse.Namespace, counts: Sequence[int], report: Report
) -> tuple[list[float], list[float], int]:
    """Seconds per 1000 snippets and peak bytes for each length, and the first length that fills a forward pass."""
    size, device = pick_size(args.quick), pick_device(args.device)
    model = made_model(size).to(device)
    compile_model(model, args.compile)
    score_videos(model, made_features(counts[:1], size.width), device, args.precision)
    took, memory = [], []
    for count in counts:
        features = made_features([count], size.width)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        tries = [
            seconds(lambda features=features: score_videos(model, features, device, args.precision), device)
            for _ in range(3 if count <= counts[len(counts) // 2] else 1)
        ]
        took.append(1000 * median(tries) / count)
        held = features[0].nbytes if device.type == "cpu" else 0
        memory.append(peak_memory(device) - held)
        report.say(
            f"scoring {count:6} snippets: {1000 * took[-1]:8.1f} ms per 1000, {memory[-1] / 2**20:6.0f} MiB "
            f"besides the features"
        )
    snippets = model.windows_at_once * size.length
    return took, memory, next((at for at, count in enumerate(counts) if count >= snippets), 0)


def measure_metrics(counts: Sequence[int], report: Report) -> list[float]:
    """Seconds per 1000 snippets that AUC, AP and detection mAP take for each length."""
    took = []
    for count in counts:
        frames = FRAMES_PER_SNIPPET * count
        # A normal video beside the long one, so that there are two kinds.
        truth = made_truth(UCF, ([frames], [FRAMES_PER_SNIPPET * 20]))
        scores = made_probabilities(UCF, truth)

        def judge(truth=truth, scores=scores) -> None:
            counted = [count_frames(video, len(rows)) for video, rows in zip(truth.frames, scores, strict=True)]
            positives, totals = (np.concatenate(part) for part in zip(*counted, strict=True))
            snippet_metrics(1 - np.concatenate(scores)[:, 0], positives, totals)
            detection_map(scores, truth.segments, truth.labels, UCF.labels, frames=[part for _, part in counted])

        took.append(1000 * median(seconds(judge, torch.device("cpu")) for _ in range(5)) / count)
        report.say(f"metrics of {count:6} snippets: {1000 * took[-1]:8.2f} ms per 1000")
    return took


if __name__ == "__main__":
    main()
