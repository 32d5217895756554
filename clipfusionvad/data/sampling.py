"""How a video of any length becomes model inputs of ``T`` snippets. Pure functions on arrays.

L snippets of a video, T the model's ``visual_length``, D feature width.
"""

from __future__ import annotations

import numpy as np


def sample_uniform(features: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """Training input of one video: (L, D) → (T, D) and the number of valid snippets min(L, T).

    A longer video is averaged in T chunks (float32 out), a shorter one is padded with zeros (dtype kept).
    Source: released code of VadCLIP and ClipFusionVAD.
    """
    count = _snippets(features)
    if count > length:
        return average_chunks(features, length), length
    return _pad(features, length), count


def average_chunks(features: np.ndarray, length: int) -> np.ndarray:
    """Means of T consecutive chunks, (L, D) → (T, D) float32.

    Chunk bounds are the integers of ``linspace(0, L, T + 1)`` (not i·L//T, which differs where T is no power
    of two); an empty chunk takes the row at its start. float16 input is averaged in float32 and rounded to
    float16 before it is stored as float32, as numpy's mean does in the released code.
    """
    count = _snippets(features)
    bounds = np.linspace(0, count, length + 1, dtype=np.int32)
    sizes = np.maximum(np.diff(bounds), 1)
    steps = np.arange(sizes.max())
    wide = np.promote_types(features.dtype, np.float32)
    chunks = features[np.minimum(bounds[:-1, None] + steps, count - 1)].astype(wide)
    chunks[steps >= sizes[:, None]] = 0
    # Summing along the middle axis adds row after row, as the mean of each chunk does: bit for bit the same.
    means = chunks.sum(axis=1) / sizes[:, None].astype(wide)
    return means.astype(features.dtype).astype(np.float32)


def split_windows(features: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """Test input of one video: (L, D) → windows (N, T, D), zero-padded, and L.

    A video shorter than T is one window; any other makes floor(L / T) + 1, so an exact multiple of T gets one
    more window of zeros (released code; its scores are cut off again).
    """
    count = _snippets(features)
    windows = 1 if count < length else count // length + 1
    padded = _pad(features, windows * length)
    return padded.reshape(windows, length, features.shape[1]), count


def window_lengths(count: int, length: int) -> np.ndarray:
    """Valid snippets of each window of ``split_windows``, (N,) int64: [T, …, T, L mod T].

    The extra window of an exact multiple counts as full, as in the released code.
    """
    if count < length:
        return np.array([count], dtype=np.int64)
    lengths = np.full(count // length + 1, length, dtype=np.int64)
    if count % length:
        lengths[-1] = count % length
    return lengths


def _pad(features: np.ndarray, length: int) -> np.ndarray:
    padded = np.zeros((length, features.shape[1]), dtype=features.dtype)
    padded[: len(features)] = features
    return padded


def _snippets(features: np.ndarray) -> int:
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"features must be (snippets, dim) with at least one snippet, got shape {features.shape}")
    return len(features)
