"""A training step of each baseline at its released size, D = 512, against its original formulation.

    python benchmarks/baselines.py [--quick] [--device cuda] [--methods rtfm urdmu …]

Both compute the same losses, which are compared before anything is timed, with the same optimizer. The original
formulation is plain PyTorch: T×T matrices, one-hot rows for each sample of a selection, loops over videos and windows.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.machine import in_turns, ratio
from benchmarks.plain.baselines import plain
from benchmarks.report import Report, main_options
from benchmarks.training_step import CONFIG, Losses, step_of
from clipfusionvad.datasets import UCF
from clipfusionvad.engine.device import pick_device
from clipfusionvad.engine.optimizer import make_optimizer
from clipfusionvad.models import build_method, find_method
from clipfusionvad.models.clip import ClipWeights, toy_state

#: Videos of each kind, or in all, and snippets of a batch as released.
BATCHES = {"deepmil": (32, 32), "rtfm": (32, 32), "cliptsa": (16, 32), "urdmu": (64, 200), "bnwvad": (64, 200)}
BATCHES |= {"pel4vad": (64, 200), "dsanet": (64, 256)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = main_options(__doc__, device=True)
    parser.add_argument("--methods", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    device, report = pick_device(args.device), Report("baselines", args)
    clip = ClipWeights(toy_state(64 if args.quick else 512, 2 if args.quick else 12), "random")
    for method in args.methods:
        videos, length = (2, 32) if args.quick else BATCHES[method]
        # DeepMIL has no part that could be computed otherwise.
        steps = {name: make_step(method, videos, length, clip, device, name == "plain") for name in ("plain", "ours")}
        first = {name: step() for name, step in steps.items()}
        for term, value in first["plain"].items():
            torch.testing.assert_close(first["ours"][term], value, rtol=1e-4, atol=1e-4, msg=f"{method}: {term}")
        times = in_turns(steps, args.rounds, device)
        took = {name: median(times[name]) for name in steps}
        made_from = f"{took['plain']:.2f} s → {took['ours']:.2f} s, {2 * videos} videos of {length} rows"
        goal = None if args.quick else 1.0
        report.claim(f"training step of {method}, times faster", ratio(times), "x", goal=goal, made_from=made_from)
    report.write()


def make_step(
    method: str, videos: int, length: int, clip: ClipWeights, device: torch.device, is_plain: bool
) -> Callable[[], Losses]:
    """Return a function that makes one training step of made-up videos and returns its losses."""
    torch.manual_seed(0)
    width = clip.embed_dim
    options = {"visual_width": width, "visual_length": length, "embed_dim": width}
    own = find_method(method).option_names()
    model = build_method(method, UCF.prompts, clip, **{name: options[name] for name in options if name in own})
    model.to(device).train()
    optimizer = make_optimizer(model, CONFIG, model.stable_branch, model.stable_steps)
    visual = torch.randn(2 * videos, length, width, device=device)
    lengths = torch.full((2 * videos,), length, device=device)
    classes = torch.cat([torch.zeros(videos), torch.arange(videos) % 13 + 1]).long()
    targets = torch.nn.functional.one_hot(classes, len(UCF.prompts)).float().to(device)

    take_step = step_of(model, optimizer, (visual, lengths, targets), "fp32")

    def step() -> Losses:
        # Both draw the same dropout and noise.
        torch.manual_seed(1)
        with plain() if is_plain else contextlib.nullcontext():
            return take_step()

    return step


if __name__ == "__main__":
    main()
