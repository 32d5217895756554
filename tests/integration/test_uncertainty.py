"""The analysis of how a model trusts its modalities, against slow formulas over frames."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LENGTH, WIDTH, make_tiny, quietly, strings

from clipfusionvad import create_model
from clipfusionvad.__main__ import main
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.truth import Truth
from clipfusionvad.datasets import XD
from clipfusionvad.engine.evaluator import VideoDataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.metrics import frame_metrics
from clipfusionvad.models.base import VADOutput
from clipfusionvad.tools.uncertainty import (
    MODALITIES,
    Corruption,
    bernoulli_kl,
    class_averages,
    observe_videos,
    sweep,
    sweep_metrics,
)

CPU = torch.device("cpu")
LABELS = ["B1-0-0", "A", "B1-G-0", "G-0-0"]
SNIPPETS, FRAMES, T, D = [4, 9, 21, 16], [55, 144, 345, 250], 8, 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("iefvad", XD.prompts, visual_width=D, visual_head=2, visual_length=T, num_refinement_steps=2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Four videos whose true lengths cut the last snippet short or hold it, three of them with an event."""
    rng = np.random.default_rng(1)
    truth = [np.zeros(count, np.uint8) for count in FRAMES]
    for index in (0, 2, 3):
        truth[index][20 + index : 50 + index] = 1
    folder = tmp_path_factory.mktemp("videos")
    entries = [Entry(folder / f"v{i}__0.npy", label, i + 2) for i, label in enumerate(LABELS)]
    videos = VideoDataset(entries, XD, D, Truth(truth, [], []))
    # As if they had been read.
    videos._loaded = {row: rng.standard_normal((n, 2 * D)).astype(np.float16) for row, n in enumerate(SNIPPETS)}
    return videos


@pytest.fixture(scope="module")
def clean(model, videos):
    return observe_videos(model, videos, CPU)[0]


@pytest.fixture(scope="module")
def corrupt(model, videos):
    return observe_videos(model, videos, CPU, corruption=Corruption(1, 0.5, seed=3))[0]


