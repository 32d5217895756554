"""How much arithmetic a training step is, counted by torch's FLOP counter, part by part.

    python benchmarks/flops.py [--quick]

The original's step of 4 + 4 videos of 256 snippets is about 476 GFLOP: 151 for the videos, 325 for the prompts, which
it encodes twice, at all 77 positions of 14 classes. A multiplication and an addition are two. What counts is products
of matrices and convolutions, those inside fused attention apart; the rest is a few operations per number, bound by
memory.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import Shape
from benchmarks.made import Size, made_batch, made_model, pick_size
from benchmarks.report import Report, main_options

# GFLOP that were counted before: the original program, and what is left where no position is computed twice.
ORIGINAL, OURS = 476, 178
#: Parts of the model by the names of its modules; what is left is the products between them.
PARTS = {
    "temporal transformer": ("temporal",),
    "graph branches": ("gc1", "gc2", "gc3", "gc4"),
    "gate along time": ("gam_attention",),
    "MLPs of fusion and coarse head": ("mlp1", "mlp2"),
    "linear layers": ("linear", "head_video", "u_head_video", "classifier"),
}
WHY = {
    "prompts": "classes x positions through CLIP's tower",
    "temporal transformer": "snippets through its blocks",
    "graph branches": "T x T adjacency times features, and convolutions over 5 snippets",
    "gate along time": "convolutions over 7 snippets",
    "MLPs of fusion and coarse head": "one over snippets, one over videos x classes",
    "linear layers": "snippets x D x D",
    "between the parts": "cosine similarities of snippets, visual prompt, alignment with the classes",
    "backward, prompts": "as much again: CLIP is frozen, so only the learned context gets gradients",
    "backward, videos": "nearly twice the forward: gradients of inputs and of weights",
    "inside attention": "not in the sums; the plain one multiplies all 77 and all 256 positions with each other",
}


def main(argv: Sequence[str] | None = None) -> None:
    args = main_options(__doc__).parse_args(argv)
    report, size = Report("arithmetic of a training step", args), pick_size(args.quick)
    plain, ours = (count_parts(size, made_model(size, plain).train(), plain) for plain in (True, False))
    report.say(f"{'GFLOP':32} {'plain':>8} {'ours':>8}")
    for part, why in WHY.items():
        report.say(f"{part:32} {plain[part]:8.2f} {ours[part]:8.2f}  {why}")
    position = 24 * size.width**2 * size.text_layers / 1e9
    report.say(
        f"prompts are as much as {plain['prompts'] / position:.0f} positions in the plain one (2 x classes x 77), "
        f"{ours['prompts'] / position:.0f} in ours"
    )
    totals = [sum(value for part, value in found.items() if part != "inside attention") for found in (plain, ours)]
    report.fact("plain formulation", totals[0], "GFLOP")
    report.claim("ours", totals[1], " GFLOP", goal=None if args.quick else 1.02 * OURS, at_most=True)
    report.fact("times less", totals[0] / totals[1], "x")
    if not args.quick:
        report.say(f"the original program's step was counted at {ORIGINAL} GFLOP")
    report.write()


def count_parts(size: Size, model: nn.Module, plain: bool) -> dict[str, float]:
    """GFLOP of each part of one step: forward part by part, then backward."""
    visual, lengths, targets = made_batch(size, each=4)

    def step() -> None:
        sum(model.losses(model(visual, lengths), targets, lengths).values()).backward()

    encode, passes = (model.encode_prompts, 2) if plain else (model.encode_text, 1)
    with FlopCounterMode(display=False) as forward:
        model(visual, lengths)
    modules, root = forward.get_flop_counts(), type(model).__name__
    found = {"prompts": passes * count(encode)}
    for part, names in PARTS.items():
        found[part] = sum(sum(modules[f"{root}.{name}"].values()) for name in names)
    found["between the parts"] = forward.get_total_flops() - sum(found.values())
    found["backward, prompts"] = passes * count(lambda: encode().sum().backward()) - found["prompts"]
    whole = count(step)
    found["backward, videos"] = whole - forward.get_total_flops() - found["backward, prompts"]
    with sdpa_kernel(SDPBackend.MATH):
        found["inside attention"] = count(step) - whole
    return {part: flop / 1e9 for part, flop in found.items()}


def count(work: Callable[[], object]) -> int:
    """FLOP of a call, backward passes in it included; a compiled model is run as it is without."""
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        work()
    return counter.get_total_flops()


class Products(TorchDispatchMode):
    """Counts the matrix products that are computed within it by (batch, m, k, n)."""

    def __init__(self):
        super().__init__()
        self.shapes: Counter[Shape] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            left, right = args[-2:]
            batch = len(left) if left.dim() == 3 else 1
            self.shapes[(batch, *left.shape[-2:], right.shape[-1])] += 1
        return function(*args, **(kwargs or {}))


if __name__ == "__main__":
    main()
