"""Windows, uniform sampling and grids of segments × frames, against plain loops, and their invariants."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad.data import sample_uniform, split_windows
from clipfusionvad.data.sampling import GridSampling, average_chunks, window_lengths

VIDEO = {"count": st.integers(1, 300), "length": st.integers(1, 64), "dtype": st.sampled_from([np.float16, np.float32])}
GRID = {"segments": st.integers(1, 6), "frames": st.integers(1, 5), "count": st.integers(1, 200)}


def features(count, dtype):
    return np.random.default_rng(count).standard_normal((count, 3)).astype(dtype)


@given(**VIDEO)
def test_chunks_equal_the_plain_loop_bit_for_bit_and_short_videos_are_padded(count, length, dtype):
    values = features(count, dtype)
    bounds = np.linspace(0, len(values), length + 1, dtype=np.int32)
    rows = [values[a] if a == b else values[a:b].mean(axis=0) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    np.testing.assert_array_equal(average_chunks(values, length), np.stack(rows).astype(np.float32))
    sampled, valid = sample_uniform(values, length)
    assert sampled.shape == (length, 3) and valid == min(count, length)
    assert sampled.dtype == (dtype if count <= length else np.float32)
    expected = np.vstack([values, np.zeros((length - count, 3))]) if count <= length else np.stack(rows)
    np.testing.assert_array_equal(sampled, expected)


def test_bounds_are_those_of_linspace_where_they_differ_from_integer_division():
    # The step 1.14 is not exact in floats, so one bound falls short of the whole number it should be.
    count, length = 114, 100
    bounds = np.linspace(0, count, length + 1, dtype=np.int32)
    different = np.flatnonzero(bounds != np.arange(length + 1) * count // length)
    assert different.size
    values, first = np.arange(count, dtype=np.float32)[:, None], different[0]
    assert average_chunks(values, length)[first, 0] == values[bounds[first] : bounds[first + 1]].mean()


@given(**VIDEO)
def test_windows_hold_every_snippet_once_and_zeros_after(count, length, dtype):
    values = features(count, dtype)
    windows, valid = split_windows(values, length)
    assert valid == count and windows.dtype == dtype
    assert len(windows) == (1 if count < length else count // length + 1)
    np.testing.assert_array_equal(windows.reshape(-1, 3)[:count], values)
    assert not windows.reshape(-1, 3)[count:].any()
    lengths = window_lengths(count, length)
    assert lengths.min() >= 1 and lengths.max() <= length
    # The extra window of an exact multiple counts as full in the released code.
    assert lengths.sum() == count + (length if count % length == 0 else 0)


@pytest.mark.parametrize("call", [sample_uniform, split_windows, lambda x, length: GridSampling(2, 2).windows(x)])
@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 3, 4)])
def test_no_snippets_or_another_shape_is_refused(call, shape):
    with pytest.raises(ValueError, match="at least one snippet"):
        call(np.zeros(shape), 8)


def numbered(count):
    """A video whose rows hold their own number."""
    return np.repeat(np.arange(count, dtype=np.float32)[:, None], 3, axis=1)


@given(**GRID)
def test_grids_equal_the_loop_and_restore_undoes_them(segments, frames, count):
    sampling, video = GridSampling(segments, frames), numbered(count)
    windows, lengths = sampling.windows(video)
    inputs = -(-count // (segments * frames))
    assert windows.shape == (inputs, segments * frames, 3)
    assert lengths.tolist() == [segments * frames] * inputs
    for j, n, f in np.ndindex(inputs, segments, frames):
        # The padded video is read as (segment, input, frame).
        assert windows[j, n * frames + f, 0] == ((n * inputs + j) * frames + f) % count
    np.testing.assert_array_equal(sampling.restore(windows.reshape(-1, 3), count), video)
    np.testing.assert_array_equal(sampling.restore(windows[..., 0].reshape(-1), count), video[:, 0])


@given(seed=st.integers(0, 2**31), **GRID)
def test_training_segments_are_consecutive_and_lie_in_their_stretches(seed, segments, frames, count):
    sampling = GridSampling(segments, frames)
    sample, valid = sampling.sample(numbered(count).astype(np.float16), np.random.default_rng(seed))
    assert sample.dtype == np.float32 and sample.shape == (segments * frames, 3)
    assert valid == sampling.length == segments * frames
    stretch = (max(count, segments * frames) - frames + 1) // segments
    slack = max(stretch - frames + 1, 0)
    for k, segment in enumerate(sample[:, 0].astype(int).reshape(segments, frames)):
        starts = [k * stretch + offset for offset in range(slack + 1)]
        assert list(segment) in [[(start + f) % count for f in range(frames)] for start in starts]


def test_every_start_in_a_stretch_is_drawn_and_segments_move_independently():
    sampling, rng = GridSampling(segments=2, frames=3), np.random.default_rng(0)
    # Stretches of (14 − 3 + 1) / 2 = 6 rows, so starts 0…4 and 6…10.
    starts = {tuple(sampling.sample(numbered(14), rng)[0][::3, 0].astype(int)) for _ in range(500)}
    assert starts == {(a, b) for a in range(5) for b in range(6, 11)}
    # Short videos share a frame between neighbouring segments.
    for count in (30, 512, 526, 527):
        grid = GridSampling(32, 16).sample(numbered(count), rng)[0][:, 0].reshape(32, 16)
        assert (grid[:-1, -1] == grid[1:, 0]).all() == (count < 527)