def by_frame(table, curve, video):
    """One video's values repeated 16 times, cut or held to its true number of frames."""
    values = table[curve][table.video == video].to_numpy(np.float64)
    return values[np.minimum(np.arange(FRAMES[video]) // 16, len(values) - 1)]


def frames_of(table, curve):
    return np.concatenate([by_frame(table, curve, video) for video in range(len(FRAMES))])


def test_observations_are_those_of_the_models_output(model, videos, clean):
    for video, features in enumerate(videos.features):
        observed = clean[clean.video == video].reset_index()
        np.testing.assert_allclose(observed.anomaly, model.score_video(features)[0], atol=1e-6)
        padded = np.zeros((-(-len(features) // T) * T, 2 * D), np.float32)
        padded[: len(features)] = features
        with torch.no_grad():
            out = model(torch.from_numpy(padded.reshape(-1, T, 2 * D)))
        fused = out.fused.reshape(-1, D).numpy()
        for kind in MODALITIES:
            weight, mu = (getattr(out, f"{kind}_{what}").reshape(-1, D).numpy() for what in ("weight", "mu"))
            for t in range(len(features)):
                cosine = fused[t] @ mu[t] / (np.linalg.norm(fused[t]) * np.linalg.norm(mu[t]))
                distance = math.sqrt(((fused[t] - mu[t]) ** 2).sum())
                expected = {"weight": weight[t].mean(), "cosine": cosine, "euclidean": distance}
                for what, value in expected.items():
                    assert observed[f"{kind}_{what}"][t] == pytest.approx(value, abs=1e-5)


def test_exactly_the_chosen_rows_are_attenuated():
    windows = np.random.default_rng(0).standard_normal((3, 30, 2 * D)).astype(np.float32)
    for modality, stream in enumerate((slice(D), slice(D, None))):
        corruption, expected = Corruption(modality, 0.3, seed=4), windows.copy()
        chosen = corruption.positions(7, 30)
        assert len(set(chosen)) == 9
        expected[:, chosen, stream] *= 0.01
        np.testing.assert_allclose(corruption.apply(windows, video=7), expected, rtol=1e-6)


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32), st.integers(0, 5))
def test_positions_of_a_level_hold_those_of_lower_ones(length, low, high, seed, video):
    low, high = sorted((low, high))
    few, many = (set(Corruption(0, level, seed).positions(video, length).tolist()) for level in (low, high))
    assert len(few) == math.floor(length * low) and few <= many <= set(range(length))
    assert many == set(Corruption(1, high, seed).positions(video, length).tolist()), "the same for both modalities"
    drawn = [tuple(Corruption(0, 0.5, seed).positions(video, 256)) for seed in (0, 1) for video in (0, 1)]
    assert len(set(drawn)) == 4, "they differ between videos and seeds"


def test_level_zero_changes_nothing(model, videos, clean):
    points, changes = sweep(model, videos, CPU, "fp32", [0.0], 0)
    assert points[["corrupted", "level", "kl"]].to_numpy().tolist() == [["image", 0, 0], ["event", 0, 0]]
    scores, truth = frames_of(clean, "anomaly"), np.concatenate(videos.truth.frames)
    np.testing.assert_allclose(points.brier, np.mean((scores - truth) ** 2), rtol=1e-9)
    assert not changes.any()


def test_the_sweeps_numbers_are_means_over_frames(videos, clean, corrupt):
    p, q = frames_of(clean, "anomaly"), frames_of(corrupt, "anomaly")
    truth = np.concatenate(videos.truth.frames)
    assert np.abs(p - q).max() > 1e-3
    divergence = [a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in zip(p, q, strict=True)]
    expected = {"brier": np.mean((q - truth) ** 2), "kl": np.mean(divergence), **frame_metrics(q, truth)}
    for kind in MODALITIES:
        weights = frames_of(corrupt, f"{kind}_weight")
        expected[f"{kind}_weight"] = weights.mean()
        expected[f"{kind}_weight_anomalous"] = weights[truth == 1].mean()
        expected[f"{kind}_weight_normal"] = weights[truth == 0].mean()
    assert sweep_metrics(clean, corrupt) == {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}


def test_the_change_of_a_dimension_is_that_of_its_mean_weight(model, videos, clean, corrupt):
    change = sweep(model, videos, CPU, "fp32", [0.5], 3)[1][1]
    assert change.shape == (2, D)
    for index, kind in enumerate(MODALITIES):
        before, after = (frames_of(run, f"{kind}_weight").mean() for run in (clean, corrupt))
        assert change[index].mean() == pytest.approx(before - after, rel=1e-4)
    assert change[1].mean() == pytest.approx(-change[0].mean(), rel=1e-4), "the weights sum to one"


def test_certain_probabilities_are_clipped():
    p, q = np.array([0.0, 1.0, 1.0, 0.5]), np.array([1.0, 0.0, 1.0, 0.5])
    far = (1 - 1e-8) * math.log((1 - 1e-8) / 1e-8) + 1e-8 * math.log(1e-8 / (1 - 1e-8))
    np.testing.assert_allclose(bernoulli_kl(p, q), [far, far, 0, 0], rtol=1e-6)


def test_class_averages_are_means_over_frames(videos, clean):
    found = class_averages(clean, ["B1", "A", "B1", "G"]).set_index(["class", "part"])
    parts = {(c, p) for c in ("B1", "G") for p in ("all", "anomalous", "normal")}
    assert set(found.index) == parts | {("A", "all"), ("A", "normal")}
    truth = np.concatenate([videos.truth.frames[index] for index in (0, 2)])
    for curve in ("event_weight", "image_cosine", "event_euclidean"):
        values = np.concatenate([by_frame(clean, curve, index) for index in (0, 2)])[truth == 1]
        assert found.loc[("B1", "anomalous"), curve] == pytest.approx(values.mean(), rel=1e-6)
        assert found.loc[("B1", "anomalous"), "frames"] == len(values) == 60


def test_a_model_without_weights_is_refused(model, videos, monkeypatch):
    plain = VADOutput(torch.zeros(1, T, 1), None, None)
    monkeypatch.setattr(type(model), "forward", lambda self, *inputs: plain)
    for streams in (type(model).streams, ("rgb",)):
        monkeypatch.setattr(type(model), "streams", streams)
        with pytest.raises(UserError, match="does not weigh two modalities"):
            observe_videos(model, videos, CPU)


def test_the_command_writes_every_table_and_picture(tmp_path):
    tiny = make_tiny("ucf", tmp_path / "data")
    network = ["--visual-head", 4, "--visual-layers", 1, "--num-refinement-steps", 2]
    model = create_model(
        "iefvad", ["a", "b"], visual_width=WIDTH, visual_head=4, visual_layers=1, num_refinement_steps=2
    )
    torch.save(model.state_dict(), tmp_path / "model.pth")
    paths = ["--test-list", tiny.test_list, "--gt-path", tiny.folder / "truth.csv", "--feature-root", tiny.folder]
    paths += ["--stream-folders", "features", "events", "--model-path", tmp_path / "model.pth", "--device", "cpu"]
    sizes = ["--visual-width", WIDTH, "--visual-length", LENGTH, "--levels", 0.5, 0, "--curve-pictures", 1]
    argv = strings(["uncertainty", "--dataset", "ucf", "--method", "iefvad"], paths, sizes, network)
    assert "--output-dir is needed" in quietly(main, argv).err
    out = tmp_path / "out"
    outcome = quietly(main, [*argv, "--output-dir", str(out)])
    assert outcome.code == 0, outcome.err

    table = pd.read_csv(out / "uncertainty.csv")
    assert table[["corrupted", "level"]].to_numpy().tolist() == [[kind, x] for kind in MODALITIES for x in (0, 0.5)]
    for name in MODALITIES:
        changes = pd.read_csv(out / f"weight_change_{name}.csv").to_numpy()[:, 2:]
        assert changes.shape == (4, WIDTH) and not changes[[0, 2]].any() and changes[[1, 3]].any(axis=1).all()
    assert {*pd.read_csv(out / "weights_by_class.csv")["class"]} == {"Normal", "Abuse", "Robbery"}
    assert {"image_cosine", "event_euclidean"} <= {*pd.read_csv(out / "distances.csv")}
    curves = np.load(out / "curves.npz")
    assert curves["videos"].tolist() == [video.name for video in tiny.videos]
    assert len(curves["event_weight"]) == curves["snippets"].sum()
    pictures = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    figures = {"uncertainty.png", "weights_by_class.png", "distances.png"}
    assert pictures == figures | {f"curves/{name}_0.png" for name in ("Normal", "Abuse", "Robbery")}
