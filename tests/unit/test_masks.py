"""Frame masks and MATLAB files as annotations, in lists and as --gt-path."""

import io
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from tiny import quietly, strings

from clipfusionvad.__main__ import main
from clipfusionvad.data.annotations import Annotation, read_annotations
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.truth import read_truth
from clipfusionvad.datasets import SHANGHAITECH, UCF, XD, own_dataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.mat import read_mat
from clipfusionvad.io.provenance import Sources

AVENUE = own_dataset("avenue", {"normal": "normal", "anomaly": "anomaly"})
MASK = np.array([0, 0, 1, 1, 1, 0, 0, 1], np.uint8)
SPANS = [(2, 5), (7, 8)]


def cells(*items):
    array = np.empty((1, len(items)), dtype=object)
    for place, item in enumerate(items):
        array[0, place] = np.array(item, dtype=float)
    return array


def message(path, dataset=SHANGHAITECH, names=()):
    with pytest.raises(UserError) as caught:
        read_annotations(path, dataset, names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "mask", [MASK, MASK.astype(float), MASK[:, None], MASK[None] > 0, 255 * np.stack([MASK] * 6, 1).reshape(8, 2, 3)]
)
def test_a_folder_of_masks(tmp_path, mask):
    np.save(tmp_path / "01_0014.npy", mask)
    np.save(tmp_path / "01_0015.npy", np.zeros(3))
    found = read_annotations(tmp_path, SHANGHAITECH)
    assert found == {"01_0014": Annotation("01_0014", SPANS, [], 8), "01_0015": Annotation("01_0015", frames=3)}
    # With two classes, and with a class in the name, the mask needs no list.
    assert read_annotations(tmp_path, AVENUE)["01_0014"] == Annotation("01_0014", SPANS, ["anomaly"] * 2, 8, "anomaly")
    (tmp_path / "01_0014.npy").rename(tmp_path / "Abuse001_x264.npy")
    assert read_annotations(tmp_path, UCF)["Abuse001_x264"].labels == ["Abuse", "Abuse"]


def test_masks_as_truth_take_classes_and_frames_from_list_and_mask(tmp_path, capsys):
    np.save(tmp_path / "a_label_B1-G-0.npy", MASK)
    np.save(tmp_path / "04_0001.npy", np.repeat(MASK, 4))
    entries = [Entry(Path("04_0001__5.npy"), "car", 2), Entry(Path("03_0001__5.npy"), "normal", 3)]
    truth = read_truth(tmp_path, None, None, entries, [2, 1], SHANGHAITECH)
    assert truth.frames[0].tolist() == np.repeat(MASK, 4).tolist() and len(truth.frames[1]) == 16
    assert truth.segments == [[(8, 20), (28, 32)], [(0, 16)]] and truth.labels == [["car", "car"], ["A"]]
    # A list's label of several classes marks each interval as every one of them.
    truth = read_truth(tmp_path, None, None, [Entry(Path("a_label_B1-G-0__0.npy"), "B1-G-0", 2)], [1], XD)
    assert truth.labels == [["B1", "G"] * 2] and truth.segments == [[(2, 5), (2, 5), (7, 8), (7, 8)]]
    # Equal parts know the frames from the masks; a video without one does not.
    assert read_truth(tmp_path, None, None, entries[:1], [5], SHANGHAITECH, None).frames[0].sum() == 16
    with pytest.raises(UserError, match="it is missing for 1 videos, the first is 03_0001"):
        read_truth(tmp_path, None, None, entries, [2, 1], SHANGHAITECH, None)
    with pytest.raises(UserError, match="has intervals for 04_0001, which the test list calls normal"):
        read_truth(tmp_path, None, None, [Entry(Path("04_0001__5.npy"), "normal", 2)], [2], SHANGHAITECH)
    sources = Sources()
    sources.add_options({"gt_path": str(tmp_path)}, ("gt_path",))
    assert len(sources.found) == 2


