"""Detection mAP at the true sizes of UCF-Crime (290 test videos) and XD-Violence (800), against a walk over frames.

    python benchmarks/detection.py [--quick]

Lengths are the real ones, truth and predictions are made up. Both variants give the same numbers, which is checked. The
plain one takes a minute per size and is timed once, ours before and after it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.machine import seconds
from benchmarks.made import benchmark_frames, made_probabilities, made_truth
from benchmarks.plain.detection import detection_map as plain_detection_map
from benchmarks.report import Report, main_options
from clipfusionvad.data.config import FRAMES_PER_SNIPPET
from clipfusionvad.datasets import UCF, XD
from clipfusionvad.metrics import detection_map

TIMES_FASTER = 300
CPU = torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> None:
    args = main_options(__doc__).parse_args(argv)
    report = Report("detection mAP", args)
    for dataset in (UCF, XD):
        truth = made_truth(dataset, benchmark_frames(dataset, 5 if args.quick else None))
        probabilities = made_probabilities(dataset, truth)
        known = truth.segments, truth.labels, dataset.labels
        # Both get what testing has at hand: snippets that stand for frames, and frames.
        counts = [np.full(len(video), FRAMES_PER_SNIPPET) for video in probabilities]
        frames = [np.repeat(video, FRAMES_PER_SNIPPET, axis=0) for video in probabilities]
        found: dict[str, Sequence[float]] = {}

        def plain(frames=frames, known=known, found=found) -> None:
            found["plain"] = plain_detection_map(frames, *known)

        def ours(probabilities=probabilities, known=known, counts=counts, found=found) -> None:
            found["ours"] = [*detection_map(probabilities, *known, frames=counts)["map"].values()]

        around = [seconds(ours, CPU) for _ in range(5)]
        slow = seconds(plain, CPU)
        fast = median(around + [seconds(ours, CPU) for _ in range(5)])
        np.testing.assert_allclose(found["ours"], found["plain"], atol=1e-9)
        size = f"{len(frames)} videos, {sum(map(len, frames))} frames"
        report.claim(
            f"detection mAP, {dataset.title}, times faster", slow / fast, "x",
            goal=None if args.quick else TIMES_FASTER, made_from=f"{slow:.1f} s → {1000 * fast:.0f} ms; {size}",
        )  # fmt: skip
    report.write()


if __name__ == "__main__":
    main()
