"""Pictures for the encoder: the ten crops of the protocol, CLIP's own preprocessing, and synthetic event images."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from made_videos import MEAN, STD, picture, plain_crop
from PIL import Image

from clipfusionvad.extraction.crops import check_crops, cut_windows, to_canvas
from clipfusionvad.extraction.events import EventCounter, normalise_counts
from clipfusionvad.io.errors import UserError
from clipfusionvad.models.clip import openai_clip

SIZES = [(320, 240), (240, 320), (1280, 720), (64, 48), (65, 47), (340, 256), (224, 224)]


@pytest.mark.parametrize("size", SIZES)
def test_ten_crops_are_those_of_the_protocol(size):
    frames = [picture(index, size) for index in range(2)]
    canvases = np.stack([to_canvas(frame) for frame in frames])
    crops = cut_windows(canvases, range(10))
    assert crops.shape == (2, 10, 224, 224, 3) and crops.dtype == np.uint8
    np.testing.assert_array_equal(crops, [[plain_crop(frame, crop) for crop in range(10)] for frame in frames])
    np.testing.assert_array_equal(cut_windows(canvases, (7, 0, 5)), crops[:, [7, 0, 5]])


def test_frames_are_resized_alike_in_either_order_of_colours():
    """The released code resized blue, green, red and turned that to red, green, blue."""
    frame = picture(0, (320, 240))
    theirs = cv2.resize(frame[..., ::-1].copy(), (340, 256))[..., ::-1]
    np.testing.assert_array_equal(to_canvas(frame), theirs)


@pytest.mark.parametrize("size", SIZES)
def test_clip_crop_is_clips_own(size):
    openai_clip()
    from clip.clip import _transform

    frame = picture(0, size)
    crop = cut_windows(to_canvas(frame, "clip")[None], (0, 5))[0]
    expected = _transform(224)(Image.fromarray(frame)).numpy().transpose(1, 2, 0)
    np.testing.assert_allclose((crop[0] / 255 - MEAN) / STD, expected, atol=1e-5)
    np.testing.assert_array_equal(crop[1], np.fliplr(crop[0]))


@pytest.mark.parametrize("resize", ["released", "clip"])
def test_a_canvas_is_not_resized_again(resize):
    canvas = to_canvas(picture(0, (320, 240)), resize)
    np.testing.assert_array_equal(to_canvas(canvas, resize), canvas)


@pytest.mark.parametrize(
    ("crops", "resize"),
    [((), "released"), ((0, 0), "released"), ((10,), "released"), ((-1,), "released"), ((1,), "clip")],
)
def test_crops_that_do_not_exist_are_refused(crops, resize):
    with pytest.raises(UserError, match="crop"):
        check_crops(crops, resize)


chunks = st.tuples(st.integers(1, 16), st.integers(1, 5), st.integers(1, 5)).flatmap(
    lambda shape: arrays.arrays(np.uint8, (*shape, 3))
)


def count(frames, threshold):
    counter = EventCounter(threshold)
    for frame in frames:
        counter.add(frame)
    return counter.take()


@given(chunks, st.sampled_from([0, 10, 25, 12.5]))
def test_events_are_changes_beyond_the_threshold(frames, threshold):
    grey = frames.astype(np.int64) @ [2989, 5870, 1140]
    expected = np.zeros(frames.shape[1:3], int)
    for before, after in zip(grey, grey[1:], strict=False):
        expected += abs(after - before) > threshold * 10_000
    np.testing.assert_array_equal(count(frames, threshold), expected)


def test_a_change_of_exactly_the_threshold_is_none():
    """2989 · 2 + 5870 · 10 + 1140 · 31 = 100038 and one blue less is 98898: 10.0038 and 9.8898 of grey."""
    frame = np.zeros((1, 1, 3), np.uint8)
    assert count([frame, frame + np.array([2, 10, 31], np.uint8)], 10) == 1
    assert count([frame, frame + np.array([2, 10, 30], np.uint8)], 10) == 0
    # 10 steps of every colour are 9.999 of grey, as the weights sum to 0.9999.
    assert count([frame, frame + np.uint8(10)], 10) == 0
    assert count([frame, frame + np.uint8(10)], 9.999) == 0
    assert count([frame, frame + np.uint8(10)], 9.99) == 1


def test_chunks_do_not_see_each_other():
    counter = EventCounter(10)
    for shade in (0, 255):
        counter.add(np.full((2, 2, 3), shade, np.uint8))
        assert not counter.take().any()


def test_counts_are_divided_by_the_maximum_of_a_crop():
    counts = np.zeros((2, 2, 3, 3), np.uint8)
    counts[0, 0, 1, 1], counts[1, 0, 0, 0], counts[1, 1, 2, 2] = 12, 6, 5
    for scope, expected in (("block", (1, 0.5, 1)), ("chunk", (1, 1, 1))):
        found = normalise_counts(counts, scope)
        assert found.dtype == np.float32 and not found[0, 1].any()
        assert (found[0, 0, 1, 1], found[1, 0, 0, 0], found[1, 1, 2, 2]) == expected


@pytest.mark.parametrize(("scope", "empty"), [("block", False), ("chunk", True)])
def test_where_nothing_moves(scope, empty):
    counts = np.zeros((2, 1, 3, 3), np.uint8)
    counts[1, 0, 0, 0] = 3
    assert normalise_counts(counts, scope, "zero")[0].max() == 0
    assert np.isnan(normalise_counts(counts, scope, "nan")[0]).all() == empty
    assert np.isnan(normalise_counts(counts[:1], scope, "nan")).all()
