"""Losses of all methods. Pure functions on tensors.

B videos (bags), T snippets, C classes of which column 0 is *normal*; ``targets`` (B, C) multi-hot, ``lengths`` (B,)
valid snippets of each video, at least 1. Every loss is a scalar unless its docstring says otherwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DISTANCES = ("mean_topk", "minmax")


def valid_mask(lengths: Tensor, steps: int) -> Tensor:
    """Return which of ``steps`` snippets are not padding: lengths (B,) → (B, T) bool."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def topk_mean(values: Tensor, lengths: Tensor, k: Tensor | None = None) -> Tensor:
    """Mean of the k_b largest valid entries along time, (B, T, …) → (B, …), with k_b = floor(L_b / 16) + 1 or ``k``.

    Source: released code of VadCLIP (top-k MIL pooling); k is at most L_b for every L_b ≥ 1.
    """
    # Only on a CPU: reading the lengths would make a GPU wait.
    if lengths.device.type == "cpu" and (lengths < 1).any():
        raise ValueError("every video needs at least one valid snippet")
    k = bag_sizes(lengths) if k is None else k
    top, chosen = _largest(values, lengths, k)
    total = torch.where(chosen, top, torch.zeros((), dtype=top.dtype, device=top.device)).sum(1)
    return total / k.view(-1, *(1,) * (values.dim() - 2)).to(values.dtype)


