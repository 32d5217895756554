"""Several feature streams of one video: found beside each other, read side by side."""

import numpy as np
import pytest

from clipfusionvad.data.features import load_features, load_video, read_video_shape
from clipfusionvad.data.lists import Entry, add_streams
from clipfusionvad.io.errors import UserError


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


@pytest.mark.parametrize(
    ("rgb", "event"),
    [
        ("rgb/Abuse/v__0.npy", "event_thr_10/Abuse/v__0.npy"),
        ("UCF_rgb/Abuse/v__0.npy", "UCF_event_thr_10/Abuse/v__0.npy"),
        ("a_rgb/rgb/v__0.npy", "a_rgb/event_thr_10/v__0.npy"),  # the innermost folder
        ("a_rgb/rgb/v__0.npy", "a_event_thr_10/event_thr_10/v__0.npy"),  # all of them, as released
        ("rgb/rgb_v__0.npy", "event_thr_10/rgb_v__0.npy"),  # never the file's own name
    ],
)
def test_the_other_stream_is_found(tmp_path, rgb, event):
    first = write(tmp_path / rgb, np.ones((3, 2), np.float16))
    other = write(tmp_path / event, np.zeros((3, 2), np.float16))
    (entry,) = add_streams([Entry(first, "Abuse", 2)], ["rgb", "event_thr_10"], "list.csv")
    assert entry.paths == (first, other)


def test_what_cannot_be_found_is_said(tmp_path):
    first = write(tmp_path / "rgb/v__0.npy", np.ones((3, 2), np.float16))
    says = {"rgb": "list.csv, row 7.*event.*not found beside.*--stream-folders", "image": "row 7.*no folder.*'image'"}
    for name, words in says.items():
        with pytest.raises(UserError, match=words):
            add_streams([Entry(first, "Abuse", 7)], [name, "event"], "list.csv")


def test_streams_stand_side_by_side_and_missing_rows_are_zeros(tmp_path):
    event = np.full((3, 2), 5, np.float32)
    event[1] = np.nan
    paths = (write(tmp_path / "rgb/v.npy", np.arange(6.0).reshape(3, 2)), write(tmp_path / "event/v.npy", event))
    np.testing.assert_array_equal(load_video(paths, 2), [[0, 1, 5, 5], [2, 3, 0, 0], [4, 5, 5, 5]])
    assert read_video_shape(paths, 2) == 3
    with pytest.raises(UserError, match="NaN"):
        load_features(paths[1], 2)
    event[2, 0] = np.nan
    write(paths[1], event)
    with pytest.raises(UserError, match="event/v.npy: snippet 2"):
        load_video(paths, 2)


@pytest.mark.parametrize("read", [load_video, read_video_shape])
def test_streams_of_different_length_or_width_are_refused(tmp_path, read):
    rgb = write(tmp_path / "rgb/v.npy", np.ones((3, 2), np.float16))
    for shape, words in (((2, 2), "has 2 snippets, but .*rgb/v.npy has 3"), ((3, 4), "has features of dim 4, but 2")):
        with pytest.raises(UserError, match=f"event/v.npy {words}"):
            read((rgb, write(tmp_path / "event/v.npy", np.ones(shape, np.float16))), 2)
