"""Multiple-instance losses of the CLIP-based detectors. Pure functions on tensors.

B videos (bags), T snippets, C classes of which column 0 is *normal*; ``lengths`` (B,) valid snippets, at least 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def topk_mean(values: Tensor, lengths: Tensor) -> Tensor:
    """Mean of the k_b largest valid entries along time, (B, T, …) → (B, …), with k_b = floor(L_b / 16) + 1.

    Source: released code of VadCLIP (top-k MIL pooling); k is at most L_b for every L_b ≥ 1.
    """
    # Nothing here waits for a GPU: it is not asked what the lengths are.
    if lengths.device.type == "cpu" and (lengths < 1).any():
        raise ValueError("every video needs at least one valid snippet")
    k = torch.div(lengths, 16, rounding_mode="floor") + 1
    most = min(values.shape[1], values.shape[1] // 16 + 1)
    steps = torch.arange(values.shape[1], device=values.device)
    shape = (-1, values.shape[1]) + (1,) * (values.dim() - 2)
    valid = (steps < lengths[:, None]).view(shape)
    top = values.masked_fill(~valid, -torch.inf).topk(most, dim=1).values
    chosen = (steps[: top.shape[1]] < k[:, None]).view((-1, top.shape[1]) + shape[2:])
    total = torch.where(chosen, top, torch.zeros((), dtype=top.dtype, device=top.device)).sum(1)
    return total / k.view((-1,) + (1,) * (values.dim() - 2)).to(values.dtype)


def coarse_mil_loss(coarse_logits: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """Binary cross-entropy of the video's anomaly score, the top-k mean of σ(logits).

    coarse_logits (B, T, 1), targets (B, C) multi-hot → scalar. Source: VadCLIP eq. 8 and released code.
    """
    scores = topk_mean(torch.sigmoid(coarse_logits.float()).squeeze(-1), lengths)
    # Of what is not finite, a CPU would raise an error where a GPU gives a loss that is not finite either.
    finite = scores.detach().isfinite()
    loss = F.binary_cross_entropy(scores.where(finite, 0), 1 - targets[:, 0].to(scores.dtype))
    return loss + scores.detach().where(~finite, 0).sum()


def fine_mil_loss(fine_logits: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """MIL-Align: cross-entropy of the per-class top-k means with the normalised multi-hot target.

    fine_logits (B, T, C), targets (B, C) → scalar. Source: VadCLIP eq. 9-10 and released code.
    """
    similarities = topk_mean(fine_logits.float(), lengths)
    targets = targets.to(similarities.dtype)
    targets = targets / targets.sum(1, keepdim=True)
    return -(targets * F.log_softmax(similarities, dim=1)).sum(1).mean()


def text_separation_loss(text_features: Tensor, weight: float) -> Tensor:
    """weight · mean over the C−1 anomaly classes of |cos(t_normal, t_class)|.

    text_features (C, E), not normalised → scalar. Source: released code of VadCLIP (weight 1e-1 on
    UCF-Crime, 1e-4 on XD-Violence).
    """
    normed = F.normalize(text_features.float(), dim=-1)
    return weight * (normed[1:] @ normed[0]).abs().mean()
