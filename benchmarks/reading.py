"""Reading an epoch of training inputs: packed features against single files, as the original code reads them.

    python benchmarks/reading.py [--rows 1600] [--full] [--folder DIR]

Made-up float16 features of dim 512, ten crops of each video, lengths as those of UCF-Crime's training videos. Plain is
file after file, each averaged chunk by chunk in Python or padded to 256 snippets. Both give the same float32 batches,
which is checked; each runs in a process of its own, after a first epoch that leaves the files in the page cache, and
the median of three more is told.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.machine import copy_bandwidth, peak_memory
from benchmarks.report import Report, main_options
from benchmarks.sizes import UCF_TRAIN_SNIPPETS
from clipfusionvad.data.lists import Entry, write_list
from clipfusionvad.data.loaders import BagDataset, PackedBatches, ShuffledBatchSampler, load_batches
from clipfusionvad.data.packed import FEATURES, open_store, write_store
from clipfusionvad.data.sampling import WindowSampling
from clipfusionvad.datasets import UCF
from clipfusionvad.engine.device import count_cores

# Snippets of an input, feature dim, crops of a video, batch (64 normal and 64 anomalous videos), rows of UCF-Crime.
T, D, CROPS, BATCH, FULL = 256, 512, 10, 128, 16100
EPOCHS = 3
SAMPLING = WindowSampling(T)
TIMES_FASTER = 10


@dataclass(frozen=True)
class Reading:
    """Seconds of an epoch, a sum over its bytes, and memory in bytes: resident at most, and of it mapped files."""

    seconds: float
    check: int
    peak: int
    mapped: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = main_options(__doc__)
    parser.add_argument("--rows", type=int, default=1600, help="rows of the training list, ten for each video")
    parser.add_argument("--full", action="store_true", help=f"all {FULL} rows, which takes 13 GB of disk")
    parser.add_argument("--folder", help="where the features are made (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    rows = FULL if args.full else 20 if args.quick else args.rows
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(args, Path(folder), rows)


def measure(args: argparse.Namespace, folder: Path, rows: int) -> None:
    report = Report("reading an epoch", args)
    entries = make_features(folder, rows)
    size = sum(entry.path.stat().st_size for entry in entries)
    report.say(f"{len(entries)} rows, {size / 1e6:.0f} MB in single files, {count_cores()} cores")
    start = time.perf_counter()
    write_store(store_of(folder), entries, folder / "list.csv", ["rgb"], D, SAMPLING, "float16", count_cores())
    packed_size = (store_of(folder) / FEATURES).stat().st_size
    report.say(f"packed into {packed_size / 1e6:.0f} MB in {time.perf_counter() - start:.1f} s")
    plain, packed = (apart(read, folder, entries) for read in (read_plain, read_packed))
    assert plain.check == packed.check, "the two ways of reading do not give the same batches"
    for name, found in (("plain", plain), ("packed", packed)):
        report.say(
            f"{name:8}{found.seconds:8.2f} s, {found.seconds / len(entries) * 1e3:.3f} ms a row, peak memory "
            f"{found.peak / 1e6:.0f} MB, {(found.peak - found.mapped) / 1e6:.0f} MB without mapped files"
        )
    goal = None if args.quick else TIMES_FASTER
    report.claim("reading an epoch, times faster", plain.seconds / packed.seconds, "x", goal=goal)
    # Two bytes of a value are read and written, then read again, and four are written.
    moved = len(entries) * T * D * (2 + 2 + 2 + 4)
    copied = copy_bandwidth(torch.device("cpu"))
    report.limit("reading an epoch, memory traffic", moved / packed.seconds / 1e9, copied / 1e9, "GB/s of copying")
    report.write()


def make_features(folder: Path, rows: int) -> list[Entry]:
    """Feature files and a list of them; lengths are spread evenly over the sorted true ones."""
    rng, videos = np.random.default_rng(0), -(-rows // CROPS)
    known = np.array(UCF_TRAIN_SNIPPETS)
    lengths = known[((np.arange(videos) + 0.5) * len(known) / videos).astype(int)]
    entries = []
    for row in tqdm(range(rows), "making features", disable=None, leave=False):
        length = lengths[row // CROPS]
        path = folder / f"Normal_Videos{row // CROPS:04d}_x264__{row % CROPS}.npy"
        # Few random numbers, repeated: how they differ changes no time.
        values = np.resize(rng.standard_normal((61, D), dtype=np.float32), (length, D))
        np.save(path, values.astype(np.float16))
        entries.append(Entry(path, UCF.labels[0], row + 2))
    write_list(folder / "list.csv", entries)
    return entries


def store_of(folder: Path) -> Path:
    return folder / "list.pack"


def apart(work: Callable, *args):
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def read_plain(folder: Path, entries: list[Entry]) -> Reading:
    def batches(epoch: list[np.ndarray]) -> Iterator[torch.Tensor]:
        for rows in epoch:
            yield torch.stack([torch.tensor(sample_plainly(np.load(entries[row].path))) for row in rows]).float()

    return time_epoch(batches, entries)


def sample_plainly(features: np.ndarray) -> np.ndarray:
    """Chunk means one by one, or zeros at the end: the released procedure in its plain form."""
    if len(features) <= T:
        return np.pad(features, ((0, T - len(features)), (0, 0)))
    bounds = np.linspace(0, len(features), T + 1, dtype=np.int32)
    sampled = np.zeros((T, D), np.float32)
    for place, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        sampled[place] = features[start:end].mean(axis=0) if end > start else features[start]
    return sampled


def read_packed(folder: Path, entries: list[Entry]) -> Reading:
    packed = PackedBatches(open_store(store_of(folder)), torch.device("cpu"))
    bags = BagDataset(entries, UCF, SAMPLING, D, packed=packed)
    return time_epoch(lambda epoch: (visual for visual, _, _ in load_batches(bags, epoch, workers=0)), entries)


def time_epoch(batches: Callable[[list[np.ndarray]], Iterator[torch.Tensor]], entries: list[Entry]) -> Reading:
    plan = ShuffledBatchSampler(np.arange(len(entries)), BATCH, seed=0)
    check = 0
    for visual in tqdm(batches(plan.epoch(0)), "checking", disable=None, leave=False):
        check = zlib.crc32(visual.numpy(), check)
    seconds = []
    for epoch in range(1, EPOCHS + 1):
        start = time.perf_counter()
        for _ in tqdm(batches(plan.epoch(epoch)), "reading", disable=None, leave=False):
            pass
        seconds.append(time.perf_counter() - start)
    return Reading(median(seconds), check, peak_memory(torch.device("cpu")), mapped_bytes())


def mapped_bytes() -> int:
    """Resident pages of mapped files, which the system drops when it needs them; 0 where it does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


if __name__ == "__main__":
    main()
