"""Read what is known of a test set that score files are judged on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipfusionvad.data.annotations import Annotation, join_pieces, read_annotation_files, read_lengths
from clipfusionvad.data.truth import as_frame_truth, is_keyed
from clipfusionvad.datasets import Dataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.npy import read_array

Annotations = dict[str, Annotation]


@dataclass(frozen=True)
class KnownTruth:
    """What is known of a test set: frame truth (F,), or annotations; frames of each video, by name or in list order."""

    source: str
    array: np.ndarray | None
    timed: Annotations
    classed: Annotations
    lengths: dict[str, int] | np.ndarray | None


def read_known_truth(
    truth: str | None, annotations: Sequence[str], lengths: str | None, dataset: Dataset
) -> KnownTruth:
    """Read the truth: a frame array, a keyed file, or the official annotation files; and the videos' frames."""
    files = list(annotations)
    array = None
    if truth and (is_keyed(truth) or not truth.lower().endswith(".npy")):
        files.append(truth)
    elif truth:
        array = as_frame_truth(read_array(truth, "frame truth").ravel(), truth)
    counts: dict[str, int] | np.ndarray | None = None
    for path in list(files):
        if (found := read_lengths(path)) is not None:
            counts = found
            files.remove(path)
    if lengths and lengths.lower().endswith(".npy"):
        counts = read_array(lengths, "numbers of frames").ravel()
        if counts.dtype.kind not in "iu" or not len(counts) or counts.min() < 1:
            raise UserError(f"{lengths} is not a whole number of frames for each test video")
    elif lengths and (counts := read_lengths(lengths)) is None:
        raise UserError(f"{lengths} has no columns video,frames with the frames of each test video")
    if array is not None and files:
        raise UserError(f"{truth} and {files[0]} are both truths: give one of them")
    if array is None and not files:
        raise UserError("no truth: give --truth FILE, or --annotations FILE (with --lengths FILE)")
    timed, classed = read_annotation_files(files, dataset, set())
    timed, classed = (join_pieces(read, dataset) for read in (timed, classed))
    return KnownTruth(truth if array is not None and truth else " and ".join(files), array, timed, classed, counts)
