"""What this machine can do, measured in the run that uses it: matrix products, copies, time and memory.

    python benchmarks/machine.py [--quick] [--device cuda]

A busy machine hurts whatever is being measured, so what is compared is measured in turns.
"""

import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.report import Report, main_options
from clipfusionvad.engine.device import pick_device

ROOT = Path(__file__).resolve().parents[1]
#: Square matrix products of which the best gives the rate; large enough to hide what surrounds them.
CPU_SIZES, GPU_SIZES = (1024, 2048, 3072), (4096, 8192, 16384)
COPIED = 2**28
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Shape = tuple[int, int, int, int]


def main(argv: Sequence[str] | None = None) -> None:
    args = main_options(__doc__, device=True).parse_args(argv)
    device = pick_device(args.device)
    report = Report("machine", args)
    for key, value in describe(device).items():
        report.say(f"{key:12} {value}")
    sizes = (256,) if args.quick else None
    for precision in ("fp32",) if device.type == "cpu" else ("fp32", "bf16"):
        report.fact(f"GEMM {precision}", gemm_rate(device, precision, sizes) / 1e9, "GFLOP/s")
    report.fact("copy", copy_bandwidth(device, 2**20 if args.quick else COPIED) / 1e9, "GB/s")
    report.write()


def describe(device: torch.device) -> dict[str, str]:
    """Processor, memory, threads and versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "numpy": np.__version__,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found["GPU"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gemm_rate(
    device: torch.device, precision: str = "fp32", sizes: Sequence[int] | None = None, tries: int = 3
) -> float:
    """FLOP/s of the best of several square matrix products, in a burst."""
    return max(square_rates(device, precision, sizes, tries).values())


def held_gemm_rate(device: torch.device, precision: str, duration: float, sizes: Sequence[int] | None = None) -> float:
    """FLOP/s that square matrix products keep up for about ``duration`` seconds, at the size that is best in a burst.

    What takes a second is compared with this one: a burst finds the processor alone and at its highest clock, which
    nothing of that length does.
    """
    rates = square_rates(device, precision, sizes, tries=1)
    size = max(rates, key=rates.get)
    return shape_rate((1, size, size, size), device, precision, tries=1, burst=duration)


def square_rates(device: torch.device, precision: str, sizes: Sequence[int] | None, tries: int) -> dict[int, float]:
    """FLOP/s of square matrix products, by their size."""
    sizes = sizes or (CPU_SIZES if device.type == "cpu" else GPU_SIZES)
    return {size: shape_rate((1, size, size, size), device, precision, tries) for size in sizes}


def shape_rate(
    shape: Shape, device: torch.device, precision: str = "fp32", tries: int = 3, burst: float = 0.02
) -> float:
    """FLOP/s of a product (batch, m, k) · (batch, k, n), repeated for ``burst`` seconds, the best of some tries."""
    batch, m, k, n = shape
    left = torch.randn(batch, m, k, device=device, dtype=DTYPES[precision])
    right = torch.randn(batch, k, n, device=device, dtype=DTYPES[precision])
    out = left @ right
    work = 2 * batch * m * k * n
    times = max(1, int(burst / max(seconds(lambda: torch.matmul(left, right, out=out), device), 1e-9)))

    def repeated() -> None:
        for _ in range(times):
            torch.matmul(left, right, out=out)

    return max(times * work / seconds(repeated, device) for _ in range(tries))


def rate_at(shapes: Mapping[Shape, int], device: torch.device, precision: str = "fp32") -> float:
    """FLOP/s of all these products one after another, each as often as it is given and at its own best rate."""
    work = {shape: 2 * math.prod(shape) * times for shape, times in shapes.items()}
    return sum(work.values()) / sum(work[shape] / shape_rate(shape, device, precision) for shape in work)


def copy_bandwidth(device: torch.device, size: int = COPIED, tries: int = 5) -> float:
    """Bytes/s that a large copy reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return max(2 * size / seconds(lambda: target.copy_(source), device) for _ in range(tries))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's queue empty before and after."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each variant in each round, A B C A B C …; calls that warm up are the caller's."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in tqdm(range(rounds), "rounds", disable=None, leave=False):
        for name, work in variants.items():
            times[name].append(seconds(work, device))
    return times


def ratio(times: Mapping[str, Sequence[float]], slow: str = "plain", fast: str = "ours") -> float:
    """The median over the rounds of how many times longer the slow variant takes."""
    return median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has held, or that its tensors have on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: there a process begins with the peak of the one that started it.
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8")).group(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peaks_apart(script: str, argv: Sequence[str]) -> dict[str, int]:
    """Peak memory of each variant, each in a process of its own that runs ``script --only VARIANT``."""
    return {name: _child([str(ROOT / "benchmarks" / script), *argv, "--only", name]) for name in ("plain", "ours")}


def _child(command: Sequence[str]) -> int:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def print_peak(device: torch.device) -> None:
    """What ``peaks_apart`` reads."""
    print(json.dumps({"peak": peak_memory(device)}))


if __name__ == "__main__":
    main()
