"""One training step (forward, losses, backward, AdamW) against the plain formulation, and against this machine's limit.

    python benchmarks/training_step.py [--quick] [--device cuda --precision bf16 --compile default]

4 + 4 videos of 256 snippets, 14 classes, ClipFusionVAD with ViT-B/16's text tower; on a GPU 64 + 64 are usual. Both
variants have the same random weights, and their losses are compared before anything is timed. The plain one runs in
float32 and uncompiled, as the original does.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.flops import Products, count
from benchmarks.machine import gemm_rate, held_gemm_rate, in_turns, peaks_apart, print_peak, rate_at, ratio, seconds
from benchmarks.made import made_batch, made_model, pick_size
from benchmarks.report import Report, main_options, model_flags
from clipfusionvad.engine.config import TrainingConfig
from clipfusionvad.engine.device import autocast, compile_model, pick_device
from clipfusionvad.engine.optimizer import make_optimizer

TIMES_FASTER, SHARE_OF_GEMM = 2.8, 75
CONFIG = TrainingConfig(
    seed=0, max_epoch=1, batch_size=1, balanced=True, lr=2e-5, eval_every=0, select="auc1", scheduler_milestones=(),
    scheduler_rate=0.1,
)  # fmt: skip
Losses = dict[str, torch.Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    parser = main_options(__doc__, model=True)
    parser.add_argument("--videos", type=int, default=4, metavar="N", help="normal videos, and as many anomalous ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["plain", "ours"], help="print the peak memory of one variant and stop")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    if args.only:
        step = make_step(args, device, plain=args.only == "plain")
        for _ in range(3):
            step()
        print_peak(device)
        return
    report = Report("training step", args)
    compare(args, device, report)
    peaks = peaks_apart("training_step.py", model_flags(args) + ["--videos", str(args.videos)])
    shown = " → ".join(f"{peaks[name] / 2**20:.0f} MiB" for name in ("plain", "ours"))
    report.claim("peak memory, of the plain one's", 100 * peaks["ours"] / peaks["plain"], "%", goal=100, at_most=True,
                 made_from=shown)  # fmt: skip
    report.write()


def compare(args: argparse.Namespace, device: torch.device, report: Report) -> None:
    steps = {"plain": make_step(args, device, plain=True), "ours": make_step(args, device, plain=False)}
    first = {name: step() for name, step in steps.items()}
    for term, value in first["plain"].items():
        torch.testing.assert_close(first["ours"][term].float(), value, rtol=tolerance(args), atol=tolerance(args))
    flop = {name: count(step) for name, step in steps.items()}
    rates: list[float] = []
    sizes = (256,) if args.quick else None
    duration = seconds(steps["ours"], device)
    beside = {"GEMM": lambda: rates.append(held_gemm_rate(device, args.precision, duration, sizes))}
    times = in_turns(steps | beside, args.rounds, device)
    took = {name: median(times[name]) for name in steps}
    report.claim(
        "training step, times faster", ratio(times), "x", goal=None if args.quick else TIMES_FASTER,
        made_from=f"{1000 * took['plain']:.0f} ms, {flop['plain'] / 1e9:.0f} GFLOP → "
        f"{1000 * took['ours']:.0f} ms, {flop['ours'] / 1e9:.0f} GFLOP",
    )  # fmt: skip
    share = median(flop["ours"] / time / rate for time, rate in zip(times["ours"], rates, strict=True))
    goal = None if args.quick else SHARE_OF_GEMM if device.type == "cpu" else 35
    report.claim("training step, share of the GEMM rate", 100 * share, "%", goal=goal)
    with Products() as products, torch.compiler.set_stance("force_eager"):
        steps["ours"]()
    at_sizes = rate_at(products.shapes, device, args.precision)
    burst = gemm_rate(device, args.precision, sizes)
    report.limit("matrix products at the sizes of the step, bursts", at_sizes / 1e9, burst / 1e9, "GFLOP/s")
    rate = median(rates)
    for name in steps:
        report.limit(f"training step, {name}", flop[name] / took[name] / 1e9, rate / 1e9, "GFLOP/s")


def tolerance(args: argparse.Namespace) -> float:
    return 1e-4 if args.precision == "fp32" else 5e-2


def make_step(args: argparse.Namespace, device: torch.device, plain: bool) -> Callable[[], Losses]:
    """A function that makes one training step of made-up videos and returns its losses."""
    size = pick_size(args.quick)
    model: nn.Module = made_model(size, plain).to(device).train()
    batch = [part.to(device) for part in made_batch(size, args.videos)]
    if plain:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return step_of(model, torch.optim.AdamW(trained, lr=CONFIG.lr), batch, "fp32")
    compile_model(model, args.compile)
    return step_of(model, make_optimizer(model, CONFIG), batch, args.precision)


def step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Sequence[torch.Tensor], precision: str
) -> Callable[[], Losses]:
    """A function that makes one step on the batch: visual (B, T, D), lengths (B,), targets (B, C)."""
    visual, lengths, targets = batch

    def step() -> Losses:
        with autocast(visual.device, precision):
            output = model(visual, lengths)
        losses = model.losses(output, targets, lengths)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        return {name: term.detach() for name, term in losses.items()}

    return step


if __name__ == "__main__":
    main()
