"""Compute one-vs-rest frame metrics of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike

from clipfusionvad.metrics.frame import snippet_metrics


class ClassMetrics(TypedDict):
    """``mauc`` and ``mean_ap`` over the classes that occur, and AUC and AP ``per_class``; all in 0..1."""

    mauc: float
    mean_ap: float
    per_class: dict[str, dict[str, float]]


def class_metrics(
    class_probs: ArrayLike, positives: ArrayLike, frames: ArrayLike, class_labels: Sequence[str]
) -> ClassMetrics:
    """Return one-vs-rest AUC and AP of each anomalous class, and their means (AnomalyCLIP's mAUC and mAP).

    class_probs (n, C) of each snippet, class 0 normal; positives (n, C), frames of the snippet in each class; frames
    (n,), all its frames. A class's negatives are all frames outside it, normal ones included. The means leave out the
    normal class and classes without positives or without negatives.
    Source: AnomalyCLIP, section 4.1, and its released code.
    """
    class_probs, positives = np.asarray(class_probs), np.asarray(positives)
    per_class = {}
    for column, label in enumerate(class_labels[1:], start=1):
        if positives[:, column].any():
            per_class[label] = snippet_metrics(class_probs[:, column], positives[:, column], frames)
    means = {
        key: float(np.nanmean([found[key] for found in per_class.values()])) if per_class else float("nan")
        for key in ("auc", "ap")
    }
    return {"mauc": means["auc"], "mean_ap": means["ap"], "per_class": per_class}
