"""What extraction costs on this machine: decoding, cropping and encoding, each by itself, then the whole command.

    python benchmarks/extract_throughput.py [--quick] [--videos PATH ...] [--device cuda --precision bf16]

Rates of a CPU are per second of one core's time, whatever else the machine does; those of a GPU and of the command are
per second. Beside the given videos, clips are made (static scene, one moving thing, sensor noise), H.264 and HEVC. The
tower is ViT-B/16 with random weights: its speed does not depend on them. docs/scaling.md says what the figures mean.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import cv2
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.machine import ROOT, gemm_rate
from benchmarks.report import Report, main_options
from clipfusionvad.engine.device import count_cores, pick_device
from clipfusionvad.extraction.decode import VideoInfo, read_frames
from clipfusionvad.extraction.encoder import ImageEncoder
from clipfusionvad.extraction.jobs import find_videos
from clipfusionvad.extraction.snippets import cut_windows, to_canvas
from clipfusionvad.models.clip import ClipWeights, openai_clip, toy_state

MADE = {"libx264": "H.264", "libx265": "HEVC"}
HD, SMALL = (1920, 1080), (320, 240)
RATE, BIT_RATE = 30, 4_000_000
#: Pictures that are encoded at once, frames of the videos of the whole command by crops, and videos at a time.
IMAGES = {"cpu": 32, "cuda": 1024}
FRAMES_OF_COMMAND = {"cpu": {1: 16, 10: 16}, "cuda": {1: 1600, 10: 400}}
WORKERS = (1, 4, 16)


def main(argv: Sequence[str] | None = None) -> None:
    parser = main_options(__doc__, device=True)
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument("--videos", nargs="+", default=[], metavar="PATH", help="own videos to decode besides")
    parser.add_argument("--frames", type=int, default=300, help="frames of each clip that are decoded")
    args = parser.parse_args(argv)
    if args.quick:
        args.frames = 16
    report = Report("extraction", args)
    threads = torch.get_num_threads()
    # One thread, so that a second of it is a second of one core.
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    measure_decoding(args, report)
    measure_crops(args, report)
    measure_encoding(args, report)
    torch.set_num_threads(threads)
    measure_command(args, report)
    report.write()


def measure_decoding(args: argparse.Namespace, report: Report) -> None:
    unit = "frames per core second"
    if args.videos:
        sources = [source for source, _ in find_videos(args.videos)]
        frames, seconds = 0, 0.0
        for source in tqdm(sources, "decoding", disable=None, leave=False):
            found, took = decode(source, args.frames)
            frames, seconds = frames + found, seconds + took
        infos: list[VideoInfo] = []
        next(read_frames(sources[0], infos.append))
        (info,) = infos
        report.fact(
            f"decoding {len(sources)} videos like {info.width}x{info.height} {info.codec}", frames / seconds, unit
        )
    with tempfile.TemporaryDirectory() as folder:
        for codec, name in MADE.items():
            path = Path(folder, f"{codec}.mp4")
            write_clip(path, codec, args.frames, HD)
            frames, seconds = decode(str(path), args.frames)
            bitrate = path.stat().st_size * 8 * RATE / frames / 1e6
            report.fact(f"decoding {HD[0]}x{HD[1]} {name}, {bitrate:.1f} Mbit/s", frames / seconds, unit)


def decode(source: str, count: int) -> tuple[int, float]:
    """Frames read, and the time of all threads that it took."""
    start = time.process_time()
    frames = sum(1 for _ in islice(read_frames(source), count))
    return frames, time.process_time() - start


def write_clip(path: Path, codec: str, count: int, size: tuple[int, int]) -> None:
    """A static scene with a thing that moves through it and noise."""
    width, height = size
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(0, 256, (27, 48, 3), np.uint8), size, interpolation=cv2.INTER_CUBIC)
    noise = rng.integers(-8, 9, (8, height, width, 1)).astype(np.int16)
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=RATE, options={"preset": "veryfast", **quiet})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = BIT_RATE * width * height // (HD[0] * HD[1])
        for index in tqdm(range(count), f"making {codec}", disable=None, leave=False):
            picture = np.clip(scene + noise[index % len(noise)], 0, 255).astype(np.uint8)
            left = 8 * index % (width - width // 10)
            picture[height // 3 : 2 * height // 3, left : left + width // 10] = (200, 60, 40)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))


def measure_crops(args: argparse.Namespace, report: Report) -> None:
    rng = np.random.default_rng(0)
    for width, height in (SMALL, HD):
        frames = [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(16)]
        for crops in (1, 10):
            rate = per_second(partial(cut, frames, range(crops)), len(frames), args.quick)
            report.fact(f"resizing and cropping {width}x{height}, {named(crops)}", rate, "frames per core second")


def named(crops: int) -> str:
    return "1 crop" if crops == 1 else f"{crops} crops"


def cut(frames: list[np.ndarray], crops: Sequence[int]) -> np.ndarray:
    return cut_windows(np.stack([to_canvas(frame) for frame in frames]), crops)


def measure_encoding(args: argparse.Namespace, report: Report) -> None:
    device, tower = pick_device(args.device), made_tower()
    # Fused attention is not counted.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tower(torch.zeros(1, 3, 224, 224))
    flop = counter.get_total_flops()
    report.fact("ViT-B/16, a picture of 224x224", flop / 2e9, "GMAC")
    count = 4 if args.quick else IMAGES[device.type]
    encoder = ImageEncoder(ClipWeights(clip_state(tower), "random"), device, args.precision, min(count, 256))
    images = np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), np.uint8)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    rate = per_second(lambda: encoder.encode(images), count, args.quick, clock)
    unit = "pictures per core second" if device.type == "cpu" else "pictures per second"
    report.fact(f"encoding, {device}, {args.precision}", rate, unit)
    gemm = gemm_rate(device, args.precision, (256,) if args.quick else None)
    report.limit("encoding", rate * flop / 1e9, gemm / 1e9, "GFLOP/s")


def made_tower() -> torch.nn.Module:
    """CLIP's ViT-B/16 with random weights."""
    return openai_clip().model.VisionTransformer(
        input_resolution=224, patch_size=16, width=768, layers=12, heads=12, output_dim=512
    )


