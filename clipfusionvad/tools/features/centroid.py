"""Compare the mean of features with that of other features: a centroid file, or feature files of other videos.

Features of one CLIP share a direction, whatever the videos show. The means of real sets of CLIP ViT-B/16 features
(UCF-Crime, XD-Violence, ShanghaiTech, CCTV) have cosines of 0.77 to 0.88 with one another and lengths of 7.1 to 9.8;
single videos have cosines of 0.62 to 0.81 with them. Features of another model of the same width have about 0.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from clipfusionvad.data.features import load_features, read_shape
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import walk_files
from clipfusionvad.io.npy import read_array

T = TypeVar("T")
# Sets of features with a lower cosine, or whose means differ more in length, are not of one model and one scale.
LEAST_COSINE, LARGEST_RATIO = 0.5, 2.0
# The mean of so many files of a folder, spread evenly, is that of all to about 0.01.
_FILES = 200


def read_centroid(path: Path) -> np.ndarray:
    """Read the mean (D,) float64 of features: a file (D,) or (n, D), or a folder of feature files.

    Of a folder, the videos' means count alike; of many files, 200 are read. Raises ``UserError`` for anything else.
    """
    if path.is_dir():
        files = sorted(walk_files(path, ".npy"))
        if not files:
            raise UserError(f"no feature files (.npy) below {path}")
        width = read_shape(files[0])[1]
        means = [load_features(file, width).mean(axis=0, dtype=np.float64) for file in spread(files, _FILES)]
        return np.asarray(means).mean(axis=0)
    array = read_array(path, "centroid or feature file")
    if array.dtype.kind != "f" or array.ndim not in (1, 2) or not array.size:
        raise UserError(f"{path} has shape {array.shape} {array.dtype}; a centroid is (D,), features are (snippets, D)")
    centroid = np.atleast_2d(array).mean(axis=0, dtype=np.float64)
    if not np.isfinite(centroid).all() or not centroid.any():
        raise UserError(f"the mean of {path} is zero or not finite; name another file")
    return centroid


def spread(items: Sequence[T], most: int | None) -> Sequence[T]:
    """Return at most so many of the items, spread evenly."""
    if most is None or len(items) <= most:
        return items
    return [items[index] for index in np.linspace(0, len(items) - 1, most).astype(int)]


def agreement(mean: np.ndarray, centroid: np.ndarray) -> tuple[float, float]:
    """Return the cosine of two means (D,) and the length of the first divided by that of the second."""
    lengths = np.linalg.norm(mean), np.linalg.norm(centroid)
    return float(mean @ centroid / max(lengths[0] * lengths[1], 1e-12)), float(lengths[0] / lengths[1])


def what_differs(cosine: float, ratio: float) -> str:
    """Return why two sets of features are not of one model and one scale; empty if they may be."""
    if cosine < LEAST_COSINE:
        return "they point elsewhere: another model, or other preprocessing"
    if not 1 / LARGEST_RATIO <= ratio <= LARGEST_RATIO:
        return "they have another scale: are features of one side normalised?"
    return ""
