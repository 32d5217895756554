"""CLIP's pre-norm transformer, used for the frozen text tower and, in windows, along time."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x · σ(1.702 x), CLIP's activation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class MLP(nn.Sequential):
    """Linear D → 4D, QuickGELU, Linear 4D → D, with CLIP's parameter names."""

    def __init__(self, width: int):
        super().__init__(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )


class SelfAttention(nn.Module):
    """Multi-head self-attention over dim −2 with the parameter names of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(N, S, D) → (N, S, D)."""
        n, s, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(n, s, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(attended.transpose(1, 2).reshape(n, s, width))


class ResidualAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks over (N, S, D), each position seeing all others or, if ``causal``, those before it."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        for block in self.resblocks:
            x = block(x, causal)
        return x


class WindowTransformer(Transformer):
    """A transformer whose snippets see only their own window of ``window`` snippets.

    Each window is a sequence of its own, so cost is linear in T; the numbers are those of the block-diagonal
    mask in the released code.
    """

    def __init__(self, width: int, layers: int, heads: int, window: int):
        super().__init__(width, layers, heads)
        self.window = window

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(B, T, D) → (B, T, D); T must be a multiple of the window."""
        return super().forward(x.reshape(-1, self.window, x.shape[-1]), causal).view(x.shape)
