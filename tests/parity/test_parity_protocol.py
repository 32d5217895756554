"""The test scripts, through their command line only, against what the original test scripts print."""

import importlib
import json

import numpy as np
import originals
import pytest
import torch
from originals import assert_all_close, compute_twice, dataset_of, each_case, load_original, read_config

from clipfusionvad.data.features import load_features
from clipfusionvad.data.lists import read_list
from clipfusionvad.engine.evaluator import score_videos

VARIANTS = pytest.mark.parametrize("suffix", ["", "_vadclip"], ids=["clipfusionvad", "vadclip"])


def find_model(case, config, suffix):
    """Folder and config of the model that a protocol case is measured with."""
    folder = (case / config["model_config"]).resolve().parent
    folder = folder.with_name(folder.name.replace("clipfusion", "vadclip")) if suffix else folder
    return folder, read_config(folder)


def read_recorded(path):
    """Recorded scores or metrics, where they are part of the case."""
    if not path.exists():
        pytest.skip(f"{path.name} is not part of this case")
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


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
    expected = read_recorded(case / f"expected{suffix}.json")
    folder, model_config = find_model(case, config, suffix)
    argv = ["--method", originals.METHODS[model_config["model_class"]], "--model-path", str(folder / "checkpoint.pth")]
    if model_config["clip"]:
        argv += ["--clip", str(folder / model_config["clip"])]
    for option, value in originals.model_options(model_config).items():
        argv += [f"--{option.replace('_', '-')}", str(value)]
    argv += ["--test-list", str(case / config["csv"]), "--feature-root", str(case), "--device", "cpu"]
    argv += [*truth_flags(case / "list"), "--metrics-json", str(tmp_path / "m.json")]

    script = importlib.import_module(f"{dataset_of(config).name}_test")
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
    config, recorded = read_config(case), read_recorded(case / f"scores{suffix}.npz")
    folder, model_config = find_model(case, config, suffix)
    model = load_original(folder, model_config, folder / "checkpoint.pth")
    features = [load_features(entry.path) for entry in read_list(case / config["csv"], case, dataset_of(config))]

    def compute(model):
        scores = score_videos(model, features, torch.device("cpu"))
        assert [video.anomaly.shape[1] for video in scores] == recorded["lengths"].tolist()
        prob1, prob2 = np.concatenate([video.anomaly for video in scores], axis=1)
        return {"prob1": prob1, "prob2": prob2, "softmax2": np.concatenate([video.classes for video in scores])}

    results = compute_twice(model, compute)
    assert_all_close(results, recorded)
