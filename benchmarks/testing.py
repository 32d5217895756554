"""Testing 20 videos, from features to every metric, against one video at a time with its prompts encoded again.

    python benchmarks/testing.py [--quick] [--device cuda --precision bf16]

The videos have 18 to 2049 snippets, about 300 in the mean, windows of 256, ViT-B/16's text tower. Both variants have
the same weights, and what they compute is compared.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.machine import in_turns, peaks_apart, print_peak, ratio
from benchmarks.made import made_features, made_model, made_truth, pick_size
from benchmarks.plain import testing as plain_testing
from benchmarks.report import Report, main_options, model_flags
from clipfusionvad.data.config import FRAMES_PER_SNIPPET
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.truth import Truth
from clipfusionvad.datasets import NORMAL_IN_TRUTH, UCF
from clipfusionvad.engine.device import compile_model, pick_device
from clipfusionvad.engine.evaluator import VideoDataset, VideoScores, evaluate, score_videos

TIMES_FASTER = 17
SNIPPETS = (18, 25, 33, 46, 60, 75, 88, 104, 123, 140, 158, 181, 205, 236, 256, 257, 340, 480, 1126, 2049)
QUICK_SNIPPETS = (18, 32, 33, 70)


def main(argv: Sequence[str] | None = None) -> None:
    parser = main_options(__doc__, model=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["plain", "ours"], help="print the peak memory of one variant and stop")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    if args.only:
        make_test(args, plain=args.only == "plain")()
        print_peak(device)
        return
    report = Report("testing", args)
    tests = {name: make_test(args, plain=name == "plain") for name in ("plain", "ours")}
    if args.precision == "fp32":
        check({name: test() for name, test in tests.items()})
    times = in_turns(tests, args.rounds, device)
    took = {name: median(times[name]) for name in tests}
    videos = len(snippets(args))
    report.claim(
        f"testing {videos} videos, times faster", ratio(times), "x", goal=None if args.quick else TIMES_FASTER,
        made_from=" → ".join(f"{1000 * took[name] / videos:.0f} ms" for name in took) + " a video",
    )  # fmt: skip
    peaks = peaks_apart("testing.py", model_flags(args))
    shown = " → ".join(f"{peaks[name] / 2**20:.0f} MiB" for name in peaks)
    report.claim("peak memory, of the plain one's", 100 * peaks["ours"] / peaks["plain"], "%", goal=100, at_most=True,
                 made_from=shown)  # fmt: skip
    report.write()


def snippets(args: argparse.Namespace) -> Sequence[int]:
    return QUICK_SNIPPETS if args.quick else SNIPPETS


def make_test(args: argparse.Namespace, plain: bool) -> Callable[[], dict[str, Any]]:
    """A function that tests the videos once and returns the metrics."""
    size, device = pick_size(args.quick), pick_device(args.device)
    model = made_model(size, plain).to(device)
    counts = snippets(args)
    features = made_features(counts, size.width)
    frames = [FRAMES_PER_SNIPPET * count for count in counts]
    truth = made_truth(UCF, (frames[::2], frames[1::2]))
    features = features[::2] + features[1::2]
    if plain:
        return lambda: plain_testing.evaluate(
            plain_testing.score_videos(model, features, size.length, device),
            truth.frames, truth.segments, truth.labels, UCF.labels,
        )  # fmt: skip
    videos = video_set(truth, size.width)
    compile_model(model, args.compile)

    def test() -> dict[str, Any]:
        scores: list[VideoScores] = score_videos(model, features, device, args.precision)
        return evaluate(scores, videos)

    return test


def video_set(truth: Truth, width: int) -> VideoDataset:
    """A test set of UCF-Crime that has this truth and no files."""
    labels = [UCF.labels[0] if names == [NORMAL_IN_TRUTH] else names[0] for names in truth.labels]
    entries = [Entry(Path(f"{row}.npy"), label, row) for row, label in enumerate(labels)]
    return VideoDataset(entries, UCF, width, truth)


def check(found: dict[str, dict[str, Any]]) -> None:
    plain, ours = found["plain"], found["ours"]
    names = ["auc1", "ap1", "auc2", "ap2"]
    np.testing.assert_allclose([ours[name] for name in names], [plain[name] for name in names], atol=1e-3)


if __name__ == "__main__":
    main()