def score_weighted_mean(values: Tensor, logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of ``values`` (B, T, D) weighted by exp(10·σ(logits)) − 1; logits (B, T), valid (B, T) bool → (B, D).

    Source: PEL4VAD, DSANet. As written there it is 0/0 for a video whose scores are all below 1e-8.
    """
    weights = torch.expm1(10 * torch.sigmoid(logits.float()))
    weights = weights if valid is None else weights * valid
    shares = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return (shares.to(values.dtype)[:, None] @ values).squeeze(1)


def bag_sizes(lengths: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return how many snippets of each video are pooled, (B,); with ``targets`` 1 of a normal video (ReFLIP-VAD)."""
    k = torch.div(lengths, 16, rounding_mode="floor") + 1
    return k if targets is None else torch.where(targets[:, 0] > 0, 1, k)


def coarse_mil_loss(coarse_logits: Tensor, targets: Tensor, lengths: Tensor, single_normal: bool = False) -> Tensor:
    """Binary cross-entropy of the video's anomaly score, the ``topk_mean`` of σ(logits); coarse_logits (B, T, 1).

    Source: VadCLIP eq. 8 and released code; with ``single_normal`` L_cga of ReFLIP-VAD.
    """
    k = bag_sizes(lengths, targets if single_normal else None)
    scores = topk_mean(torch.sigmoid(coarse_logits.float()).squeeze(-1), lengths, k)
    return binary_cross_entropy(scores, 1 - targets[:, 0].to(scores.dtype))


def binary_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """That of torch, but not finite where scores are not: there torch raises an error on a CPU."""
    finite = scores.detach().isfinite()
    return F.binary_cross_entropy(scores.where(finite, 0), targets) + scores.detach().where(~finite, 0).sum()


def fine_mil_loss(fine_logits: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """MIL-Align, cross-entropy of the per-class ``topk_mean`` with the normalised target; fine_logits (B, T, C).

    Source: VadCLIP eq. 9-10 and released code.
    """
    similarities = topk_mean(fine_logits.float(), lengths)
    targets = targets.to(similarities.dtype)
    targets = targets / targets.sum(1, keepdim=True)
    return -(targets * F.log_softmax(similarities, dim=1)).sum(1).mean()


def alignment_loss(fine_logits: Tensor, targets: Tensor, lengths: Tensor, single_normal: bool) -> Tensor:
    """L_fga of ReFLIP-VAD: ``fine_mil_loss``, in which a normal video may count by its highest snippet.

    The paper's KL divergence is read without the label's own entropy: as printed it is infinite.
    """
    similarities = topk_mean(fine_logits.float(), lengths, bag_sizes(lengths, targets if single_normal else None))
    labels = targets.to(similarities.dtype)
    return F.cross_entropy(similarities, labels / labels.sum(dim=1, keepdim=True))


def text_separation_loss(text_features: Tensor, weight: float) -> Tensor:
    """weight · mean over the anomaly classes of |cos(t_normal, t_class)|; text_features (C, E). Source: VadCLIP."""
    normed = F.normalize(text_features.float(), dim=-1)
    return weight * (normed[1:] @ normed[0]).abs().mean()


def magnitude_loss(
    magnitudes: Tensor, targets: Tensor, lengths: Tensor, single_normal: bool, margin: float, distance: str
) -> Tensor:
    """L_fms: videos of one kind near each other, normal and anomalous ones ``margin`` apart; magnitudes (B, T).

    ``distance`` "mean_topk": between the ``topk_mean`` magnitudes of two videos; "minmax": of their top-k magnitudes
    the smallest difference within a kind, the largest across kinds (as printed). Differences are absolute, the margin
    is a hinge, each of the three sums a mean over pairs of videos, 0 without a pair. Source: paper of ReFLIP-VAD.
    """
    magnitudes, normal = magnitudes.float(), targets[:, 0] > 0
    k = bag_sizes(lengths, targets if single_normal else None)
    if distance == "minmax":
        top, chosen = _largest(magnitudes, lengths, k)
        # Where a video has fewer than the most, its largest one fills the row, which changes neither extreme.
        top = torch.where(chosen, top, top[:, :1])
        gaps = (top[:, None, :, None] - top[None, :, None, :]).abs()
        near, far = gaps.amin(dim=(-2, -1)), gaps.amax(dim=(-2, -1))
    else:
        means = topk_mean(magnitudes, lengths, k)
        near = far = (means[:, None] - means).abs()
    distinct = ~torch.eye(len(normal), dtype=torch.bool, device=normal.device)
    within = _average(near, distinct & normal & normal[:, None]) + _average(near, distinct & ~normal & ~normal[:, None])
    return within + _average(F.relu(margin - far), normal[:, None] & ~normal)


def agreement_loss(image_mu: Tensor, event_mu: Tensor) -> Tensor:
    """Mean of 1 − cos(μ_I, μ_E) over snippets, plus that of | ‖μ_I‖ − ‖μ_E‖ |; (…, D). Source: code of IEF-VAD."""
    angle = (1 - F.cosine_similarity(image_mu, event_mu, dim=-1)).mean()
    return angle + (image_mu.norm(dim=-1) - event_mu.norm(dim=-1)).abs().mean()


def gaussian_kl(mu: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(μ, σ²) from N(0, 1), the mean over all entries. Source: released code of IEF-VAD."""
    return -0.5 * (1 + log_variance - mu.square() - log_variance.exp()).mean()


def segment_losses(
    similarity: Tensor, log_probabilities: Tensor, scores: Tensor, targets: Tensor, top: Tensor, bottom: Tensor
) -> dict[str, Tensor]:
    """AnomalyCLIP's seven terms by name, not weighted; one about a kind of video that the batch lacks is 0.

    similarity (B, S, F, C−1), log_probabilities (B, S, F, C) and scores (B, S, F) of the F frames of S segments; top,
    bottom (B, K): chosen segments. Of several classes the mean counts; the released code, the source, has only one.
    """
    normal = targets[:, 0] > 0
    abnormal = ~normal
    shares = class_shares(targets)[:, None, None]
    direction = (similarity * shares).sum(dim=-1)
    log_true, log_normal = (log_probabilities[..., 1:] * shares).sum(dim=-1), log_probabilities[..., 0]
    top, bottom = (chosen[..., None].expand(-1, -1, scores.shape[2]) for chosen in (top, bottom))
    # All abnormal videos are one sequence, so that it also smooths from one to the next (released code).
    order = normal.int().argsort(stable=True)
    steps = scores[order].flatten().diff().square()
    counted = abnormal[order, None].expand(-1, scores[0].numel()).flatten()[1:]
    return {
        "dir_abn": -_mean(direction.gather(1, top), abnormal),
        "dir_nor": _mean(similarity.amax(dim=-1), normal),
        "topk_abn": -_mean(log_true.gather(1, top), abnormal),
        "bottomk_abn": -_mean(log_normal.gather(1, bottom), abnormal),
        "topk_nor": -_mean(log_normal.gather(1, top), normal),
        "smooth": steps.where(counted, 0).sum(),
        "sparse": _mean(scores, abnormal),
    }


def ranking_loss(normal: Tensor, anomalous: Tensor, margin: float = 1.0) -> Tensor:
    """Mean of max(0, margin − a_i + n_i) over pairs: bag scores n of normal and a of anomalous videos, (B,).

    Source: Sultani et al. (CVPR 2018), eq. 6.
    """
    return F.relu(margin - anomalous + normal).mean()


def class_shares(targets: Tensor) -> Tensor:
    """Return the share of each anomalous class in a video's label: targets (B, C) → (B, C−1), rows of sum 1 or 0."""
    return targets[:, 1:].float() / targets[:, 1:].sum(dim=1, keepdim=True).clamp(min=1)


def _largest(values: Tensor, lengths: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The largest valid entries along time, sorted, as many as any video needs: (B, K, …), and which are among k."""
    trailing = (1,) * (values.dim() - 2)
    valid = valid_mask(lengths, values.shape[1]).view(*values.shape[:2], *trailing)
    most = min(values.shape[1], values.shape[1] // 16 + 1)
    top = values.masked_fill(~valid, -torch.inf).topk(most, dim=1).values
    return top, valid_mask(k, most).view(len(top), most, *trailing)


def _average(values: Tensor, pairs: Tensor) -> Tensor:
    return values.where(pairs, 0).sum() / pairs.sum().clamp(min=1)


def _mean(values: Tensor, videos: Tensor) -> Tensor:
    """The mean of values (B, …) of the videos (B,) that are true; no selection, for which a GPU would be waited for."""
    return _average(values.flatten(1).mean(dim=1), videos)
