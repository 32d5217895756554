"""Sampling of T rows from a video, against the loaders of four released programs."""

import numpy as np
from originals import each_case, read_config

from clipfusionvad.data.sampling import SegmentSampling


@each_case("baselines_sampling")
def test_rows_of_videos_of_any_length(case):
    config, inputs, outputs = read_config(case), np.load(case / "inputs.npz"), np.load(case / "outputs.npz")
    for count in config["lengths"]:
        video = inputs[f"video_{count}"]
        for length in config["targets"]:
            means, valid = SegmentSampling(length).sample(video, None)
            assert valid == length
            assert np.abs(means - outputs[f"mean_pool/{count}_to_{length}"]).max() <= 1e-6
            picked, valid = SegmentSampling(length, pick=True).sample(video, None)
            assert valid == min(count, length)
            assert np.array_equal(picked, outputs[f"pick_or_pad/{count}_to_{length}"])
