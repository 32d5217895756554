"""The ten crops by the numbers of the protocol, and CLIP's own preprocessing."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from made_videos import MEAN, STD, picture, plain_crop
from PIL import Image

from clipfusionvad.extraction.crops import check_crops, cut_windows, to_canvas
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
