"""Features of other programs become files of one crop each, with the numbers where they belong."""

import numpy as np
import pytest
import torch

from clipfusionvad.cli import convert_features as command
from clipfusionvad.data.features import load_features
from clipfusionvad.io.errors import UserError
from clipfusionvad.tools.features.convert import Axes, convert_features, find_axes

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("shapes", "axes"),
    [
        ([(37, 512)], Axes(0, 1, None)),
        ([(512, 37)], Axes(1, 0, None)),
        ([(37, 99), (37, 12)], Axes(1, 0, None)),
        ([(40, 400)] * 3, Axes(0, 1, None)),
        ([(32, 10, 2048)], Axes(0, 2, 1)),
        ([(10, 32, 1024)], Axes(1, 2, 0)),
        ([(5, 10, 512), (7, 10, 512)], Axes(0, 2, 1)),
        ([(1, 37, 512)], Axes(1, 2, None)),
        ([(37, 1, 512), (1, 1, 512)], Axes(0, 2, None)),
        ([(1, 37, 10, 1024)], Axes(1, 3, 2)),
        ([(30, 2, 300)], Axes(0, 2, 1)),
    ],
)
def test_axes_follow_from_the_shapes_of_all_files(shapes, axes):
    assert find_axes(shapes) == axes


@pytest.mark.parametrize("shape", [(10, 10, 1024), (3, 4, 5, 6), (40, 40, 40)])
def test_shapes_with_two_readings_or_none_are_asked_for(shape):
    with pytest.raises(UserError, match="--time-axis and --crop-axis"):
        find_axes([shape])


def test_an_axis_that_is_given_decides():
    assert find_axes([(10, 10, 1024)], time_axis=1) == Axes(1, 2, 0)
    assert find_axes([(10, 10, 1024)], crop_axis=1) == Axes(0, 2, 1)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, a=array)
    elif path.suffix == ".h5":
        with pytest.importorskip("h5py").File(path, "w") as file:
            file["Abuse/a.mp4"] = array
    elif path.suffix == ".pt":
        torch.save({"a": torch.from_numpy(array)}, path)
    else:
        np.save(path, array)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".h5"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_crops_become_files(tmp_path, suffix, order, capsys):
    crops = RNG.normal(size=(10, 6, 512)).astype(np.float32)
    save(tmp_path / f"in/Abuse/a{suffix}", crops.transpose(order))
    command.main([str(tmp_path / "in"), str(tmp_path / "out")])
    for number, crop in enumerate(crops):
        np.testing.assert_array_equal(load_features(tmp_path / f"out/Abuse/a__{number}.npy"), crop)
    assert f"10 crops on axis {order.index(0)}" in capsys.readouterr().out


def test_stacked_videos_are_told_apart_by_their_names(tmp_path):
    train = RNG.normal(size=(3, 40, 400)).astype(np.float16)
    np.savez(tmp_path / "all.npz", train=train, train_names=["a", "b", "c"])
    convert_features(tmp_path / "all.npz", tmp_path / "out")
    written = {
        path.relative_to(tmp_path / "out").as_posix(): np.load(path) for path in (tmp_path / "out").rglob("*.npy")
    }
    assert written.keys() == {"train/a.npy", "train/b.npy", "train/c.npy"}
    assert written["train/b.npy"].dtype == np.float16
    np.testing.assert_array_equal(written["train/b.npy"], train[1])


def test_numbers_that_features_are_not_stored_in_become_float32(tmp_path):
    values = RNG.normal(size=(6, 512))
    np.save(tmp_path / "a.npy", values)
    torch.save(torch.from_numpy(values).bfloat16(), tmp_path / "b.pt")
    convert_features(tmp_path / "a.npy", tmp_path / "out")
    convert_features(tmp_path / "b.pt", tmp_path / "out", dtype="float16")
    assert np.load(tmp_path / "out/a.npy").dtype == np.float32
    np.testing.assert_allclose(np.load(tmp_path / "out/b.npy"), values, rtol=0.01)


def refusal(tmp_path, *words):
    with pytest.raises(UserError) as error:
        command.main([str(tmp_path / "in"), str(tmp_path / "out"), *words])
    assert not list((tmp_path / "out").rglob("*.npy"))
    return str(error.value)


def test_what_cannot_be_converted_is_named(tmp_path):
    assert "not found" in refusal(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/readme.txt").write_text("no")
    assert "the first thing there is" in refusal(tmp_path) and "readme.txt" in refusal(tmp_path)
    np.save(tmp_path / "in/scores.npy", np.zeros(7))
    assert "scores.npy: array of shape (7,)" in refusal(tmp_path)
    (tmp_path / "in/b.npz").write_bytes(b"PK\3\4nothing")
    assert "b.npz is not a readable .npz file" in refusal(tmp_path)


def test_files_are_replaced_only_if_asked(tmp_path):
    save(tmp_path / "in/a.npy", np.ones((3, 512), np.float32))
    save(tmp_path / "out/a.npy", np.zeros((3, 512), np.float32))
    words = [str(tmp_path / "in"), str(tmp_path / "out")]
    with pytest.raises(UserError, match="exists already: give --overwrite"):
        command.main(words)
    command.main([*words, "--overwrite"])
    assert np.load(tmp_path / "out/a.npy").all()


def test_a_video_in_two_files_is_refused(tmp_path):
    save(tmp_path / "in/a.npy", np.ones((3, 512), np.float32))
    save(tmp_path / "in/a.npz", np.ones((3, 512), np.float32))
    assert "both hold a" in refusal(tmp_path)


def test_names_do_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    values = np.ones((3, 512), np.float32)
    np.savez(tmp_path / "in/x.npz", **{"../../evil": values, "b": values})
    assert "leads out of" in refusal(tmp_path)
