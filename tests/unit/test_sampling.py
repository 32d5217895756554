"""Sampling and windows against plain loops, and their invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad.data import sample_uniform, split_windows
from clipfusionvad.data.sampling import average_chunks, window_lengths

counts = st.integers(1, 300)
lengths = st.integers(1, 64)
dtypes = st.sampled_from([np.float16, np.float32])


def features(count, dtype=np.float32, dim=3):
    return np.random.default_rng(count).standard_normal((count, dim)).astype(dtype)


def plain_chunks(values, length):
    """The released way: one chunk after another."""
    bounds = np.linspace(0, len(values), length + 1, dtype=np.int32)
    rows = [values[a] if a == b else values[a:b].mean(axis=0) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return np.stack(rows).astype(np.float32)


@given(counts, lengths, dtypes)
def test_chunks_equal_the_plain_loop_bit_for_bit(count, length, dtype):
    values = features(count, dtype)
    np.testing.assert_array_equal(average_chunks(values, length), plain_chunks(values, length))


@given(counts, lengths, dtypes)
def test_sample_uniform(count, length, dtype):
    values = features(count, dtype)
    sampled, valid = sample_uniform(values, length)
    assert sampled.shape == (length, 3) and valid == min(count, length)
    if count <= length:
        assert sampled.dtype == dtype
        np.testing.assert_array_equal(sampled[:count], values)
        assert not sampled[count:].any()
    else:
        assert sampled.dtype == np.float32


def test_bounds_are_those_of_linspace_where_they_differ_from_integer_division():
    # The step 1.14 is not exact in floats, so one bound falls short of the whole number it should be.
    count, length = 114, 100
    bounds = np.linspace(0, count, length + 1, dtype=np.int32)
    naive = np.arange(length + 1) * count // length
    assert (bounds != naive).any()
    values = np.arange(count, dtype=np.float32)[:, None]
    first = int(np.flatnonzero(bounds != naive)[0])
    assert average_chunks(values, length)[first, 0] == values[bounds[first] : bounds[first + 1]].mean()


@given(counts, lengths, dtypes)
def test_windows_hold_every_snippet_once_and_zeros_after(count, length, dtype):
    values = features(count, dtype)
    windows, valid = split_windows(values, length)
    flat = windows.reshape(-1, 3)
    assert valid == count and windows.dtype == dtype
    assert len(windows) == (1 if count < length else count // length + 1)
    np.testing.assert_array_equal(flat[:count], values)
    assert not flat[count:].any()


@given(counts, lengths)
def test_window_lengths_cover_the_video(count, length):
    found = window_lengths(count, length)
    assert found.min() >= 1 and found.max() <= length
    # The extra window of an exact multiple counts as full in the released code.
    assert found.sum() == count + (length if count % length == 0 else 0)


@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 3, 4)])
def test_no_snippets_or_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="at least one snippet"):
        sample_uniform(np.zeros(shape), 8)
    with pytest.raises(ValueError, match="at least one snippet"):
        split_windows(np.zeros(shape), 8)
