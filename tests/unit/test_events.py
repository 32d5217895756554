"""Synthetic event images against a plain count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from clipfusionvad.extraction.events import EventCounter, normalise_counts

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
    dark, light = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    counter = EventCounter(10)
    counter.add(dark)
    assert not counter.take().any()
    counter.add(light)
    assert not counter.take().any()


def test_counts_are_divided_by_the_maximum_of_a_crop():
    counts = np.zeros((2, 2, 3, 3), np.uint8)
    counts[0, 0, 1, 1], counts[1, 0, 0, 0], counts[1, 1, 2, 2] = 12, 6, 5
    block = normalise_counts(counts, "block")
    assert block.dtype == np.float32
    assert (block[0, 0, 1, 1], block[1, 0, 0, 0], block[1, 1, 2, 2]) == (1, 0.5, 1)
    chunk = normalise_counts(counts, "chunk")
    assert (chunk[0, 0, 1, 1], chunk[1, 0, 0, 0], chunk[1, 1, 2, 2]) == (1, 1, 1)
    assert not chunk[0, 1].any()


@pytest.mark.parametrize(("scope", "empty"), [("block", False), ("chunk", True)])
def test_where_nothing_moves(scope, empty):
    counts = np.zeros((2, 1, 3, 3), np.uint8)
    counts[1, 0, 0, 0] = 3
    assert normalise_counts(counts, scope, "zero")[0].max() == 0
    assert np.isnan(normalise_counts(counts, scope, "nan")[0]).all() == empty
    assert np.isnan(normalise_counts(counts[:1], scope, "nan")).all()
