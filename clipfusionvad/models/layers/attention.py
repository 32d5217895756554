"""The global attention module (GAM) of ClipFusionVAD."""

import torch
from torch import Tensor, nn


class GlobalAttentionModule(nn.Module):
    """A channel gate per snippet, then a gate along time, each multiplied onto its input.

    Padded snippets take part in the convolutions and in BatchNorm (released code).
    """

    def __init__(self, width: int, rate: int = 4):
        super().__init__()
        hidden = width // rate
        self.channel_attention = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.spatial_attention = nn.Sequential(
            nn.Conv1d(width, hidden, kernel_size=7, padding=3),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Conv1d(hidden, width, kernel_size=7, padding=3),
            nn.BatchNorm1d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        x = x * torch.sigmoid(self.channel_attention(x))
        gate = torch.sigmoid(self.spatial_attention(x.transpose(1, 2)))
        return x * gate.transpose(1, 2)
