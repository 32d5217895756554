"""CLIP's pre-norm transformer: the frozen text tower and, in windows, the temporal transformer."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Attention: queries, keys and values side by side (…, 3D), and the number of heads → (…, D).
Attend = Callable[[Tensor, int], Tensor]
QUICK = 1.702


class QuickGELU(nn.Module):
    """x · σ(1.702 · x), CLIP's activation, computed as a SiLU: one pass over memory in each direction."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(QUICK * x).mul_(1 / QUICK)


class MLP(nn.Module):
    """Linear D → 4D, QuickGELU (its factors are part of the matrix products), Linear 4D → D, with CLIP's names."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        inner, outer = self.c_fc, self.c_proj
        hidden = F.silu(torch.addmm(inner.bias, x.flatten(0, -2), inner.weight.t(), beta=QUICK, alpha=QUICK))
        return torch.addmm(outer.bias, hidden, outer.weight.t(), alpha=1 / QUICK).view(x.shape)


def attend_all(qkv: Tensor, heads: int) -> Tensor:
    """Multi-head attention of every position to all others: queries, keys and values (N, S, 3D) → (N, S, D)."""
    q, k, v = split_heads(qkv, heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, S, 3D) → queries, keys and values, (N, heads, S, D / heads) each."""
    return qkv.unflatten(-1, (3, heads, -1)).movedim(-3, 0).transpose(-3, -2).unbind(0)


class SelfAttention(nn.Module):
    """Multi-head self-attention, computed by ``attend``, with the parameter names of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        return self.out_proj(attend(F.linear(x, self.in_proj_weight, self.in_proj_bias), self.heads))


class ResidualAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn, self.ln_1 = SelfAttention(width, heads), nn.LayerNorm(width)
        self.mlp, self.ln_2 = MLP(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.attn(self.ln_1(x), attend)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks over (N, S, D), with attention of all positions, or ``attend``."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, attend: Attend = attend_all) -> Tensor:
        for block in self.resblocks:
            x = block(x, attend)
        return x


class WindowTransformer(Transformer):
    """A transformer over windows of snippets as sequences: a block-diagonal mask's numbers at a cost linear in T."""

    def __init__(self, width: int, layers: int, heads: int, window: int):
        super().__init__(width, layers, heads)
        self.window = window

    def forward(self, x: Tensor, attend: Attend = attend_all) -> Tensor:
        """(B, T, D) → (B, T, D); T must be a multiple of the window."""
        return super().forward(x.reshape(-1, self.window, x.shape[-1]), attend).view(x.shape)

    def encode(self, visual: Tensor, positions: Tensor) -> Tensor:
        """Snippets (B, T, D), plus the embedding of their position (T, D) → (B, T, D).

        Windows of zeros (padding) are computed once per position; not on a GPU, which would wait for their indices.
        """
        if visual.device.type != "cpu" or torch.compiler.is_compiling():
            return self(visual + positions)
        windows = visual.unflatten(1, (-1, self.window))
        filled = windows.flatten(2).any(dim=2)
        places = (~filled).any(dim=0).nonzero().squeeze(1)
        positions = positions.view(windows.shape[1:])
        x = torch.cat([(windows + positions)[filled], positions[places]])
        # The computed window of each position of each video.
        source = torch.empty(filled.shape, dtype=torch.long)
        source[:, places] = len(x) - len(places) + torch.arange(len(places))
        source[filled] = torch.arange(len(x) - len(places))
        return self(x).index_select(0, source.flatten()).view(visual.shape)
