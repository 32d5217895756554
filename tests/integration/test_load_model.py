"""``load_model``: a model from its file alone; that every method scores as ``test`` does: test_every_method.py."""

import numpy as np
import pytest
import torch
from tiny import FRAMES, make_tiny, package_main, quietly, strings

from clipfusionvad import create_model, load_model
from clipfusionvad.data.features import load_video
from clipfusionvad.data.lists import read_list
from clipfusionvad.datasets import UCF
from clipfusionvad.io.errors import UserError
from clipfusionvad.report.scores import read_scores


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a map in front of the model, and smoothing."""
    folder = tmp_path_factory.mktemp("load")
    tiny = make_tiny("ucf", folder / "data").of("vadclip").at(folder)
    outcome = tiny.train("--feature-dim", 64, "--feature-norm", "standardize", "--smooth", 2)
    assert outcome.code == 0, outcome.err
    return tiny


def features_of(tiny, row=0):
    return load_video(read_list(tiny.test_list)[row].paths)


def test_the_folder_of_a_run_and_its_last_state_load_too(trained, tmp_path, without_clip):
    """Also with a map for other features in front."""
    for path in (trained.work / "run", trained.work / "run/last.pt"):
        assert trained.test("--model-path", path, "--output-dir", tmp_path / "test").code == 0
        expected = read_scores(tmp_path / "test/test_scores.npz").scores
        with without_clip():
            model = load_model(path, device="cpu")
        for row, video in enumerate(expected):
            anomaly, classes = model.score_video(features_of(trained, row))
            np.testing.assert_allclose(anomaly, video.anomaly[0], atol=1e-5)
            np.testing.assert_allclose(classes, video.classes, atol=1e-5)


def test_scores_know_their_times(trained):
    model, features = load_model(trained.work / "model.pth", device="cpu"), features_of(trained)
    count = len(features)
    frames = count * FRAMES - 5
    scores = model.score_video(features, frames, fps=25)
    np.testing.assert_array_equal(scores.times, np.minimum(np.arange(count + 1) * FRAMES, frames) / 25)
    table = scores.to_pandas()
    assert list(table) == ["start", "end", "anomaly", *UCF.labels] and len(table) == count
    assert (table["end"].iloc[-1], table["start"].iloc[1]) == (frames / 25, FRAMES / 25)
    np.testing.assert_array_equal(table[list(UCF.labels)], scores.classes)
    assert model.score_video(features).to_pandas()["end"].iloc[-1] == count * FRAMES
    by_frame = model.score_frames(features, frames)
    np.testing.assert_array_equal(by_frame.anomaly, np.repeat(scores.anomaly, FRAMES)[:frames])
    np.testing.assert_array_equal(by_frame.classes, np.repeat(scores.classes, FRAMES, axis=0)[:frames])
    # Frames past the last snippet are its.
    longer = model.score_frames(features, count * FRAMES + 7).anomaly
    assert (longer[-7 - FRAMES :] == scores.anomaly[-1]).all()
    with pytest.raises(UserError, match="frames is the number of frames of the video, not 0"):
        model.score_frames(features, 0)
    for misfit in (1, (count + 2) * FRAMES):
        with pytest.raises(
            UserError, match=f"{count} rows of {FRAMES} frames each do not belong to .* {misfit} frames"
        ):
            model.score_frames(features, misfit)
    with pytest.raises(UserError, match="fps is the frame rate of the video, not nan"):
        model.score_video(features, fps=float("nan"))


def test_what_the_loaded_model_cannot_do_is_said_in_one_line(trained):
    model = load_model(trained.work / "model.pth", device="cpu")
    with pytest.raises(UserError) as error:
        model.train()
    assert str(error.value) == (
        "this vadclip was loaded to score, without CLIP: to train it or to encode other classes, "
        "use create_model and load_weights"
    )
    with torch.no_grad():
        output = model(torch.randn(2, 32, 64), torch.tensor([32, 3]))
    torch.testing.assert_close(output.text_features, model.stored_text)


def test_other_files_name_what_is_missing(trained, tmp_path, without_clip, capsys):
    content = torch.load(trained.work / "model.pth", weights_only=True)
    expected = load_model(trained.work / "model.pth", device="cpu").score_video(features_of(trained)).anomaly

    # One of ours from before files held text features: its CLIP is loaded as recorded.
    text = content.pop("text_features")
    torch.save(content, tmp_path / "older.pth")
    older = load_model(tmp_path / "older.pth", device="cpu")
    np.testing.assert_allclose(older.score_video(features_of(trained)).anomaly, expected, atol=1e-6)
    torch.testing.assert_close(older.stored_text, text)
    capsys.readouterr()
    with without_clip(), pytest.raises(UserError, match="no network"):
        load_model(tmp_path / "older.pth")
    assert "older.pth stores no text features of these classes: loading CLIP" in capsys.readouterr().err

    torch.save({**content, "text_features": "none"}, tmp_path / "damaged.pth")
    with pytest.raises(UserError, match="damaged.pth holds no valid text features"):
        load_model(tmp_path / "damaged.pth")

    # A file of another project: dataset= is enough where its weights show the method.
    options = content["hparams"]["options"] | {"visual_length": 256, "feature_dim": None, "feature_norm": None}
    options |= {"visual_layers": 2, "prompt_prefix": 10, "prompt_postfix": 10, "embed_dim": 512, "visual_width": 512}
    torch.manual_seed(1)
    model = create_model("vadclip", UCF.prompts, "toy", **options)
    torch.save(model.state_dict(), tmp_path / "released.pth")
    with pytest.raises(
        UserError, match=r"released.pth does not name its dataset: pass --dataset \(in Python dataset=\)"
    ):
        load_model(tmp_path / "released.pth")
    loaded, features = load_model(tmp_path / "released.pth", "cpu", dataset="ucf"), torch.randn(300, 512)
    np.testing.assert_allclose(loaded.score_video(features).anomaly, model.score_video(features).anomaly, atol=1e-6)


def test_an_exported_safetensors_file_loads_without_clip(trained, tmp_path, without_clip):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    done = quietly(package_main, strings(["export", trained.work / "model.pth", "--output", path]))
    assert done.code == 0, done.err
    with without_clip():
        found = load_model(path, device="cpu").score_frames(features_of(trained)).anomaly
    expected = load_model(trained.work / "model.pth", device="cpu").score_frames(features_of(trained)).anomaly
    # The export stores no smoothing of its own; that of the file is kept.
    np.testing.assert_allclose(found, expected, atol=1e-6)
