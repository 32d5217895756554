"""The two graph branches along time: similar snippets, and neighbouring snippets."""

import math

import torch
from torch import Tensor, nn

from clipfusionvad.losses import valid_mask

SIMILARITY_THRESHOLD = 0.7


class GraphConvolution(nn.Module):
    """adjacency · (x · W) + residual; the residual is a Conv1d of kernel 5 where widths differ, else x."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_width, out_width))
        nn.init.xavier_uniform_(self.weight)
        self.residual = None if in_width == out_width else nn.Conv1d(in_width, out_width, kernel_size=5, padding=2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """x (B, T, in), adjacency (B, T, T) or (T, T) → (B, T, out)."""
        residual = x if self.residual is None else self.residual(x.transpose(1, 2)).transpose(1, 2)
        return adjacency @ (x @ self.weight) + residual


def similarity_adjacency(x: Tensor, lengths: Tensor) -> Tensor:
    """Row-softmax of the thresholded cosine similarities on each video's valid L×L corner, zero elsewhere.

    x (B, T, D), lengths (B,) → (B, T, T). Cosines up to 0.7 count as 0 but stay in the softmax.
    Source: released code of VadCLIP.
    """
    norms = x.norm(dim=-1, keepdim=True)
    cosine = x @ x.transpose(1, 2) / (norms @ norms.transpose(1, 2) + 1e-20)
    kept = torch.where(cosine > SIMILARITY_THRESHOLD, cosine, 0)
    valid = valid_mask(lengths, x.shape[1])
    weights = kept.masked_fill(~valid[:, None, :], -torch.inf).softmax(dim=-1)
    return weights * valid[:, :, None]


class DistanceAdjacency(nn.Module):
    """exp(−|i − j| / e) for all T×T, the same for every video.

    ``sigma`` is in the released checkpoints, but the released code does not read it either.
    """

    sigma: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sigma", torch.full((1,), 0.1))

    def forward(self, length: int) -> Tensor:
        steps = torch.arange(length, device=self.sigma.device, dtype=torch.float32)
        return torch.exp(-(steps[:, None] - steps).abs() / math.e)
