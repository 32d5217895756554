"""Grids of segments × frames: which rows of a video an input holds, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad.data.sampling import GridSampling

SIZES = {"segments": st.integers(1, 6), "frames": st.integers(1, 5), "count": st.integers(1, 200)}


def numbered(count):
    """A video whose rows hold their own number."""
    return np.repeat(np.arange(count, dtype=np.float32)[:, None], 3, axis=1)


@given(**SIZES)
def test_windows_equal_the_loop(segments, frames, count):
    windows, lengths = GridSampling(segments, frames).windows(numbered(count))
    inputs = -(-count // (segments * frames))
    assert windows.shape == (inputs, segments * frames, 3)
    assert lengths.tolist() == [segments * frames] * inputs
    for j in range(inputs):
        for n in range(segments):
            for f in range(frames):
                # The padded video is read as (segment, input, frame).
                row = ((n * inputs + j) * frames + f) % count
                assert windows[j, n * frames + f, 0] == row


@given(**SIZES)
def test_restore_undoes_windows(segments, frames, count):
    sampling, video = GridSampling(segments, frames), numbered(count)
    windows, _ = sampling.windows(video)
    np.testing.assert_array_equal(sampling.restore(windows.reshape(-1, 3), count), video)
    np.testing.assert_array_equal(sampling.restore(windows[..., 0].reshape(-1), count), video[:, 0])


@given(seed=st.integers(0, 2**31), **SIZES)
def test_training_segments_are_consecutive_and_lie_in_their_stretches(seed, segments, frames, count):
    sampling = GridSampling(segments, frames)
    sample, valid = sampling.sample(numbered(count).astype(np.float16), np.random.default_rng(seed))
    assert sample.dtype == np.float32 and sample.shape == (segments * frames, 3)
    assert valid == sampling.length == segments * frames
    if count >= segments * frames:
        stretch = (count - frames + 1) // segments
    else:
        stretch = (segments * frames - frames + 1) // segments
    slack = max(stretch - frames + 1, 0)
    for k, segment in enumerate(sample[:, 0].astype(int).reshape(segments, frames)):
        starts = [k * stretch + offset for offset in range(slack + 1)]
        assert list(segment) in [[(start + f) % count for f in range(frames)] for start in starts]


def test_every_place_in_a_stretch_comes_up_and_segments_move_by_themselves():
    sampling, rng = GridSampling(segments=2, frames=3), np.random.default_rng(0)
    # Stretches of (14 − 3 + 1) / 2 = 6 rows, so starts 0…4 and 6…10.
    starts = {tuple(sampling.sample(numbered(14), rng)[0][::3, 0].astype(int)) for _ in range(500)}
    assert starts == {(a, b) for a in range(5) for b in range(6, 11)}


@pytest.mark.parametrize("count", [30, 512, 526, 527])
def test_short_videos_share_a_frame_between_neighbouring_segments(count):
    sample, _ = GridSampling(32, 16).sample(numbered(count), np.random.default_rng(0))
    grid = sample[:, 0].astype(int).reshape(32, 16)
    shares = [int(a[-1]) == int(b[0]) for a, b in zip(grid[:-1], grid[1:], strict=True)]
    assert all(shares) == (count < 527)


def test_a_video_needs_rows():
    with pytest.raises(ValueError, match="at least one snippet"):
        GridSampling(2, 2).windows(np.zeros((0, 3)))
