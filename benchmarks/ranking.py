"""AUC and AP of both branches at the true sizes of the test sets, on snippets, against scikit-learn on all frames.

    python benchmarks/ranking.py [--quick]

Ours includes counting the frames behind each snippet. Both give the same numbers, which is checked.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.machine import in_turns, ratio
from benchmarks.made import benchmark_frames, made_probabilities, made_truth
from benchmarks.plain.testing import rank
from benchmarks.report import Report, main_options
from clipfusionvad.datasets import UCF, XD
from clipfusionvad.metrics import count_frames, snippet_metrics

TIMES_FASTER = 8
Metrics = list[dict[str, float]]


def main(argv: Sequence[str] | None = None) -> None:
    args = main_options(__doc__).parse_args(argv)
    report = Report("AUC and AP", args)
    for dataset in (UCF, XD):
        truth = made_truth(dataset, benchmark_frames(dataset, 5 if args.quick else None))
        probabilities = made_probabilities(dataset, truth)
        branches = [[1 - video[:, 0] for video in probabilities], [video[:, 1] for video in probabilities]]
        variants = {
            "plain": lambda branches=branches, truth=truth: [rank(scores, truth.frames) for scores in branches],
            "ours": lambda branches=branches, truth=truth: rank_snippets(branches, truth.frames),
        }
        for plain, ours in zip(variants["plain"](), variants["ours"](), strict=True):
            np.testing.assert_allclose([ours[name] for name in plain], [*plain.values()], rtol=1e-12)
        times = in_turns(variants, 5, torch.device("cpu"))
        report.claim(
            f"AUC and AP, {dataset.title}, times faster", ratio(times), "x", goal=None if args.quick else TIMES_FASTER,
            made_from=" → ".join(f"{1000 * median(times[name]):.0f} ms" for name in times),
        )  # fmt: skip
    report.write()


def rank_snippets(branches: Sequence[Sequence[np.ndarray]], frames: Sequence[np.ndarray]) -> Metrics:
    """AUC and AP of each branch's scores per snippet."""
    counts = [count_frames(truth, len(video)) for truth, video in zip(frames, branches[0], strict=True)]
    positives, totals = (np.concatenate(part) for part in zip(*counts, strict=True))
    return [snippet_metrics(np.concatenate(scores), positives, totals) for scores in branches]


if __name__ == "__main__":
    main()
