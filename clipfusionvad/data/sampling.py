"""Sampling: model inputs of T snippets from a video of any length, and its scores from those of the inputs.

A video has L snippets, a model input T; D is the feature width, N the number of test inputs of one video.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Sampling(Protocol):
    """How a method samples inputs of ``length`` snippets; packed stores compare its ``repr``."""

    @property
    def length(self) -> int: ...

    #: Whether training inputs are rows drawn at random; else a video always gives the same input.
    is_random: ClassVar[bool]
    #: Whether a test input is a whole video, of any length, and not T snippets.
    is_whole: ClassVar[bool]

    def draw_rows(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw the rows (T,) of a training input from a video of ``count`` snippets, if ``is_random``."""

    def sample(self, features: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Return a training input (T, D) of a video (L, D) and its number of valid snippets."""

    def windows(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the test inputs (N, T, D) of a whole video (L, D) and the valid snippets of each (N,)."""

    def restore(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Return values of the snippets of the test inputs (N·T, …) in the order of the video (L, …)."""

    def tensor_windows(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same as ``windows``, in operations that torch.export traces for every L."""

    def tensor_restore(self, rows: Tensor, count: int) -> Tensor:
        """Return the same as ``restore``, in such operations."""


@dataclass(frozen=True)
class WindowSampling:
    """Training on the whole video averaged or padded to T snippets; testing in consecutive windows of T."""

    length: int
    is_random: ClassVar[bool] = False
    is_whole: ClassVar[bool] = False

    def draw_rows(self, count: int, rng: np.random.Generator) -> np.ndarray:
        raise TypeError(f"{type(self).__name__} is not random")

    def sample(self, features: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        return sample_uniform(features, self.length)

    def windows(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        windows, count = split_windows(features, self.length)
        # No score comes from the window of zeros after an exact multiple of T.
        needed = -(-count // self.length)
        return windows[:needed], window_lengths(count, self.length)[:needed]

    def restore(self, rows: np.ndarray, count: int) -> np.ndarray:
        return rows[:count]

    def tensor_windows(self, features: Tensor) -> tuple[Tensor, Tensor]:
        count, windows = features.shape[0], _tensor_windows_of(features, self.length)
        padded = F.pad(features, (0, 0, 0, self.length)).narrow(0, 0, windows * self.length)
        left = count - self.length * torch.arange(windows, device=features.device)
        return padded.reshape(windows, self.length, features.shape[1]), left.clamp(max=self.length)

    def tensor_restore(self, rows: Tensor, count: int) -> Tensor:
        return rows.narrow(0, 0, count)


@dataclass(frozen=True)
class GridSampling:
    """A grid of S segments × F consecutive snippets that spans the whole video; T = S·F, all of them valid.

    Training takes F snippets at a random place in each of S stretches of the video; testing reads the video as S
    stretches of J·F snippets, of which input j takes the j-th F-snippet piece of each. A video that is too short
    is repeated from its start. Source: released code of AnomalyCLIP.
    """

    segments: int
    frames: int
    is_random: ClassVar[bool] = True
    is_whole: ClassVar[bool] = False

    @property
    def length(self) -> int:
        return self.segments * self.frames

    def draw_rows(self, count: int, rng: np.random.Generator) -> np.ndarray:
        stretch = (max(count, self.length) - self.frames + 1) // self.segments
        offsets = rng.integers(0, max(stretch - self.frames + 1, 0) + 1, size=self.segments)
        starts = np.arange(self.segments) * stretch + offsets
        return (starts[:, None] + np.arange(self.frames)).ravel() % count

    def sample(self, features: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        return features[self.draw_rows(_snippets(features), rng)].astype(np.float32), self.length

    def windows(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = _snippets(features)
        pieces = -(-count // self.length)
        looped = features[np.arange(pieces * self.length) % count]
        grid = looped.reshape(self.segments, pieces, self.frames, -1).transpose(1, 0, 2, 3)
        return grid.reshape(pieces, self.length, -1), np.full(pieces, self.length, dtype=np.int64)

    def restore(self, rows: np.ndarray, count: int) -> np.ndarray:
        grid = rows.reshape(-1, self.segments, self.frames, *rows.shape[1:])
        return grid.swapaxes(0, 1).reshape(rows.shape)[:count]

    def tensor_windows(self, features: Tensor) -> tuple[Tensor, Tensor]:
        count, pieces = features.shape[0], _tensor_windows_of(features, self.length)
        rows = torch.arange(pieces * self.length, device=features.device)
        looped = features[rows % torch.full((), count, device=features.device)]
        grid = looped.reshape(self.segments, pieces, self.frames, features.shape[1]).transpose(0, 1)
        lengths = torch.full((pieces,), self.length, device=features.device)
        return grid.reshape(pieces, self.length, features.shape[1]), lengths

    def tensor_restore(self, rows: Tensor, count: int) -> Tensor:
        grid = rows.unflatten(0, (-1, self.segments, self.frames))
        return grid.transpose(0, 1).reshape(rows.shape).narrow(0, 0, count)


@dataclass(frozen=True)
class SegmentSampling:
    """Training on T rows of the whole video; testing on the whole video in one piece.

    The T rows are the means of T chunks, where a video of fewer snippets repeats some (DeepMIL, RTFM, UR-DMU), or with
    ``pick`` T of the video's own rows, evenly spaced, where a shorter one is padded with zeros (PEL4VAD).
    """

    length: int
    pick: bool = False
    is_random: ClassVar[bool] = False
    is_whole: ClassVar[bool] = True

    def draw_rows(self, count: int, rng: np.random.Generator) -> np.ndarray:
        raise TypeError(f"{type(self).__name__} is not random")

    def sample(self, features: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        if not self.pick:
            return average_chunks(features.astype(np.float32), self.length), self.length
        count = _snippets(features)
        if count > self.length:
            rows = np.linspace(0, count - 1, self.length).astype(np.int64)
            return features[rows].astype(np.float32), self.length
        return _pad(features, self.length).astype(np.float32), count

    def windows(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return features[None], np.array([_snippets(features)])

    def restore(self, rows: np.ndarray, count: int) -> np.ndarray:
        return rows

    def tensor_windows(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[None], torch.full((1,), features.shape[0], device=features.device)

    def tensor_restore(self, rows: Tensor, count: int) -> Tensor:
        return rows


def sample_uniform(features: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """Return the training input of one video: (L, D) → (T, D) and the number of valid snippets min(L, T).

    A longer video is averaged in T chunks (float32), a shorter one padded with zeros. Source: released code of VadCLIP.
    """
    count = _snippets(features)
    if count > length:
        return average_chunks(features, length), length
    return _pad(features, length), count


def average_chunks(features: np.ndarray, length: int) -> np.ndarray:
    """Return the means of T consecutive chunks, (L, D) → (T, D) float32.

    Chunk bounds are the integers of ``linspace(0, L, T + 1)`` (not i·L//T, which differs if T is not a
    power of two); an empty chunk takes the row at its start. float16 input is averaged in float32 and rounded to
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
    """Return the test input of one video: (L, D) → floor(L / T) + 1 windows (N, T, D), zero-padded, and L.

    An exact multiple of T gets one more window of zeros (released code; its scores are cut off again).
    """
    count = _snippets(features)
    windows = count // length + 1
    return _pad(features, windows * length).reshape(windows, length, features.shape[1]), count


def window_lengths(count: int, length: int) -> np.ndarray:
    """Return the valid snippets of each window of ``split_windows``, (N,) int64: [T, …, T, L mod T].

    The extra window of an exact multiple counts as full, as in the released code.
    """
    lengths = np.full(count // length + 1, length, dtype=np.int64)
    lengths[-1] = count % length or length
    return lengths


def _pad(features: np.ndarray, length: int) -> np.ndarray:
    padded = np.zeros((length, features.shape[1]), dtype=features.dtype)
    padded[: len(features)] = features
    return padded


def _snippets(features: np.ndarray) -> int:
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"features must be (snippets, dim) with at least one snippet, got shape {features.shape}")
    return len(features)


def _tensor_windows_of(features: Tensor, length: int) -> Any:
    """Return how many windows of T hold L snippets, N ≥ 1.

    From a tensor, the number is a new symbol to torch.export. ⌈L / T⌉ would be specialised to the example video.
    """
    count = features.shape[0]
    windows = torch.full((), (count + length - 1) // length).item()
    torch._check(windows >= 1)
    torch._check(count <= windows * length)
    torch._check(windows * length <= count + length)
    return windows
