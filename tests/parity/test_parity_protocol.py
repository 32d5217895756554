"""The test scripts, through their command line alone, against what the original test scripts print."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import torch
from cases import each_case
from originals import (
    METHODS,
    assert_all_close,
    assert_mistakes_are_caught,
    compute_twice,
    load_original,
    model_options,
    read_config,
)

from clipfusionvad.data.features import load_features
from clipfusionvad.data.lists import read_list
from clipfusionvad.datasets import DATASETS
from clipfusionvad.engine.evaluator import score_videos
from clipfusionvad.io.npy import read_array
from clipfusionvad.metrics import detection_map

VARIANTS = pytest.mark.parametrize("suffix", ["", "_vadclip"], ids=["clipfusionvad", "vadclip"])


def find_model(case, config, suffix):
    """Folder and config of the model that a protocol case is measured with."""
    config_path = (case / config["model_config"]).resolve()
    if suffix:
        config_path = (
            config_path.parent.parent / config_path.parent.name.replace("clipfusion", "vadclip") / "config.json"
        )
    return config_path.parent, read_config(config_path.parent)


def dataset_of(config):
    labels = [label for label, _ in config["label_map"]]
    return next(dataset for dataset in DATASETS.values() if dataset.labels == labels)


def truth_flags(folder):
    flags = []
    for flag, pattern in (("--gt-segment-path", "gt_segment*.npy"), ("--gt-label-path", "gt_label*.npy")):
        flags += [flag, str(next(folder.glob(pattern)))]
    frames = [path for path in folder.glob("gt*.npy") if "segment" not in path.name and "label" not in path.name]
    return [*flags, "--gt-path", str(frames[0])]


@VARIANTS
@each_case("protocol_")
def test_script(case, suffix, tmp_path, capsys):
    config = read_config(case)
    dataset = dataset_of(config)
    expected_path = case / f"expected{suffix}.json"
    if not expected_path.exists():
        pytest.skip(f"{expected_path.name} is not part of this case")
    expected = json.loads(expected_path.read_text())
    folder, model_config = find_model(case, config, suffix)
    argv = ["--method", METHODS[model_config["model_class"]], "--model-path", str(folder / "checkpoint.pth")]
    if model_config["clip"]:
        argv += ["--clip", str(folder / model_config["clip"])]
    for option, value in model_options(model_config).items():
        argv += [f"--{option.replace('_', '-')}", str(value)]
    argv += ["--test-list", str(case / config["csv"]), "--feature-root", str(case), "--device", "cpu"]
    argv += [*truth_flags(case / "list"), "--metrics-json", str(tmp_path / "m.json")]

    script = importlib.import_module(f"{dataset.name}_test")
    assert script.main(argv) == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "m.json").read_text())
    for ours, theirs in (("auc1", "AUC1"), ("ap1", "AP1"), ("auc2", "AUC2"), ("ap2", "AP2")):
        tolerance = max(1e-4, 3 * expected["sensitivity_to_3e-6_relative_noise"][theirs])
        assert metrics[ours] == pytest.approx(expected[theirs], abs=tolerance), ours
    for iou, value in zip(expected["iou"], expected["dmap"], strict=True):
        assert metrics["map"][str(iou)] == pytest.approx(value, abs=1e-6), iou
    assert metrics["map_average"] == pytest.approx(expected["average_mAP"], abs=1e-6)


@VARIANTS
@each_case("protocol_")
def test_scores(case, suffix):
    config = read_config(case)
    dataset = dataset_of(config)
    if not (case / f"scores{suffix}.npz").exists():
        pytest.skip(f"scores{suffix}.npz is not part of this case")
    recorded = np.load(case / f"scores{suffix}.npz")
    folder, model_config = find_model(case, config, suffix)
    model = load_original(folder, model_config, folder / "checkpoint.pth")
    entries = read_list(case / config["csv"], case, dataset)
    features = [load_features(entry.path) for entry in entries]

    def compute(model):
        scores = score_videos(model, features, torch.device("cpu"))
        assert [video.anomaly.shape[1] for video in scores] == recorded["lengths"].tolist()
        prob1, prob2 = np.concatenate([video.anomaly for video in scores], axis=1)
        return {"prob1": prob1, "prob2": prob2, "softmax2": np.concatenate([video.classes for video in scores])}

    results = compute_twice(model, compute)
    assert_all_close(results, recorded)
    assert_mistakes_are_caught(results, recorded)


@VARIANTS
@each_case("protocol_")
def test_detection_of_the_recorded_scores(case, suffix):
    config = read_config(case)
    if not (case / f"scores{suffix}.npz").exists():
        pytest.skip(f"scores{suffix}.npz is not part of this case")
    recorded = np.load(case / f"scores{suffix}.npz")
    expected = json.loads((case / f"expected{suffix}.json").read_text())
    flags = truth_flags(case / "list")
    segments, labels = (read_array(flags[index], "truth") for index in (1, 3))
    probs = np.split(recorded["softmax2"], np.cumsum(recorded["lengths"])[:-1])
    frames = [np.full(len(video), 16) for video in probs]
    classes = dataset_of(config).labels
    for exclude_normal, key in ((False, "dmap"), (True, "dmap_excludeNormal")):
        found = detection_map(probs, segments, labels, classes, exclude_normal, frames)
        assert list(found["map"].values()) == pytest.approx(expected[key], abs=1e-6)
