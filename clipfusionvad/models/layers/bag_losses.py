"""Losses of ReFLIP-VAD's paper, where a normal video counts by its highest snippet. Pure functions on tensors.

B videos, T snippets, C classes of which column 0 is *normal*; ``targets`` (B, C) multi-hot, ``lengths`` (B,) valid
snippets. With ``single`` the K of a normal video is 1, else floor(L / 16) + 1 as for all others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfusionvad.losses import topk_mean

DISTANCES = ("mean_topk", "minmax")


def bag_mean(values: Tensor, targets: Tensor, lengths: Tensor, single: bool) -> Tensor:
    """Mean of each video's K largest valid entries along time, (B, T) or (B, T, C) → (B,) or (B, C)."""
    means = topk_mean(values, lengths)
    if not single:
        return means
    shape = (-1, *[1] * (values.dim() - 1))
    padded = torch.arange(values.shape[1], device=values.device) >= lengths[:, None]
    highest = values.masked_fill(padded.view(*padded.shape, *shape[2:]), -torch.inf).amax(dim=1)
    return torch.where((targets[:, 0] > 0).view(shape[:-1]), highest, means)


def coarse_loss(coarse_logits: Tensor, targets: Tensor, lengths: Tensor, single: bool) -> Tensor:
    """L_cga: binary cross-entropy of the video's score, the mean of its K highest snippets. (B, T, 1) → scalar."""
    scores = bag_mean(coarse_logits.float().sigmoid().squeeze(-1), targets, lengths, single)
    return F.binary_cross_entropy(scores, 1 - targets[:, 0].to(scores.dtype))


def fine_loss(fine_logits: Tensor, targets: Tensor, lengths: Tensor, single: bool) -> Tensor:
    """L_fga: KL divergence of the softmax of the per-class means from the normalised label, (B, T, C) → scalar.

    Read as KL(label ‖ prediction), up to the label's own entropy: cross-entropy. As printed it is infinite.
    """
    similarities = bag_mean(fine_logits.float(), targets, lengths, single)
    labels = targets.to(similarities.dtype)
    return F.cross_entropy(similarities, labels / labels.sum(dim=1, keepdim=True))


def magnitude_loss(
    magnitudes: Tensor, targets: Tensor, lengths: Tensor, single: bool, margin: float, distance: str
) -> Tensor:
    """L_fms: videos of one kind near each other, normal and anomalous ones apart by ``margin``. (B, T) → scalar.

    ``distance`` "mean_topk": between the means of the K largest magnitudes of two videos; "minmax": the smallest
    difference between any two of them within a kind, the largest across kinds (as printed). Differences are
    absolute, the margin a hinge, and the three sums averages over pairs of two videos, 0 where there is none.
    """
    if distance == "minmax":
        near, far = _set_distances(_largest(magnitudes.float(), targets, lengths, single))
    else:
        means = bag_mean(magnitudes.float(), targets, lengths, single)
        near = far = (means[:, None] - means).abs()
    normal = targets[:, 0] > 0
    distinct = ~torch.eye(len(normal), dtype=torch.bool, device=normal.device)
    within = _average(near, distinct & normal & normal[:, None]) + _average(near, distinct & ~normal & ~normal[:, None])
    return within + _average(F.relu(margin - far), normal[:, None] & ~normal)


def _largest(values: Tensor, targets: Tensor, lengths: Tensor, single: bool) -> Tensor:
    """The K largest of each video (B, T) → (B, max K); in a shorter row the largest stands in for what is missing."""
    counts = torch.div(lengths, 16, rounding_mode="floor") + 1
    if single:
        counts = torch.where(targets[:, 0] > 0, 1, counts)
    steps = torch.arange(values.shape[1], device=values.device)
    # As many as the longest video could have: a GPU is not asked what the lengths are.
    most = values.shape[1] // 16 + 1
    top = values.masked_fill(steps >= lengths[:, None], -torch.inf).topk(most, dim=1).values
    return torch.where(steps[: top.shape[1]] < counts[:, None], top, top[:, :1])


def _set_distances(sets: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest absolute difference between members of two sets, (B, K) → twice (B, B)."""
    gaps = (sets[:, None, :, None] - sets[None, :, None, :]).abs()
    return gaps.amin(dim=(-2, -1)), gaps.amax(dim=(-2, -1))


def _average(values: Tensor, pairs: Tensor) -> Tensor:
    return (values * pairs).sum() / pairs.sum().clamp(min=1)
