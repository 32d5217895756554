"""What extraction costs on this machine: decoding, cropping and encoding, each by itself.

    python benchmarks/extract_throughput.py [--videos DIR|FILE ...] [--device cpu] [--gpu-tflops 989]

Rates on a CPU are per second of one core's time, whatever else the machine does. Beside the given videos two 1080p
clips are made (static scene, one moving thing, sensor noise), H.264 and HEVC. The tower is ViT-B/16 with random
weights: its speed does not depend on them. docs/scaling.md says what the figures mean.
"""

import argparse
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

from clipfusionvad.engine.device import pick_device
from clipfusionvad.extraction.decode import VideoInfo, read_frames
from clipfusionvad.extraction.encoder import ImageEncoder
from clipfusionvad.extraction.jobs import find_videos
from clipfusionvad.extraction.snippets import cut_windows, to_canvas
from clipfusionvad.models.clip import ClipWeights, openai_clip

MADE = {"libx264": "H.264", "libx265": "HEVC"}
WIDTH, HEIGHT, RATE, BIT_RATE = 1920, 1080, 30, 4_000_000
# Share of its nominal speed that a GPU is assumed to reach with a ViT in half precision.
UTILISATION = 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", nargs="+", default=[], metavar="PATH", help="own videos to decode besides")
    parser.add_argument("--frames", type=int, default=300, help="frames of each clip that are decoded")
    parser.add_argument("--images", type=int, default=32, help="pictures that are encoded")
    parser.add_argument("--device", default="cpu", help="of the tower: cpu, cuda, …")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument("--gpu-tflops", type=float, default=989, help="nominal speed to estimate a GPU by")
    args = parser.parse_args()
    # One thread, so that a second of it is a second of one core.
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    measure_decoding(args.videos, args.frames)
    measure_crops()
    measure_encoding(args)


def measure_decoding(videos: list[str], count: int) -> None:
    print("decoding to RGB, frames per core second")
    if videos:
        sources = [source for source, _ in find_videos(videos)]
        frames, seconds = 0, 0.0
        for source in tqdm(sources, "decoding", disable=None, leave=False):
            found, took = decode(source, count)
            frames, seconds = frames + found, seconds + took
        infos: list[VideoInfo] = []
        next(read_frames(sources[0], infos.append))
        (info,) = infos
        print(f"  {len(sources)} videos like {info.width}x{info.height} {info.codec:6} {frames / seconds:8.0f}")
    with tempfile.TemporaryDirectory() as folder:
        for codec, name in MADE.items():
            path = Path(folder, f"{codec}.mp4")
            write_clip(path, codec, count)
            frames, seconds = decode(str(path), count)
            bitrate = path.stat().st_size * 8 * RATE / frames / 1e6
            print(f"  made {WIDTH}x{HEIGHT} {name:6} {bitrate:4.1f} Mbit/s {frames / seconds:8.0f}")


def decode(source: str, count: int) -> tuple[int, float]:
    """Frames read, and the time of all threads that it took."""
    start = time.process_time()
    frames = sum(1 for _ in islice(read_frames(source), count))
    return frames, time.process_time() - start


def write_clip(path: Path, codec: str, count: int) -> None:
    """A static scene with a thing that moves through it and noise, 1080p."""
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(0, 256, (27, 48, 3), np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    noise = rng.integers(-8, 9, (8, HEIGHT, WIDTH, 1)).astype(np.int16)
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=RATE, options={"preset": "veryfast", **quiet})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = BIT_RATE
        for index in tqdm(range(count), f"making {codec}", disable=None, leave=False):
            picture = np.clip(scene + noise[index % len(noise)], 0, 255).astype(np.uint8)
            left = 8 * index % (WIDTH - 200)
            picture[400:800, left : left + 200] = (200, 60, 40)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))


def measure_crops() -> None:
    print("\nresizing and cropping, frames per core second")
    rng = np.random.default_rng(0)
    for width, height in ((320, 240), (WIDTH, HEIGHT)):
        frames = [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(16)]
        for crops in (1, 10):
            rate = per_second(partial(cut, frames, range(crops)), len(frames))
            print(f"  {width}x{height}, {crops:2} crops {rate:8.0f}")


def cut(frames: list[np.ndarray], crops: Sequence[int]) -> np.ndarray:
    return cut_windows(np.stack([to_canvas(frame) for frame in frames]), crops)


def measure_encoding(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    tower = openai_clip().model.VisionTransformer(
        input_resolution=224, patch_size=16, width=768, layers=12, heads=12, output_dim=512
    )
    state = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    # Fused attention is not counted.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tower(torch.zeros(1, 3, 224, 224))
    flops = counter.get_total_flops()
    encoder = ImageEncoder(ClipWeights(state, "random"), device, args.precision)
    images = np.random.default_rng(0).integers(0, 256, (args.images, 224, 224, 3), np.uint8)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    rate = per_second(lambda: encoder.encode(images), len(images), clock)
    print("\nencoding, ViT-B/16 on 224x224")
    print(f"  {flops / 2e9:.1f} GMAC a picture (counted)")
    unit = "core second" if device.type == "cpu" else "second"
    print(f"  {device} {args.precision}: {rate:.2f} pictures per {unit}, {rate * flops / 1e9:.0f} GFLOP/s (measured)")
    estimate = UTILISATION * args.gpu_tflops * 1e12 / flops
    print(
        f"  a GPU of {args.gpu_tflops:.0f} TFLOP/s: {estimate:.0f} pictures a second "
        f"(estimated from FLOPs at {UTILISATION:.0%} of peak, not measured)"
    )


def per_second(work: Callable[[], object], items: int, clock: Callable[[], float] = time.process_time) -> float:
    """How many items a second are done; the first pass only warms up."""
    work()
    start, passes = clock(), 0
    while clock() - start < 2:
        work()
        passes += 1
    return passes * items / (clock() - start)


if __name__ == "__main__":
    main()
