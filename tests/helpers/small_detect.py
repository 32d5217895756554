"""Videos of a few seconds and models of random weights, for tests of detection."""

from __future__ import annotations

import functools
from fractions import Fraction

import av
import numpy as np
import torch
from tiny import METHOD_FLAGS, SHARED_FLAGS, quietly, strings

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.cli.option_files import option_file_of
from clipfusionvad.cli.prepare import prepare_model
from clipfusionvad.datasets import UCF
from clipfusionvad.engine.checkpoint import make_hparams, model_content, state_without_clip
from clipfusionvad.io.files import write_torch

SIZE = (48, 64)


def write_video(path, frames, fps=30.0, codec="libx264", seed=0, **settings):
    """Noise that changes with every second, a grey level that rises; ``settings`` go to ``av.open``."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w", **settings) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(100_000))
        stream.height, stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            if index % 30 == 0:
                picture = rng.integers(0, 120, (*SIZE, 3))
            frame = (picture + index % 100).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_sound(path, seconds=1):
    """A file without a picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for index in range(16 * seconds):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1000 * index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_model(path, method, dataset=UCF):
    """A model file of random weights, and the model."""
    frames = ["--frames-per-snippet", 1 if method == "anomalyclip" else 16]
    args = option_file_of(dataset).parse_args(
        strings(["--method", method], SHARED_FLAGS, frames, METHOD_FLAGS[method], ["--seed", 5])
    )
    model, clip = prepare_model(args, dataset)
    for name in model.centroid_buffers:
        buffer = model.get_buffer(name)
        buffer.copy_(torch.zeros_like(buffer))
    write_torch(path, model_content(make_hparams(model, clip, dataset, vars(args)), state_without_clip(model)))
    return model.eval()


detect = functools.partial(quietly, lambda argv: package_main(["detect", *map(str, argv)]))
