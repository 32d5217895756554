"""Everything that needs a GPU: the tests on it, then the figures, in benchmarks/RESULTS_cuda.md.

    python benchmarks/gpu.py [--parts tests steps protocol extraction] [--output DIR]
    python benchmarks/gpu.py --device cpu --quick --output quick     (to see that it runs, without a GPU)

Meant to take at most ten minutes on an H200. The page is written after each part, so that an end in between loses
nothing, and RESULTS.md takes it in. --parts without a name only does that, with a page from another machine.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import ROOT, describe
from benchmarks.report import main_options
from benchmarks.run import GPU_PAGE, Result, page, run_script, take_in_gpu
from clipfusionvad.engine.device import pick_device
from clipfusionvad.io.errors import run_main
from clipfusionvad.io.files import write_text

TESTS = ("tests/integration/test_second_device.py", "tests/integration/test_compile.py")
SEEDS = ("214", "224", "234", "244", "254")
PARTS = ("tests", "steps", "protocol", "extraction")
PROFILE = "protocol_trace.json.gz"


def main(argv: Sequence[str] | None = None) -> int:
    parser = main_options(__doc__, results=False)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu only shows that it runs")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder of the pages and the profile")
    args = parser.parse_args(argv)
    machine = describe(pick_device(args.device)) if args.parts else {}
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    args.precision = "bf16"
    # For a CPU, torch.compile would write C++ for minutes.
    args.compile = "default" if args.device == "cuda" else None
    table, results, failed = args.output / GPU_PAGE, list[Result](), list[str]()
    for part in args.parts:
        try:
            for result in PART_RUNS[part](args):
                results.append(result)
        except subprocess.CalledProcessError as error:
            command = error.cmd if isinstance(error.cmd, str) else shlex.join(error.cmd)
            failed.append(f"FAILED {part}: exit code {error.returncode} of {command}")
            print(failed[-1], file=sys.stderr)
        content = page("gpu.py", results, machine, args.quick)
        write_text(table, "\n".join([content, *failed, ""]) if failed else content)
    take_in_gpu(args.output / "RESULTS.md")
    print(f"\nresults  {table}")
    return 1 if failed else 0


def run_tests(args: argparse.Namespace) -> Iterator[Result]:
    """The tests that a device has; of their output the failures and the last line."""
    options = [
        "-n",
        "2",
        "--dist",
        "loadfile",
        *TESTS,
        *(["-k", "clipfusionvad or nccl or packed"] if args.quick else []),
    ]
    lines = []
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", *options], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"TEST_DEVICE": args.device, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    with process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    command = f"TEST_DEVICE={args.device} python -m pytest -q {shlex.join(options)}"
    yield Result(
        command, "tests", [], [], [*(line for line in lines if line.startswith(("FAILED", "ERROR"))), *lines[-1:]]
    )
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def run_steps(args: argparse.Namespace) -> Iterator[Result]:
    yield run_script("machine", args)
    videos = ["--videos", "64"] if whole(args) else []
    for mode in dict.fromkeys((None, args.compile)):
        yield run_script("training_step", compiled(args, mode), videos)
    yield run_script("testing", compiled(args, None))


def run_protocol(args: argparse.Namespace) -> Iterator[Result]:
    yield run_script("protocol", compiled(args, None), ["--profile", str(args.output / PROFILE)])
    if whole(args):
        yield run_script("protocol", args, ["--seeds", *SEEDS])


def run_extraction(args: argparse.Namespace) -> Iterator[Result]:
    yield run_script("extract_throughput", args, ["--precision", args.precision])


def whole(args: argparse.Namespace) -> bool:
    """Whether the published sizes are meant."""
    return args.device == "cuda" and not args.quick


def compiled(args: argparse.Namespace, mode: str | None) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | {"compile": mode})


PART_RUNS = {"tests": run_tests, "steps": run_steps, "protocol": run_protocol, "extraction": run_extraction}


if __name__ == "__main__":
    sys.exit(run_main(main))