def test_ucf_structures_hold_the_numbers_of_the_text(tmp_path):
    one = {"VideoName": "Arson011_x264.mp4", "EventName": "Arson", "Anno": np.array([[150, 420], [680, 1267]])}
    savemat(tmp_path / "Arson011_x264.mat", {"Annotation_file": one})
    # Without the fields of names: that of the file.
    savemat(tmp_path / "Abuse028_x264.mat", {"Annotation_file": {"Anno": np.array([165.0, 240.0])}})
    normal = {"VideoName": "Normal_Videos_003_x264.mp4", "EventName": "Normal", "Anno": np.array([[-1, -1]])}
    savemat(tmp_path / "Normal_Videos_003_x264.mat", {"Annotation_file": normal})
    text = (
        "Arson011_x264 Arson 150 420 680 1267\nAbuse028_x264 Abuse 165 240 -1 -1\nNormal_Videos_003_x264 Normal -1 -1\n"
    )
    (tmp_path / "all.txt").write_text(text)
    found, expected = read_annotations(tmp_path, UCF), read_annotations(tmp_path / "all.txt", UCF)
    assert {name: (item.segments, item.labels) for name, item in found.items()} == {
        name: (item.segments, item.labels) for name, item in expected.items()
    }
    # All structures in one file.
    rows = np.zeros((1, 2), dtype=[("VideoName", "O"), ("EventName", "O"), ("Anno", "O")])
    rows[0, 0] = ("Arson011_x264.mp4", "Arson", one["Anno"])
    rows[0, 1] = ("Normal_Videos_003_x264.mp4", "Normal", np.zeros((1, 2)))
    savemat(tmp_path / "all.mat", {"Annotation_file": rows})
    whole = read_annotations(tmp_path / "all.mat", UCF)
    assert whole == {name: expected[name] for name in ("Arson011_x264", "Normal_Videos_003_x264")}


def test_cells_are_of_the_test_videos_in_the_order_of_names(tmp_path):
    """First and last frame, counted from 1, as ano_pred reads them."""
    path = tmp_path / "avenue.mat"
    savemat(path, {"gt": cells([[78, 392], [120, 422]], np.zeros((2, 0)), [[1], [5]])})
    found = read_annotations(path, AVENUE, ["02", "03", "01"])
    assert found["01"].segments == [(77, 120), (391, 422)] and found["01"].labels == ["anomaly"] * 2
    assert found["02"] == Annotation("02", label="normal") and found["03"].segments == [(0, 5)]
    said = message(path, AVENUE, ["01", "02"])
    assert "holds 3 videos without their names, but 2 test videos" in said
    assert "no --split file names" in message(path, AVENUE)
    entries = [Entry(Path(f"{name}.npy"), label, 2) for name, label in (("03", "anomaly"), ("01", "anomaly"))]
    entries.append(Entry(Path("02.npy"), "normal", 4))
    truth = read_truth(path, None, None, entries, [1, 27, 2], AVENUE)
    assert [int(frames.sum()) for frames in truth.frames] == [5, 43 + 31, 0]
    # One shape for all: an array instead of cells.
    savemat(path, {"gt": np.array([[[2], [4]], [[1], [9]]])})
    assert read_annotations(path, AVENUE, ["a", "b"])["a"].segments == [(1, 4)]
    savemat(path, {"gt": np.array([[2, 11], [4, 20]])})
    assert read_annotations(path, AVENUE, ["a"])["a"].segments == [(1, 4), (10, 20)]


def test_masks_of_pixels_in_matlab(tmp_path):
    savemat(tmp_path / "1_label.mat", {"volLabel": cells(*[np.full((2, 3), value) for value in MASK])})
    assert read_annotations(tmp_path, AVENUE)["01"].segments == SPANS


@pytest.mark.parametrize("compressed", [False, True])
def test_values_are_those_that_were_saved(tmp_path, compressed):
    rng, shapes = np.random.default_rng(0), [(1, 1), (3, 4), (2, 3, 4), (0, 0), (1, 5)]
    kinds = "u1 i1 u2 i2 u4 i4 u8 i8 f4 f8".split()
    saved = {f"{kind}_{n}": rng.integers(0, 99, shape).astype(kind) for kind in kinds for n, shape in enumerate(shapes)}
    nested = {"text": "Überfall 打架", "cells": cells([1, 2], [[3]]), "inner": {"x": np.arange(3)}}
    savemat(tmp_path / "a.mat", saved | {"s": nested, "c": cells(*saved.values())}, do_compression=compressed)
    found = read_mat(tmp_path / "a.mat", "file")
    for name, value in saved.items():
        np.testing.assert_array_equal(found[name], value)
    assert all(np.array_equal(one, other) for one, other in zip(found["c"], saved.values(), strict=True))
    (row,) = found["s"]
    assert row["text"] == nested["text"] and row["inner"][0]["x"].tolist() == [[0, 1, 2]]
    assert [value.ravel().tolist() for value in row["cells"]] == [[1, 2], [3]]


