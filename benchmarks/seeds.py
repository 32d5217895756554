"""Five seeds with --seeds against five separate runs: time, memory, and whether the numbers are the same.

    python benchmarks/seeds.py [--size small|full] [--method vadclip] [--seeds 5] [--epochs 2] [--device cpu]

Features are random, in the shape of UCF-Crime: `full` has its 16,100 training rows of 256 snippets by 512, its 290 test
videos and a text tower of CLIP's size (random weights), and is meant for a GPU; `small` is a reduced form for a CPU.
Every training is a whole run of the program in a process of its own: reading lists, training, tests, pictures, page.
The seconds are those of the run, without Python's start; on a CPU those of its cores, whatever else the machine does.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.machine import peak_memory
from clipfusionvad.cli.options import option_file_of
from clipfusionvad.cli.train import train
from clipfusionvad.data.annotations import Annotation, write_annotations_csv
from clipfusionvad.datasets import UCF
from clipfusionvad.engine.device import pick_device
from clipfusionvad.io.files import write_array, write_csv, write_torch
from clipfusionvad.models import find_method
from clipfusionvad.models.clip import toy_state

FRAMES = 16


@dataclass(frozen=True)
class Size:
    width: int
    length: int
    text_layers: int
    train_videos: int
    crops: int
    test_videos: int
    batch: int


SIZES = {
    "small": Size(width=128, length=64, text_layers=2, train_videos=60, crops=1, test_videos=14, batch=8),
    "full": Size(width=512, length=256, text_layers=12, train_videos=1610, crops=10, test_videos=290, batch=64),
}


@dataclass(frozen=True)
class Cost:
    seconds: float
    memory: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--method", default="vadclip")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device, seeds = pick_device(args.device), range(214, 214 + args.seeds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = make_data(folder, SIZES[args.size], args.method)
        options += ["--method", args.method, "--max-epoch", str(args.epochs), "--device", str(device)]
        alone = [measure(folder / f"alone{seed}", [*options, "--seed", str(seed)]) for seed in seeds]
        together = measure(folder / "together", [*options, "--seeds", *map(str, seeds)])
        same = sum(losses(folder / f"alone{seed}") == losses(folder / f"together/seed{seed}") for seed in seeds)
    total, most = sum(cost.seconds for cost in alone), max(cost.memory for cost in alone)
    unit = "core seconds" if device.type == "cpu" else "seconds"
    print(f"{args.method}, size {args.size}, {args.epochs} epochs, {device}, torch {torch.__version__}")
    print(f"  {len(alone)} alone     {total:8.1f} {unit} {most / 2**20:8.0f} MiB at most")
    print(f"  {len(alone)} together  {together.seconds:8.1f} {unit} {together.memory / 2**20:8.0f} MiB")
    print(f"  {total / together.seconds:.2f} times as fast; losses equal to the last bit: {same} of {len(alone)}")


def losses(run: Path) -> bytes:
    return (run / "losses.csv").read_bytes()


def measure(folder: Path, options: list[str]) -> Cost:
    """A run in a process of its own."""
    argv = [*options, "--output-dir", str(folder), "--model-path", str(folder / "model.pth")]
    argv += ["--checkpoint-path", str(folder / "checkpoint.pth")]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, argv).result()


def run(argv: list[str]) -> Cost:
    args: Any = option_file_of(UCF).parse_args(argv)
    device = pick_device(args.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if train(args, UCF) != 0:
            raise KeyboardInterrupt
    return Cost(clock() - start, peak_memory(device))


def make_data(folder: Path, size: Size, method: str) -> list[str]:
    """Features, lists, truth and a CLIP in a folder; the options by which a method of one stream finds them."""
    rng, truth = np.random.default_rng(0), []
    for split, videos, crops in (("train", size.train_videos, size.crops), ("test", size.test_videos, 1)):
        rows = []
        for number in tqdm(range(videos), f"making {split} features", disable=None, leave=False):
            label = UCF.labels[1 + number // 2 % (len(UCF.labels) - 1)] if number % 2 else UCF.labels[0]
            count = int(np.clip(rng.lognormal(np.log(size.length / 2), 1), 8, 40 * size.length))
            name = f"{label}{number:04d}_{split}"
            first = folder / split / f"{name}__0.npy"
            write_array(first, rng.standard_normal((count, size.width), np.float32).astype(np.float16))
            for crop in range(1, crops):
                os.link(first, folder / split / f"{name}__{crop}.npy")
            rows += [(f"{split}/{name}__{crop}.npy", label) for crop in range(crops)]
            if split == "test":
                event = [(0, count * FRAMES // 3)] if number % 2 else []
                truth.append(Annotation(name, event, [label] * len(event), count * FRAMES, label))
        write_csv(folder / f"{split}.csv", ("path", "label"), rows)
    write_annotations_csv(folder / "truth.csv", truth)
    write_torch(folder / "clip.pt", toy_state(size.width, size.text_layers))
    named = {"train-list": "train.csv", "test-list": "test.csv", "gt-path": "truth.csv", "clip": "clip.pt"}
    sizes = {"embed-dim": size.width, "visual-width": size.width, "batch-size": size.batch}
    sizes |= {"visual-length": size.length} if "visual_length" in find_method(method).option_names() else {}
    sizes |= {"frames-per-snippet": FRAMES}
    files = {flag: folder / name for flag, name in named.items()}
    return [f"--{flag}={value}" for flag, value in (files | sizes).items()]


if __name__ == "__main__":
    main()
