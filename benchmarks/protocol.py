"""The whole UCF-Crime protocol at its true size: 16,100 training rows x 256 snippets, 10 epochs, every evaluation.

    python benchmarks/protocol.py --device cuda --precision bf16 [--seeds 214 224 234 244 254] [--profile trace.json.gz]
    python benchmarks/protocol.py --rows 256 --epochs 1 --videos 20     (on a CPU: a share of it)
    python benchmarks/protocol.py --quick

Features are random numbers made on the device, in half precision, with the true lengths of the training and of the test
videos; model, trainer, evaluations and metrics are those of a real training. A first, short training warms up. Without
--profile the times are those of an undisturbed training; with it 20 steps are traced as well, for how busy the GPU is.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.flops import count
from benchmarks.machine import gemm_rate, peak_memory, seconds
from benchmarks.made import benchmark_frames, made_features, made_model, made_truth, pick_size
from benchmarks.report import Report, main_options
from benchmarks.sizes import UCF_TRAIN_SNIPPETS
from benchmarks.testing import video_set
from benchmarks.training_step import step_of
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.loaders import BagDataset, BalancedBatchSampler
from clipfusionvad.datasets import UCF
from clipfusionvad.engine.config import TrainingConfig
from clipfusionvad.engine.device import compile_model, pick_device
from clipfusionvad.engine.evaluator import evaluate, score_videos
from clipfusionvad.engine.trainer import Trainer
from clipfusionvad.models import Method

#: The published schedule, and the goals on one H200: seconds of a training and of five, shares of rate and time.
ROWS, EPOCHS, EACH, EVAL_EVERY = 16100, 10, 64, 1280
MOST_SECONDS, MOST_SECONDS_OF_FIVE, SHARE_OF_GEMM, BUSY = 60, 150, 35, 90

#: Steps that are traced, and operations of them that are shown.
TRACED, TOP = 20, 10


def main(argv: Sequence[str] | None = None) -> None:
    parser = main_options(__doc__, model=True)
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows, half of them normal")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--videos", type=int, help="test videos of each kind (default: all 290)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[234], help="one training for each")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="trace some steps and keep the trace there")
    args = parser.parse_args(argv)
    if args.quick:
        args.rows, args.epochs, args.videos = 64, 1, 3
    report = Report("protocol", args)
    run = Run(args)
    with tempfile.TemporaryDirectory() as folder:
        run.trainer(args.seeds[0], epochs=1, rows=2 * run.each).fit(Path(folder, "warm"))
        run.evaluations.clear()
        took = run.fit(args.seeds, Path(folder))
        tell(args, run, took, report)
        report.write()
        if args.profile:
            measure_busy(run, Path(folder, "traced"), args.profile, report)
            report.write()


class MadeBatches:
    """Random features (N, T, D) in half precision where the model is, from which batches are gathered."""

    whole = False

    def __init__(self, lengths: np.ndarray, length: int, width: int, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        self.device, self.lengths = device, lengths
        self.features = torch.empty(len(lengths), length, width, dtype=torch.float16, device=device)
        for part in tqdm(self.features.split(256), "making features", disable=None, leave=False):
            part.normal_(generator=generator)
        valid = torch.arange(length, device=device) < torch.from_numpy(lengths).to(device)[:, None]
        self.features *= valid[..., None]

    def gather(self, indices: Iterator[np.ndarray]) -> Iterator[Tensor]:
        for index in indices:
            yield self.features[torch.from_numpy(index).to(self.device, non_blocking=True)].float()


class Run:
    """What the trainings share: training features on the device, and a test set with its truth."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.size, self.device = args, pick_size(args.quick), pick_device(args.device)
        self.each = min(EACH, args.rows // 4)
        crops = -(-args.rows // len(UCF_TRAIN_SNIPPETS))
        lengths = np.minimum(np.repeat(UCF_TRAIN_SNIPPETS, crops), self.size.length)
        lengths = np.random.default_rng(0).permutation(lengths)[: args.rows].astype(np.int64)
        self.packed = MadeBatches(lengths, self.size.length, self.size.width, self.device)
        labels = [UCF.labels[0]] * (args.rows // 2)
        labels += [UCF.labels[1 + row % (len(UCF.labels) - 1)] for row in range(args.rows - len(labels))]
        self.entries = [Entry(Path(f"{row}.npy"), label, row) for row, label in enumerate(labels)]
        truth = made_truth(UCF, benchmark_frames(UCF, args.videos))
        counts = [len(frames) // 16 for frames in truth.frames]
        self.features, self.videos = made_features(counts, self.size.width), video_set(truth, self.size.width)
        self.evaluations: list[float] = []

    def trainer(self, seed: int, epochs: int | None = None, rows: int | None = None) -> Trainer:
        model = made_model(self.size, seed=seed)
        compile_model(model, self.args.compile)
        bags = BagDataset(self.entries, UCF, model.sampling, self.size.width, seed, packed=self.packed)
        half = self.args.rows // 2
        normal, anomalous = (np.arange(start, start + (rows or 2 * half) // 2) for start in (0, half))
        plan = BalancedBatchSampler(normal, anomalous, self.each, seed)
        config = TrainingConfig(
            seed=seed, max_epoch=epochs or self.args.epochs, batch_size=self.each, balanced=True, lr=2e-5,
            eval_every=EVAL_EVERY, select="auc1", scheduler_milestones=(4, 8), scheduler_rate=0.1,
        )  # fmt: skip
        return Trainer(model, bags, plan, config, self.evaluate, {}, self.device, self.args.precision)

    def evaluate(self, model: Method) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def work() -> None:
            found.update(evaluate(score_videos(model, self.features, self.device, self.args.precision), self.videos))

        self.evaluations.append(seconds(work, self.device))
        return found

    def fit(self, seeds: Sequence[int], folder: Path) -> float:
        """Train one seed after another; return the seconds that it took."""

        def fit_all() -> None:
            for seed in seeds:
                self.trainer(seed).fit(folder / str(seed))

        return seconds(fit_all, self.device)

    def step(self) -> tuple[float, int]:
        """Seconds and FLOP of a training step by itself."""
        trainer = self.trainer(self.args.seeds[0])
        rows = trainer.batch_sampler.epoch(0)[0]
        known = (torch.from_numpy(part[rows]).to(self.device) for part in (self.packed.lengths, trainer.bags.targets))
        batch = [next(self.packed.gather(iter([rows]))), *known]
        step = step_of(trainer.model.train(), trainer.optimizer, batch, self.args.precision)
        flop = count(step)
        number = 20 if self.device.type == "cuda" else 3

        def steps() -> None:
            for _ in range(number):
                step()

        steps()
        return seconds(steps, self.device) / number, flop


def tell(args: argparse.Namespace, run: Run, took: float, report: Report) -> None:
    whole = (args.rows, args.epochs, args.videos, args.device) == (ROWS, EPOCHS, None, "cuda")
    steps = args.epochs * (args.rows // 2 // run.each)
    report.say(
        f"{args.rows} rows, {args.epochs} epochs of {steps // args.epochs} steps, {len(run.features)} test videos, "
        f"{len(run.evaluations)} evaluations, {run.device}, {args.precision}"
    )
    seeds = len(args.seeds)
    goal = {1: MOST_SECONDS, 5: MOST_SECONDS_OF_FIVE}.get(seeds) if whole else None
    name = f"protocol, {seeds} seed{'s' * (seeds > 1)}"
    report.claim(name, took, " s", goal=goal, at_most=True)
    step, flop = run.step()
    report.fact("a training step", 1000 * step, "ms")
    report.claim("an evaluation, of a step", float(np.median(run.evaluations)) / step, "x",
                 goal=1 if whole else None, at_most=True)  # fmt: skip
    rate = gemm_rate(run.device, args.precision, (256,) if args.quick else None)
    goal = SHARE_OF_GEMM if whole else None
    report.claim("training step, share of the GEMM rate", 100 * flop / step / rate, "%", goal=goal)
    report.limit("training step of the protocol", flop / step / 1e12, rate / 1e12, "TFLOP/s")
    report.fact("peak memory", peak_memory(run.device) / 2**30, "GiB")


def measure_busy(run: Run, folder: Path, path: Path, report: Report) -> None:
    """The share of some steps and evaluations in which the device computes, and by what; the trace is kept."""
    rows, on_gpu = min(2 * run.each * TRACED, run.args.rows), run.device.type == "cuda"
    trainer = run.trainer(run.args.seeds[0], epochs=1, rows=rows)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        took = seconds(lambda: trainer.fit(folder), run.device)
    profiler.export_chrome_trace(str(path))
    report.say(f"trace of {trainer.progress.step} steps and their evaluations: {path}")
    if on_gpu:
        events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        spans = [(event.time_range.start, event.time_range.end) for event in events]
        report.claim("device busy", 100 * covered(spans) / 1e6 / took, "%", goal=BUSY)
        times = [(event.name, event.time_range.elapsed_us()) for event in events]
    else:
        times = [(event.key, event.self_cpu_time_total) for event in profiler.key_averages()]
    total: Counter[str] = Counter()
    for name, time in times:
        total[name] += time
    for name, time in total.most_common(TOP):
        report.say(f"{time / total.total():6.1%}  {name[:100]}")


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, -np.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


if __name__ == "__main__":
    main()
