"""--feature-dim and --feature-norm: features of another width or scale in front of every method."""

import csv
import json

import numpy as np
import pytest
import torch
from refusal import assert_refused
from tiny import WIDTH, make_tiny, package_main, quietly, strings

from clipfusionvad import create_model
from clipfusionvad.engine.checkpoint import read_model_file
from clipfusionvad.io.errors import UserError
from clipfusionvad.models import find_method, method_names
from clipfusionvad.models.layers.feature_map import FeatureMap

SMALL = {"visual_length": 32, "num_segments": 4, "seg_length": 8, "visual_width": 64, "embed_dim": 64}
DIM = 40


def small(method, **options):
    torch.manual_seed(0)
    known = {name: SMALL[name] for name in SMALL if name in find_method(method).option_names() or name == "embed_dim"}
    return create_model(method, ["normal", "fire", "fight"], clip="toy", **known, **options).eval()


@pytest.mark.parametrize("method", method_names())
def test_every_method_takes_features_of_another_width(method):
    if not find_method(method).trained:
        with pytest.raises(UserError, match=f"{method} has nothing to train, so no map of features of width {DIM}"):
            small(method, feature_dim=DIM)
        return
    plain, mapped = small(method), small(method, feature_dim=DIM, feature_norm="standardize")
    own = {key: value for key, value in mapped.state_dict().items() if not key.startswith("feature_map.")}
    for key, value in plain.state_dict().items():
        assert torch.equal(own[key].nan_to_num(), value.nan_to_num()), key
    videos = [3 * np.random.default_rng(n).normal(size=(n, DIM * len(mapped.streams))) + 1 for n in (20, 70)]
    mapped.feature_map.set_statistics(videos)
    mapped.set_normal_centroid(mapped.feature_map.map_video(video) for video in videos)
    plain.set_normal_centroid(mapped.feature_map.map_video(video) for video in videos)
    scores, classes = mapped.score_video(videos[1].astype(np.float32))
    wanted, of_classes = plain.score_video(mapped.feature_map.map_video(videos[1]))
    np.testing.assert_allclose(scores, wanted, atol=1e-6)
    assert (classes is None) == (of_classes is None)
    with pytest.raises(UserError, match=f"scores .*snippets, {DIM}"):
        mapped.score_video(np.zeros((9, 64 * len(mapped.streams)), np.float32))


@pytest.mark.parametrize("norm", ["none", "l2", "standardize"])
def test_the_map_is_that_of_a_plain_loop(norm):
    rng = np.random.default_rng(3)
    videos = [rng.normal(size=(rows, 2 * 5)).astype(np.float32) * 7 + 300 for rows in (1, 4, 9)]
    feature_map = FeatureMap(3, 2, feature_dim=5, feature_norm=norm)
    if norm == "standardize":
        feature_map.set_statistics(videos)
    rows = np.concatenate(videos).astype(np.float64)
    visual = torch.from_numpy(np.stack([videos[1], videos[2][:4]]))
    mapped = feature_map(visual, torch.tensor([4, 2])).detach().numpy()
    for video, length in enumerate((4, 2)):
        for row in range(4):
            for stream, linear in enumerate(feature_map.linear):
                own = slice(5 * stream, 5 * stream + 5)
                value = visual[video, row, own].double().numpy()
                if norm == "l2":
                    value = value / np.sqrt((value**2).sum())
                if norm == "standardize":
                    value = (value - rows[:, own].mean(axis=0)) / rows[:, own].std(axis=0)
                wanted = linear.weight.detach().numpy() @ value + linear.bias.detach().numpy()
                found = mapped[video, row, 3 * stream : 3 * stream + 3]
                np.testing.assert_allclose(found, wanted if row < length else 0, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tiny = make_tiny("ucf", tmp_path_factory.mktemp("data") / "tiny").at(tmp_path_factory.mktemp("trained"))
    done = tiny.train(*FLAGS, "--feature-dim", WIDTH, "--feature-norm", "standardize")
    assert done.code == 0, done.err
    return tiny


FLAGS = ["--visual-width", 32, "--embed-dim", 32]


def test_a_training_keeps_the_statistics_of_its_list_and_a_test_needs_no_option(trained, tmp_path):
    file = read_model_file(trained.work / "model.pth")
    with open(trained.train_list) as listed:
        paths = [trained.folder / row["path"] for row in csv.DictReader(listed)]
    rows = np.concatenate([np.load(path) for path in paths]).astype(np.float64)
    np.testing.assert_allclose(file.state["feature_map.mean"], rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(file.state["feature_map.std"], rows.std(axis=0), rtol=1e-5)
    metrics = json.loads((trained.work / "run/metrics.json").read_text())["best"]
    at = trained.at(tmp_path)
    command = ["test", "--dataset", "ucf", "--model-path", trained.work / "model.pth", "--metrics-json", tmp_path / "m"]
    truth = [item for pair in trained.arrays.items() for item in pair]
    done = quietly(package_main, strings(command, truth, ["--test-list", trained.test_list, "--device", "cpu"]))
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "m").read_text())["auc1"] == metrics["auc1"]
    says = f"features of dim {WIDTH}, but 32 are expected: train with --feature-dim {WIDTH}"
    assert_refused(at.train, at, *FLAGS, says=says)


def test_an_export_holds_the_map_and_the_released_form_has_none(trained, tmp_path):
    for suffix, code in ((".safetensors", 0), (".pt2", 0), (".pth", 2)):
        words = ["export", trained.work / "model.pth", "--output", tmp_path / f"model{suffix}"]
        outcome = quietly(package_main, strings(words))
        assert outcome.code == code, outcome.err
    assert "the original code has no --feature-dim" in outcome.err


@pytest.mark.slow
def test_the_untrained_model_of_a_demo_has_the_statistics(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = ["train", "--demo", "--dataset", "ucf", "--feature-norm", "standardize", "--max-epoch", 1]
    done = quietly(package_main, strings(train, ["--output-dir", "run", "--model-path", "model.pt", "--device", "cpu"]))
    assert done.code == 0, done.err
    test = ["test", "--demo", "--dataset", "ucf", "--model-path", "model.pt", "--metrics-json", "m.json"]
    assert quietly(package_main, strings(test, ["--device", "cpu"])).code == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["untrained"]["auc1"] != metrics["best"]["auc1"]
