"""Model files with random weights, for tests of detection."""

import functools

from made_videos import write_video
from tiny import METHOD_FLAGS, SHARED_FLAGS, quietly, strings

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.cli.options import option_file_of, settings_of
from clipfusionvad.datasets import UCF
from clipfusionvad.engine.checkpoint import make_hparams, model_content, state_without_clip
from clipfusionvad.engine.setup import build_model
from clipfusionvad.io.files import write_torch

#: Frames of the video of ``make_place``.
FRAMES = 70


def make_place(folder):
    """Write a video and a model, and return their folder."""
    write_video(folder / "video.mp4", FRAMES)
    write_model(folder / "vadclip.pt", "vadclip")
    return folder


def score(video, model, output, *flags):
    """Score a video and return the folder of the results."""
    outcome = detect([video, "--checkpoint", model, "--device", "cpu", "--output", output, *flags])
    assert outcome.code == 0, outcome.err
    return output


def write_model(path, method, dataset=UCF):
    """A model file of random weights, and the model."""
    frames = ["--frames-per-snippet", 1 if method == "anomalyclip" else 16]
    flags = strings(["--method", method], SHARED_FLAGS, frames, METHOD_FLAGS[method], ["--seed", 5])
    args = option_file_of(dataset).parse_args(flags)
    model, clip = build_model(settings_of(args, dataset).model, dataset, args.seed)
    for name in model.centroid_buffers:
        model.get_buffer(name).zero_()
    write_torch(path, model_content(make_hparams(model, clip, dataset, vars(args)), state_without_clip(model)))
    return model.eval()


detect = functools.partial(quietly, lambda argv: package_main(["detect", *map(str, argv)]))
