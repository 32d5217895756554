"""Features of other programs become files of one crop each, with the numbers where they belong."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from refusal import RunsCode

from clipfusionvad.cli import convert_features as command
from clipfusionvad.data.features import load_features
from clipfusionvad.io.errors import UserError
from clipfusionvad.tools.features import convert as convert_module
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
    assert "the first item there is" in refusal(tmp_path) and "readme.txt" in refusal(tmp_path)
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
    assert "is outside" in refusal(tmp_path)


def convert(tmp_path, *words):
    command.main([str(tmp_path / "in"), str(tmp_path / "out"), *words])
    found = (tmp_path / "out").rglob("*.npy")
    return {path.relative_to(tmp_path / "out").as_posix(): np.load(path) for path in found}


def test_arrays_beside_the_features_and_words_around_the_names_are_left_out(tmp_path, capsys):
    """Labels beside features, groups VIDEO/features, the dictionary of ``np.save``, parameters, suffixes of videos."""
    (tmp_path / "in").mkdir()
    one, other = RNG.normal(size=(2, 6, 512)).astype(np.float32)
    for name, values in {"a": one, "b": other}.items():
        np.savez(tmp_path / f"in/{name}.mp4.npz", features=values, label=np.zeros(6))
    np.save(tmp_path / "in/dictionary.npy", {"c.avi": one, "sub/d": other}, allow_pickle=True)
    torch.save({"x": torch.nn.Parameter(torch.tensor(one)), "epoch": 3}, tmp_path / "in/e.pt")
    with pytest.importorskip("h5py").File(tmp_path / "in/all.h5", "w") as file:
        for name, values in {"f": one, "g": other}.items():
            file[f"{name}/features"], file[f"{name}/frames"] = values, 96
    found = convert(tmp_path)
    assert found.keys() == {f"{name}.npy" for name in ("a", "b", "c", "sub/d", "e", "f", "g")}
    for name in ("a", "c", "e", "f"):
        np.testing.assert_array_equal(found[f"{name}.npy"], one)
    for name in ("b", "sub/d", "g"):
        np.testing.assert_array_equal(found[f"{name}.npy"], other)
    assert "4 arrays are not features of a video, the first is" in capsys.readouterr().err


@pytest.mark.parametrize("order", "CF")
def test_the_order_in_memory_and_shadow_files_do_not_matter(tmp_path, order, capsys):
    values = RNG.normal(size=(40, 10, 1024)).astype(np.float16)
    for name in ("a", "b"):
        save(tmp_path / f"in/{name}_i3d.npy", np.array(values, order=order))
        (tmp_path / f"in/._{name}_i3d.npy").write_bytes(b"\0\5\26\7" * 30)
    found = convert(tmp_path)
    assert found.keys() == {f"{name}_i3d__{crop}.npy" for name in "ab" for crop in range(10)}
    np.testing.assert_array_equal(found["a_i3d__7.npy"], values[:, 7])
    assert found["a_i3d__7.npy"].dtype == np.float16
    out = capsys.readouterr().out
    assert "2 videos of shapes like (40, 10, 1024): time on axis 0, dim 1024 on axis 2, 10 crops on axis 1" in out
    assert "all have one length: if their snippets are equal parts of the videos, use --segments equal\n" in out


def header(shape, dtype="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_2_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def npz(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def array_file(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


GOOD = array_file(np.ones((3, 512), np.float32))
BAD = {
    "huge": ("x.npy", header((10**12, 512)), "does not fit 0 bytes of data"),
    "negative": ("x.npy", header((-3, -512)), "does not fit"),
    "cut": ("x.npy", GOOD[:-7], "x.npy is not a readable .npy file: shape (3, 512) float32 does not fit 6137 bytes"),
    "no array": ("x.npy", b"nothing", "x.npy is not a readable .npy file"),
    "code": ("x.npy", array_file(np.array(RunsCode("ran"), dtype=object)), "would run foreign code"),
    "list of arrays": (
        "x.npy",
        array_file(np.array([np.ones((2, 512)), 3], dtype=object)),
        "x.npy: neither an array of numbers nor arrays by name",
    ),
    "text": ("x.npy", array_file(np.array([["a"] * 512])), "x.npy: array of shape (1, 512), <U1"),
    "huge member": ("x.npz", npz(a=header((10**12, 512))), "a.npy: shape (1000000000000, 512) float32 does not fit"),
    "cut archive": ("x.npz", npz(a=GOOD)[:-30], "x.npz is not a readable .npz file"),
    "changed member": ("x.npz", npz(a=GOOD).replace(b"\x3f\0\0\x80", b"\x3f\1\0\x80", 5), "x.npz is not a readable"),
    "objects": ("x.npz", npz(a=array_file(np.array(RunsCode("ran"), dtype=object))), "a of shape (), object"),
    "damaged": ("x.pt", b"PK\3\4nothing", "x.pt is not a readable torch file"),
    "HDF5": ("x.h5", b"\x89HDF\r\n\x1a\nnothing", "x.h5 is not a readable .h5 file"),
    "name of a line": (
        "x.npz",
        npz(**{"a\nb": GOOD, "c\nd": GOOD}),
        "has control characters or bytes that are not UTF-8",
    ),
    "other dims": ("x.npz", npz(a=GOOD, b=array_file(np.ones((5, 768)))), "arrays of shape (3, 512) and (5, 768)"),
    "no usual dim": ("x.npz", npz(a=GOOD, b=array_file(np.ones((3, 768)))), "can be read as time on axis 1, dim 3"),
    "large": ("x.npy", array_file(np.full((3, 512), 1e6)), "x has values beyond those of float16"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line_and_nothing_is_written(tmp_path, case):
    (tmp_path / "in").mkdir()
    name, content, says = BAD[case]
    (tmp_path / "in" / name).write_bytes(content)
    assert says in refusal(tmp_path, "--dtype", "float16")


def test_a_folder_inside_is_not_converted_again(tmp_path):
    save(tmp_path / "in/a.npy", np.ones((3, 10, 512), np.float32))
    words = [str(tmp_path / "in"), str(tmp_path / "in/converted"), "--overwrite"]
    for _ in range(2):
        command.main(words)
    assert len([*(tmp_path / "in/converted").rglob("*.npy")]) == 10


def test_a_large_file_is_not_loaded(tmp_path, monkeypatch):
    save(tmp_path / "in/a.npy", np.ones((30, 10, 2048), np.float32))
    used = []
    monkeypatch.setattr(convert_module, "write_array", lambda *_: used.append(tracemalloc.get_traced_memory()[0]))
    tracemalloc.start()
    convert(tmp_path)
    tracemalloc.stop()
    # The file holds ten crops.
    assert len(used) == 10 and max(used) < 3 * 30 * 2048 * 4
