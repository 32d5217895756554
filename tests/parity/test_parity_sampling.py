"""Sampling, windows and label vectors against the released code."""

import numpy as np
import pytest
from originals import each_case, read_config

from clipfusionvad.data import sample_uniform, split_windows
from clipfusionvad.data.sampling import average_chunks, window_lengths
from clipfusionvad.datasets import DATASETS, multi_hot
from clipfusionvad.io.errors import UserError


@each_case("sampling")
def test_sampling(case):
    config = read_config(case)
    inputs, outputs = np.load(case / "inputs.npz"), np.load(case / "outputs.npz")
    for item in config["items"]:
        features, length = inputs[item["key"]], item.get("t_max", config["t_max"])
        assert features.dtype == item["dtype"] and len(features) == item["n"]

        sampled, count = sample_uniform(features, length)
        np.testing.assert_array_equal(sampled, outputs[f"process_feat_{item['key']}"])
        assert sampled.dtype == item["process_feat"]["dtype"] and count == item["process_feat"]["length"]

        windows, count = split_windows(features, length)
        expected = outputs[f"process_split_{item['key']}"]
        np.testing.assert_array_equal(windows, expected.reshape(windows.shape))
        assert windows.dtype == item["process_split"]["dtype"] and count == item["process_split"]["length"]

        if "uniform_extract" in item:
            np.testing.assert_array_equal(average_chunks(features, length), outputs[f"uniform_extract_{item['key']}"])

    for count, expected in config["test_window_lengths"].items():
        assert window_lengths(int(count), config["t_max"]).tolist() == expected


@each_case("sampling")
def test_label_vectors(case):
    for name, group in read_config(case)["batch_labels"].items():
        labels = [label for label, _ in group["label_map"]]
        # The released code splits labels at "-" for exactly seven classes.
        vectors = multi_hot(group["texts"], labels, multi_label=len(labels) == 7)
        np.testing.assert_array_equal(vectors, group["vectors"])
        for text, vector in zip(group["texts"], group["vectors"], strict=True):
            if name in DATASETS and not any(vector):
                with pytest.raises(UserError, match="unknown label"):
                    DATASETS[name].encode(text)
