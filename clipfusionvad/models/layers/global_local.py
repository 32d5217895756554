"""UR-DMU's transformer, which BN-WVAD uses as well, with the released checkpoints' parameter names.

B videos, T snippets, D feature width, H hidden width.
"""

import math
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad.io.option import layers, size

# Options of both methods.
HiddenWidth = Annotated[int, size("width of the transformer")]
Layers = Annotated[int, layers("layers of the transformer; 0: none")]
Heads = Annotated[int, size("attention heads")]
HeadWidth = Annotated[int, size("width of a head")]
MLPWidth = Annotated[int, size("hidden width of the transformer's perceptron")]


class Embedding(nn.Module):
    """A convolution over three snippets and ReLU: (B, T, D) → (B, T, H)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.conv_1 = nn.Sequential(nn.Conv1d(width, hidden, kernel_size=3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_1(x.transpose(1, 2)).transpose(1, 2)


def local_weights(steps: int, device: torch.device) -> Tensor:
    """exp(−|i − j| / e) over the sum of column j, (T, T): columns sum to one, as released, and rows need not."""
    at = torch.arange(steps, device=device, dtype=torch.float32)
    weights = torch.exp(-(at[:, None] - at).abs() / math.e)
    return weights / weights.sum(dim=0)


class GlobalLocalAttention(nn.Module):
    """Attention over all snippets beside fixed weights that fall with the distance, in each head."""

    def __init__(self, width: int, heads: int, head_width: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 4 * heads * head_width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(2 * heads * head_width, width), nn.Dropout(dropout))

    def forward(self, x: Tensor, local: Tensor) -> Tensor:
        """x (B, T, H), local (T, T) → (B, T, H)."""
        q, k, v, t = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.to_qkv(x).chunk(4, dim=-1))
        both = torch.cat([F.scaled_dot_product_attention(q, k, v), local.to(t.dtype) @ t], dim=-1)
        return self.to_out(both.transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        layers = nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PreNorm(nn.Module):
    """fn(LayerNorm(x)); the name of ``fn`` is in the checkpoints."""

    def __init__(self, width: int, fn: nn.Module):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        return self.fn(self.norm(x), *args)


class GlobalLocalTransformer(nn.Module):
    """Pre-norm layers without position embedding, mask or final norm: (B, T, H) → (B, T, H)."""

    def __init__(self, width: int, depth: int, heads: int, head_width: int, mlp_width: int, dropout: float):
        super().__init__()
        blocks = (
            (
                PreNorm(width, GlobalLocalAttention(width, heads, head_width, dropout)),
                PreNorm(width, Perceptron(width, mlp_width, dropout)),
            )
            for _ in range(depth)
        )
        self.layers = nn.ModuleList(nn.ModuleList(block) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        local = local_weights(x.shape[1], x.device)
        for block in self.layers:
            attention, perceptron = cast(nn.ModuleList, block)
            x = x + attention(x, local)
            x = x + perceptron(x)
        return x
