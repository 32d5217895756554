"""Detection mAP, sampling, windows and label vectors against the released code; and the comparison itself."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from originals import assert_all_close, cases, compute_twice, each_case, parity_dir, read_config

from clipfusionvad import create_model
from clipfusionvad.data import sample_uniform, split_windows
from clipfusionvad.data.sampling import average_chunks, window_lengths
from clipfusionvad.datasets import DATASETS, multi_hot
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.npy import read_array
from clipfusionvad.metrics import detection_map

MODES = pytest.mark.parametrize("exclude_normal", [False, True], ids=["all", "exclude_normal"])


def both_ways(frame_probs: list[np.ndarray], repeats16: bool) -> list[dict]:
    """The same predictions as frames and, where snippets stand for 16 frames each, as snippets."""
    ways = [{"class_probs": frame_probs}]
    if repeats16:
        snippets = [probs[::16] for probs in frame_probs]
        ways.append({"class_probs": snippets, "frames": [np.full(len(probs), 16) for probs in snippets]})
    return ways


def generated(case: Path, config: dict, segments: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    folder = next(path for path in (case, case.parent, parity_dir()) if (path / "gen_dmap.py").exists())
    spec = importlib.util.spec_from_file_location("gen_dmap", folder / "gen_dmap.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    predictions = generator.predictions(config["dataset"], config["seed"], segments, labels)
    digest = hashlib.sha256(b"".join(probs[::16].tobytes() for probs in predictions)).hexdigest()
    assert digest == config["sha256_of_snippet_rows"], "the generated predictions are not those that were measured"
    return predictions


@each_case("dmap_")
def test_full_size(case):
    config = read_config(case)
    expected = json.loads((case / "expected.json").read_text())
    segments = read_array(case / config["gt_segment"], "truth segments")
    labels = read_array(case / config["gt_label"], "truth labels")
    for way in both_ways(generated(case, config, segments, labels), repeats16=True):
        for exclude_normal in (False, True):
            recorded = expected[f"excludeNormal_{exclude_normal}"]
            truth = {"segments": segments, "labels": labels, "class_labels": config["classlist"]}
            result = detection_map(**way, **truth, exclude_normal=exclude_normal)
            assert list(result["map"]) == recorded["iou"]
            assert list(result["map"].values()) == pytest.approx(recorded["dmap"], rel=0, abs=1e-6)
            assert result["average"] == pytest.approx(recorded["average"], rel=0, abs=1e-6)
            per_class = zip(result["per_class"].values(), recorded["per_class_ap"], recorded["types"], strict=True)
            for aps, known, kind in per_class:
                if kind != "int":  # an int 0 was returned before the APs were complete
                    assert aps == pytest.approx(known, rel=0, abs=1e-6)


def edge_cases() -> list:
    found = [
        pytest.param(folder, name, id=f"{folder.name}-{name}")
        for folder in cases("dmap_", "cases.json")
        for name in json.loads((folder / "cases.json").read_text())
    ]
    skip = pytest.mark.skip(reason=f"no dmap_*/cases.json in {parity_dir()}; name the folder in PARITY_DIR")
    return found or [pytest.param(None, "", id="none", marks=skip)]


@MODES
@pytest.mark.parametrize(("folder", "name"), edge_cases())
def test_small(folder, name, exclude_normal):
    case = json.loads((folder / "cases.json").read_text())[name]
    recorded = case["result"][str(exclude_normal)]
    with np.load(folder / "scores.npz") as scores:
        probs = np.split(scores[name], np.cumsum(case["lengths"])[:-1])
    if case["repeat16"]:
        probs = [np.repeat(rows, 16, axis=0) for rows in probs]
    truth = {key: case[key] for key in ("segments", "labels")} | {"class_labels": DATASETS[case["ds"]].labels}
    for way in both_ways(probs, case["repeat16"]):
        if "raises" in recorded:
            with pytest.raises(ValueError, match="truth label"):
                detection_map(**way, **truth, exclude_normal=exclude_normal)
            continue
        result = detection_map(**way, **truth, exclude_normal=exclude_normal)
        if "ties" in name:
            # The released sort is unstable: with tied scores its numbers are those of one numpy build and
            # processor. Only whether anything is found does not depend on the order.
            assert [value > 0 for value in result["map"].values()] == [value > 0 for value in recorded["dmap"]]
            continue
        assert list(result["map"].values()) == pytest.approx(recorded["dmap"], rel=0, abs=1e-6)
        for value, kind in zip(result["map"].values(), recorded["types"], strict=True):
            assert kind != "int" or value == 0


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


def test_rounding_passes_and_a_mistake_of_one_in_ten_thousand_does_not():
    torch.manual_seed(3)
    options = {"embed_dim": 64, "visual_width": 64, "visual_length": 32, "visual_layers": 1}
    model = create_model("clipfusionvad", ["normal", "fire"], clip="toy", **options).eval()
    visual, lengths = torch.randn(3, 32, 64), torch.tensor([32, 20, 7])

    def compute(model):
        with torch.no_grad():
            out = model(visual, lengths)
        return {"coarse": out.coarse_logits, "fine": out.fine_logits}

    ours, exact = compute_twice(model, compute)
    assert exact["fine"].dtype == torch.float64
    assert_all_close((ours, exact), exact)
