"""Testing as the original program does it: one video at a time, its prompts encoded again, scores per frame."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks.plain.detection import detection_map
from benchmarks.plain.model import PlainClipFusionVAD

FRAMES_PER_SNIPPET = 16


class VideoScores(NamedTuple):
    """Probabilities of one video's n snippets: coarse (n,), fine (n,), classes (n, C)."""

    coarse: np.ndarray
    fine: np.ndarray
    classes: np.ndarray


def score_videos(
    model: PlainClipFusionVAD, features: Sequence[np.ndarray], length: int, device: torch.device
) -> list[VideoScores]:
    """Score whole videos, (n, D) each, in windows of ``length`` snippets."""
    model.eval()
    scores = []
    with torch.no_grad():
        for video in features:
            count = len(video)
            windows = count // length + 1
            padded = np.zeros((windows * length, video.shape[1]), dtype=np.float32)
            padded[:count] = video
            lengths = torch.tensor([max(min(count - length * i, length), 0) for i in range(windows)])
            output = model(torch.from_numpy(padded).view(windows, length, -1).to(device), lengths)
            coarse = torch.sigmoid(output.coarse_logits.reshape(-1)[:count])
            classes = output.fine_logits.reshape(windows * length, -1)[:count].softmax(dim=-1)
            scores.append(VideoScores(*(part.cpu().numpy() for part in (coarse, 1 - classes[:, 0], classes))))
    return scores


def evaluate(
    scores: Sequence[VideoScores],
    frames: Sequence[np.ndarray],
    segments: Sequence,
    labels: Sequence,
    class_labels: Sequence[str],
) -> dict[str, float | list[float]]:
    """``auc1``, ``ap1``, ``auc2``, ``ap2`` over frames and ``map`` in percent at each IoU; truth as in the package."""
    metrics = {}
    for branch, name in enumerate(("coarse", "fine"), start=1):
        found = rank([getattr(video, name) for video in scores], frames)
        metrics |= {f"{key}{branch}": value for key, value in found.items()}
    repeated = [np.repeat(video.classes, FRAMES_PER_SNIPPET, axis=0) for video in scores]
    return metrics | {"map": detection_map(repeated, segments, labels, class_labels)}


def rank(scores: Sequence[np.ndarray], frames: Sequence[np.ndarray]) -> dict[str, float]:
    """AUC and AP of scores per snippet, each repeated 16 times, against the truth of all frames."""
    joined: list[float] = []
    for video in scores:
        joined += video.tolist()
    repeated, truth = np.repeat(joined, FRAMES_PER_SNIPPET), np.concatenate(frames)
    return {"auc": roc_auc_score(truth, repeated), "ap": average_precision_score(truth, repeated)}
