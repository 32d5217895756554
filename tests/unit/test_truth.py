"""Ground truth: released arrays, keyed files, and an explanation where truth and features do not fit."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad.data.features import check_features
from clipfusionvad.data.lists import Entry, read_list
from clipfusionvad.data.truth import frames_from_segments, read_truth
from clipfusionvad.datasets import UCF
from clipfusionvad.io.errors import UserError

SHARED = Path(os.environ.get("SHARED_DIR") or Path(__file__).resolve().parents[3] / "shared")

VIDEOS = [("Abuse001", "Abuse"), ("Arson002", "Arson"), ("Normal_003", "Normal")]
ENTRIES = [Entry(Path(f"{name}__5.npy"), label, row) for row, (name, label) in enumerate(VIDEOS, 2)]
SNIPPETS = [2, 3, 1]


def objects(items):
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def released(folder, **changes):
    """Paths of the three released arrays for ENTRIES, each of which may be replaced."""
    arrays = {
        "frames": frames_from_segments([(5, 7), (40, 41)], 96).astype(np.float32),
        "segments": objects([[["5", "7"]], [["8", "9"], ["50", "60"]], [[0, 16]]]),
        "labels": objects([["Abuse"], ["Arson", "Arson"], ["A"]]),
        **changes,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
    return [folder / f"{name}.npy" for name in ("frames", "segments", "labels")]


def keyed(folder, *lines):
    path = folder / "truth.csv"
    path.write_text("\n".join(["video,frames,label,start,end", *lines]) + "\n")
    return path, None, None


def message(paths, snippets=SNIPPETS, entries=ENTRIES):
    with pytest.raises(UserError) as caught:
        read_truth(*paths, entries, snippets, UCF)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_released_arrays(tmp_path, capsys):
    truth = read_truth(*released(tmp_path), ENTRIES, SNIPPETS, UCF)
    assert [len(frames) for frames in truth.frames] == [32, 48, 16]
    assert all(frames.dtype == np.uint8 for frames in truth.frames)
    assert [np.flatnonzero(frames).tolist() for frames in truth.frames] == [[5, 6], [8], []]
    assert truth.segments == [[(5, 7)], [(8, 9), (50, 60)], [(0, 16)]]
    assert truth.labels == [["Abuse"], ["Arson", "Arson"], ["A"]]
    assert capsys.readouterr().err == ""
    frames = np.arange(96) % 2
    for dtype in (bool, np.uint8, np.int64, np.float64):
        truth = read_truth(*released(tmp_path, frames=frames.astype(dtype)), ENTRIES, SNIPPETS, UCF)
        assert np.concatenate(truth.frames).tolist() == frames.tolist()


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"frames": np.full(96, 2)}, ["frames.npy", "holds 2 at frame 0"]),
        ({"frames": np.where(np.arange(96) == 7, np.nan, 0)}, ["frames.npy", "nan at frame 7"]),
        ({"frames": np.zeros((2, 48))}, ["frames.npy", "(2, 48)"]),
        ({"frames": np.array(["0"] * 96)}, ["frames.npy"]),
        ({"segments": objects([[[1, 2]]] * 2)}, ["segments.npy", "2 videos", "has 3"]),
        ({"labels": objects([["A"]] * 4)}, ["labels.npy", "4 videos", "has 3"]),
        ({"segments": objects([[["5", "x"]], [], [[0, 16]]])}, ["segments.npy", "Abuse001", "row 2"]),
        ({"segments": objects([[[5, 6, 7]], [], [[0, 16]]])}, ["segments.npy", "Abuse001", "row 2"]),
        ({"segments": np.array([1, 1, 0])}, ["segments.npy", "Abuse001", "not a list of [start, end]"]),
        ({"segments": np.array(3)}, ["segments.npy", "single value"]),
        ({"labels": np.array([4, 7, 0])}, ["labels.npy", "Abuse001", "not a list of class names"]),
        ({"labels": np.array(["Abuse", "Arson", "A"])}, ["labels.npy", "not a list of class names"]),
        ({"labels": objects([["Abuse"], ["Arson"], ["A"]])}, ["Arson002", "row 3", "2 intervals, 1 labels"]),
    ],
)
def test_malformed_arrays_name_file_and_video(tmp_path, changes, parts):
    text = message(released(tmp_path, **changes))
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    "snippets, parts",
    [
        ([2, 3, 2], ["96 frames", "112", "-16 frames", "Normal_003: 16 frames of truth, 32 of features (-16)"]),
        ([2, 1, 2], ["+16 frames", "Normal_003", "the other +32 frames are unknown", "python -m clipfusionvad lists"]),
        ([2, 3], ["segments of 3 videos", "the test list has 2 videos"]),
    ],
)
def test_truth_of_another_length_is_explained(tmp_path, snippets, parts):
    text = message(released(tmp_path), snippets, ENTRIES[: len(snippets)])
    assert all(part in text for part in parts), text
    assert ("hold no names" in text) == (snippets != [2, 3, 2])


def test_equal_length_by_chance_is_warned_about_and_segments_are_needed(tmp_path, capsys):
    paths = released(tmp_path)
    read_truth(*paths, ENTRIES, [2, 2, 2], UCF)
    assert "Normal_003: 16 frames of truth, 32 of features" in capsys.readouterr().err
    assert "segment truth" in message([paths[0], None, None])
    paths[2].write_bytes(b"nonsense")
    assert str(paths[2]) in message(paths)


def test_keyed_truth_judges_true_lengths(tmp_path, capsys):
    lines = ["Normal_003,20,Normal,,", "Abuse001,30,Abuse,5,99", "Arson002,,Arson,0,1", "Arson9,,Arson,1,2"]
    truth = read_truth(*keyed(tmp_path, *lines), ENTRIES, SNIPPETS, UCF)
    assert [len(frames) for frames in truth.frames] == [30, 48, 20]
    assert [int(frames.sum()) for frames in truth.frames] == [25, 1, 0]
    assert truth.segments == [[(5, 99)], [(0, 1)], [(0, 20)]]
    assert truth.labels == [["Abuse"], ["Arson"], ["A"]]
    assert capsys.readouterr().err == ""
    # Lengths that are off by a snippet or more are warned about in one line.
    path = keyed(tmp_path, "Abuse001,48,Abuse,5,9", "Arson002,100,Arson,0,1", "Normal_003,1,Normal,,")
    read_truth(*path, ENTRIES, SNIPPETS, UCF)
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1 and "2 videos" in warned and "Arson002: 100 frames of truth, 48" in warned
    # Only anomalous videos must have intervals, and normal ones may not.
    lines = ["Abuse001,,Abuse,5,9", "Arson002,,Arson,0,1", "Normal_003,,Abuse,0,1"]
    truth = read_truth(*keyed(tmp_path, *lines[:2]), ENTRIES, SNIPPETS, UCF)
    assert len(truth.frames[2]) == 16 and truth.segments[2] == [(0, 16)]
    text = message(keyed(tmp_path, lines[0]))
    assert "Arson002" in text and "row 3" in text and str(tmp_path) in text
    assert "Normal_003" in message(keyed(tmp_path, *lines))


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60))), st.integers(0, 50))
def test_frames_from_segments_is_the_clipped_union(segments, length):
    inside = {frame for start, end in segments for frame in range(start, end)}
    frames = frames_from_segments(segments, length)
    assert frames.dtype == np.uint8
    assert frames.tolist() == [int(frame in inside) for frame in range(length)]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the shared data folder, {SHARED} (SHARED_DIR)")
def test_real_features_whose_truth_is_of_another_length():
    folder = SHARED / "data/real_clip_features/cctv10"
    entries = read_list(folder / "my_ucf_CLIP_rgbtest.csv", folder, UCF)
    snippets = check_features(entries, 512, "list")
    assert sum(snippets) == 3180
    paths = [folder / f"my_gt{part}_ucf.npy" for part in ("", "_segment", "_label")]
    text = message(paths, snippets, entries)
    assert "50823" in text and "50880" in text and "-57 frames" in text and "less than a snippet per video" in text
    truth = read_truth(folder / "my_test.json", None, None, entries, snippets, UCF)
    np.testing.assert_array_equal(np.concatenate(truth.frames), np.load(paths[0]))
    described = json.loads((folder / "my_test.json").read_text())["videos"]
    assert [len(frames) for frames in truth.frames] == [video["num_frames"] for video in described]