def test_damaged_matlab_files_are_one_line(tmp_path):
    """scipy's reader ends the process with some of these."""
    path = tmp_path / "Abuse001_x264.mat"
    rng, originals = np.random.default_rng(1), []
    contents = [{"gt": cells([[1], [9]])}, {"volLabel": cells([[1]], [[0]])}]
    contents += [{"Annotation_file": {"EventName": "Abuse", "Anno": np.array([[1, 9]])}}]
    for content, compressed in product(contents, (False, True)):
        savemat(path, content, do_compression=compressed)
        originals.append(path.read_bytes())
    for number in range(600):
        content = bytearray(originals[number % len(originals)])
        for at in rng.integers(120, len(content), 3):
            content[at] = rng.integers(256)
        path.write_bytes(content[: rng.integers(100, 2 * len(content))])
        try:
            read_annotations(path, UCF, ["Abuse001_x264"])
        except UserError as error:
            assert "\n" not in str(error)


class Evil:
    def __reduce__(self):
        return print, ("foreign code ran",)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.npy", np.array([0, 1, 2]), "not a 0 or 1 for each frame"),
        ("a.npy", np.array([0.5, np.nan]), "not a 0 or 1 for each frame"),
        ("a.npy", np.zeros((4, 3)), "a.npy has shape (4, 3)"),
        ("a.npy", np.array(["0", "1"]), "not a 0 or 1 for each frame"),
        ("a.npy", np.array([Evil()], dtype=object), "would run foreign code"),
        ("a.mat", b"nothing", "a.mat is damaged, or not of MATLAB's format 5 to 7.2"),
        ("a.mat", {"x": np.zeros((3, 2))}, "a.mat has the variables x; known are gt, volLabel"),
        ("a.mat", {"Annotation_file": {"Anno": [[1.5, 2]]}}, "a.mat has intervals of shape (1, 2), not pairs of whole"),
        ("a.mat", {"Annotation_file": {"Anno": [[9, 2]]}}, "ends before it starts"),
        ("a.mat", {"Annotation_file": {"Anno": [[1, 2]], "EventName": "Tango"}}, "unknown class 'Tango'"),
        ("a.txt", b"", "holds no masks: NAME.npy or NAME.mat for each video"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, capsys, name, content, says):
    if isinstance(content, dict):
        savemat(tmp_path / name, content)
    else:
        file = io.BytesIO()
        if not isinstance(content, bytes):
            np.save(file, content, allow_pickle=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else file.getvalue())
    assert says in message(tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_a_file_of_matlab_7_3_is_named(tmp_path):
    (tmp_path / "a.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400))
    assert "save it with '-v7' in MATLAB" in message(tmp_path / "a.mat")


def test_lists_from_masks_and_the_classes_of_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train/car/01_0001", "train/normal/01_0002", "test/car/01_0014", "test/normal/01_0015"):
        Path("features", name).parent.mkdir(parents=True, exist_ok=True)
        np.save(Path("features", name), np.zeros((1, 4), np.float16))
    Path("test_frame_mask").mkdir()
    np.save("test_frame_mask/01_0014.npy", MASK)
    np.save("test_frame_mask/01_0015.npy", np.zeros(5))
    argv = "lists --dataset shanghaitech --features features --output list --annotations test_frame_mask"
    done = quietly(main, argv.split())
    assert done.code == 0 and "test frames: 32" in done.out, done
    found = read_annotations("list/shanghaitech_truth.csv", SHANGHAITECH)
    assert found["01_0014"] == Annotation("01_0014", SPANS, ["car"] * 2, 8, "car") and found["01_0015"].frames == 5
    done = quietly(main, [*argv.split(), "--segments", "equal"])
    assert "test frames: 13" in done.out, done
    # Cells without names need the names of the test videos.
    savemat("gt.mat", {"gt": cells([[3], [5]], np.zeros((2, 0)))})
    argv = argv.replace("test_frame_mask", "gt.mat")
    assert "no --split file names the test videos" in quietly(main, argv.split()).err
    Path("test.txt").write_text("01_0014\n01_0015\n")
    done = quietly(main, strings([*argv.split(), "--split", "test.txt"]))
    assert done.code == 0, done
    assert read_annotations("list/shanghaitech_truth.csv", SHANGHAITECH)["01_0014"].segments == [(2, 5)]
