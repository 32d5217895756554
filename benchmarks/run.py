"""Run the benchmarks one after another and write what they found: benchmarks/RESULTS.md and docs/speed.png.

    python benchmarks/run.py [--quick] [--output DIR] [--device cuda --precision bf16]

Takes half an hour on two cores. Let nothing else run meanwhile. --device, --precision and --compile reach
those scripts that have them. The protocol runs on a GPU at its true size, and on a CPU at a small share of it.
What benchmarks/gpu.py found becomes the last part of the page.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import matplotlib.pyplot as plt
import torch

from benchmarks.machine import ROOT, describe
from benchmarks.report import Claim, Limit, main_options, model_flags, number, read_report
from clipfusionvad.io.files import write_text

ON_MODEL, ON_DEVICE = ("training_step", "testing", "linear", "protocol"), ("machine", "extract_throughput")
SCRIPTS = ("machine", "flops", "training_step", "baselines", "testing", "detection", "ranking", "reading", "linear")
SCRIPTS += ("protocol",)
#: What the protocol takes on a CPU, where the whole of it would take a day.
SHARE_OF_PROTOCOL = ("--rows", "64", "--epochs", "1", "--videos", "3")
#: The page of benchmarks/gpu.py, and the heading under which RESULTS.md has it.
GPU_PAGE, GPU_HEADING = "RESULTS_cuda.md", "\n# On a GPU\n"


@dataclass(frozen=True)
class Result:
    """A script's command and what it reported."""

    command: str
    title: str
    claims: list[Claim]
    limits: list[Limit]
    lines: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    parser = main_options(__doc__, model=True, results=False)
    parser.add_argument("--output", type=Path, help="folder of RESULTS.md and speed.png instead")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    args = parser.parse_args(argv)
    results = [run_script(name, args) for name in args.scripts]
    table = args.output / "RESULTS.md" if args.output else ROOT / "benchmarks" / "RESULTS.md"
    chart = args.output / "speed.png" if args.output else ROOT / "docs" / "speed.png"
    write_text(table, page("run.py", results, describe(torch.device(args.device)), args.quick))
    take_in_gpu(table)
    draw([claim for result in results for claim in result.claims], chart)
    print(f"\nresults  {table}\nchart    {chart}")


def run_script(name: str, args: argparse.Namespace, more: Sequence[str] = ()) -> Result:
    """Run one script in a process of its own, its output passed on."""
    options = model_flags(args) if name in ON_MODEL else ["--quick"] * args.quick
    if name in ON_DEVICE:
        options += ["--device", args.device]
    if name == "protocol" and args.device == "cpu" and not args.quick:
        options += SHARE_OF_PROTOCOL
    options += more
    command = f"python benchmarks/{name}.py {' '.join(options)}".rstrip()
    print(f"\n{command}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        script = str(ROOT / "benchmarks" / f"{name}.py")
        # The scripts of one run share what the machine can do, and so its threads.
        subprocess.run([sys.executable, script, *options, "--json", str(path)], check=True, cwd=ROOT, env=os.environ)
        return Result(command, *read_report(path))


def page(script: str, results: Sequence[Result], machine: dict[str, str], quick: bool) -> str:
    """RESULTS.md: machine, claims, roofline, and what else the scripts said."""
    lines = ["# Speed, measured", ""]
    if quick:
        lines += ["**With `--quick`: sizes too small to say anything.**", ""]
    lines += [
        f"Measured on {date.today()} by `python benchmarks/{script}`. Ratios are those of one run against a plain"
    ]
    lines += ["formulation of the same computation (`benchmarks/plain`), whose numbers ours reproduces.", ""]
    lines += ["| machine | |", "|---|---|", *(f"| {key} | {value} |" for key, value in machine.items()), ""]
    lines += ["## Claims", "", "| what | measured | goal | from |", "|---|---|---|---|"]
    lines += [row(claim) for result in results for claim in result.claims]
    lines += [
        "",
        "## Roofline",
        "",
        "Rates beside those that the same machine reached in the same run with nothing but",
    ]
    lines += ["matrix products.", "", "| what | rate | limit | share |", "|---|---|---|---|"]
    for limit in (limit for result in results for limit in result.limits):
        rates = f"{number(limit.reached)} {limit.unit} | {number(limit.limit)} {limit.unit}"
        lines.append(f"| {limit.what} | {rates} | {limit.reached / limit.limit:.0%} |")
    lines += ["", "## Commands", ""]
    for result in results:
        lines += ["```text", f"$ {result.command}", *result.lines, *map(str, result.claims), "```", ""]
    return "\n".join(lines)


def take_in_gpu(table: Path) -> None:
    """Make the page of benchmarks/gpu.py beside RESULTS.md its last part, if there are both."""
    found = table.with_name(GPU_PAGE)
    if table.is_file() and found.is_file():
        _, _, figures = found.read_text(encoding="utf-8").partition("\n\n")
        above = table.read_text(encoding="utf-8").partition(GPU_HEADING)[0]
        write_text(table, f"{above.rstrip()}\n{GPU_HEADING}\n{figures.replace('## ', '### ')}")


def row(claim: Claim) -> str:
    goal = "" if claim.goal is None else f"{'≤' if claim.at_most else '≥'} {number(claim.goal)}{claim.unit}"
    value = f"{number(claim.value)}{claim.unit}" + ("" if claim.met else " (missed)")
    return f"| {claim.what} | {value} | {goal} | {claim.made_from} |"


def draw(claims: Sequence[Claim], path: Path) -> None:
    """A bar for every claim of being so many times faster, and a mark where its goal is."""
    faster = [claim for claim in claims if claim.what.endswith("times faster")][::-1]
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(8, 1 + 0.45 * max(len(faster), 1)), layout="constrained")
    names = [claim.what.removesuffix(", times faster") for claim in faster]
    bars = axes.barh(names, [claim.value for claim in faster], color="#3b6ea5")
    axes.bar_label(bars, [f"{number(claim.value)}x" for claim in faster], padding=4)
    for place, claim in enumerate(faster):
        if claim.goal:
            axes.plot([claim.goal] * 2, [place - 0.4, place + 0.4], color="#d1812c", linewidth=2)
    axes.set_xscale("log")
    axes.set_xlim(1, 3 * max([claim.value for claim in faster], default=1))
    axes.set_xlabel("times faster than the plain formulation, same run (orange: goal)")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