def clip_state(tower: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a CLIP with this image tower and a small text tower."""
    text = {key: value for key, value in toy_state(512).items() if not key.startswith("visual.")}
    return text | {f"visual.{key}": value for key, value in tower.state_dict().items()}


def measure_command(args: argparse.Namespace, report: Report) -> None:
    """The whole command by crops and workers: decoding, cropping, encoding and writing at the same time."""
    frames_of = {1: 16} if args.quick else FRAMES_OF_COMMAND[torch.device(args.device).type]
    numbers = [1] if args.quick else [count for count in WORKERS if count <= count_cores()]
    with tempfile.TemporaryDirectory() as name:
        folder, clip = Path(name), "toy"
        if not args.quick:
            clip = str(folder / "clip.pt")
            torch.save(clip_state(made_tower()), clip)
        flags = ["--device", args.device, "--precision", args.precision, "--clip", clip]
        for crops, frames in frames_of.items():
            # What starts and ends the command takes as long for short videos as for long ones.
            clips = {times: folder / f"{crops}-{times}.mp4" for times in (1, 3)}
            for times, path in clips.items():
                write_clip(path, "libx264", times * frames, SMALL)
            for workers in numbers:
                took = []
                for path in clips.values():
                    videos = folder / f"{path.stem}-{workers}"
                    videos.mkdir()
                    for number in range(workers):
                        shutil.copy(path, videos / f"{number}.mp4")
                    given = ["--videos", videos, "--output", folder / f"{videos.name} features", *flags]
                    took.append(run_extract([*given, "--crops", crops, "--workers", workers]))
                rate = 2 * frames * workers / max(took[1] - took[0], 1e-3)
                what = f"extract, {SMALL[0]}x{SMALL[1]}, {named(crops)}, {workers} at a time"
                report.fact(what, rate, "frames per second")


def run_extract(options: Sequence[object]) -> float:
    """Seconds that the command takes in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "clipfusionvad", "extract", *map(str, options)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def per_second(
    work: Callable[[], object], items: int, quick: bool, clock: Callable[[], float] = time.process_time
) -> float:
    """How many items a second are done; the first pass only warms up."""
    work()
    start, passes = clock(), 0
    while passes == 0 or (clock() - start < 2 and not quick):
        work()
        passes += 1
    return passes * items / max(clock() - start, 1e-6)


if __name__ == "__main__":
    main()
