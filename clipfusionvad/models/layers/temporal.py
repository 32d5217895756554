"""AnomalyCLIP's temporal model, an axial image transformer, and the alternatives that its paper compares with.

B inputs, D feature width, E width of the model, a grid of S segments (rows) × F frames (columns).
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad.io.errors import UserError
from clipfusionvad.models.base import isolated_rng
from clipfusionvad.models.layers.transformer import MLP

ROWS, COLUMNS = 2, 3
#: The axis of the grid along which a transformer with one axis attends.
LINES = {"short": COLUMNS, "long": ROWS}
TEMPORAL_MODELS = ("axial", *LINES, "mtn", "mlp")
DILATIONS = (1, 2, 4)


class TemporalModel(nn.Module):
    """A linear map to E dimensions, one of ``TEMPORAL_MODELS``, and a linear head that gives a logit per frame.

    ``axial`` attends along segments and along frames, ``short`` within a segment, ``long`` across segments; ``mtn``
    reads the sequence of all frames, ``mlp`` one frame. ``sizes`` are depth, heads and dim_heads (None: E / heads) of
    the three transformers. Raises ``UserError`` where E does not fit the ``kind``.
    """

    def __init__(self, width: int, kind: str, grid: tuple[int, int], *, emb_size: int, **sizes: Any):
        super().__init__()
        self.projection = nn.Linear(width, emb_size)
        # One of them becomes a module; the names are those in files.
        self.axial_attn = self.line_attn = self.mtn = self.mlp = None
        with isolated_rng("axial" if kind in LINES else kind):
            if kind == "axial":
                self.axial_attn = AxialTransformer(emb_size, grid, **sizes)
            elif kind in LINES:
                self.line_attn = LineTransformer(emb_size, grid, LINES[kind], **sizes)
            elif kind == "mtn":
                self.mtn = MultiScale(emb_size)
            else:
                self.mlp = MLP(emb_size)
        self.classifier = nn.Sequential(OrderedDict(layer_norm=nn.LayerNorm(emb_size), linear=nn.Linear(emb_size, 1)))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, S·F, D) of a ``grid`` (S, F) → logits (B, S·F, 1)."""
        x = self.projection(x)
        if self.mlp is not None:
            x = self.mlp(x)
        elif self.mtn is not None:
            x = self.mtn(x.transpose(1, 2)).transpose(1, 2)
        else:
            transformer: Any = self.axial_attn or self.line_attn
            x = transformer(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return self.classifier(x)


class LineTransformer(nn.Module):
    """A pre-norm transformer within each line of the grid along ``axis``: (B, E, S, F) → same.

    The paper does not describe its two. These have the axial one's attention and norm, and learned positions.
    """

    def __init__(self, width: int, shape: tuple[int, int], axis: int, depth: int, heads: int, dim_heads: int | None):
        super().__init__()
        lengths = [shape[other - ROWS] if other == axis else 1 for other in (ROWS, COLUMNS)]
        self.position = nn.Parameter(torch.randn(1, width, *lengths))
        self.attention, self.feed_forward = nn.ModuleList(), nn.ModuleList()
        for _ in range(depth):
            self.attention.append(AxialAttention(width, heads, dim_heads or width // heads, axis))
            self.feed_forward.append(convolutions(width, kernel=1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        for attend, feed in zip(self.attention, self.feed_forward, strict=True):
            x = x + attend(x)
            x = x + feed(x)
        return x


class MultiScale(nn.Module):
    """The multi-scale temporal network (MTN) of RTFM, arXiv 2101.10030: (B, E, T) → same; E is a multiple of 8.

    Three dilated convolutions and a self-attention without softmax compute E/4 channels each; a convolution joins them.
    """

    def __init__(self, width: int):
        super().__init__()
        if width % 8:
            raise UserError(f"--temporal mtn takes an --emb-size that is a multiple of 8, not {width}")
        quarter = width // 4
        dilated = (nn.Conv1d(width, quarter, kernel_size=3, dilation=step, padding=step) for step in DILATIONS)
        self.pyramid = nn.ModuleList(nn.Sequential(conv, nn.ReLU(), nn.BatchNorm1d(quarter)) for conv in dilated)
        self.squeeze = nn.Sequential(nn.Conv1d(width, quarter, kernel_size=1, bias=False), nn.ReLU())
        self.everywhere = NonLocal(quarter)
        join = nn.Conv1d(width, width, kernel_size=3, padding=1, bias=False)
        self.join = nn.Sequential(join, nn.ReLU(), nn.BatchNorm1d(width))

    def forward(self, x: Tensor) -> Tensor:
        scales = [convolve(x) for convolve in self.pyramid]
        return x + self.join(torch.cat([*scales, self.everywhere(self.squeeze(x))], dim=1))


class NonLocal(nn.Module):
    """x + W · (θᵀφ / T) g, (B, C, T) → same, in C/2 channels; it starts as the identity (as in RTFM)."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.theta, self.phi, self.g = (nn.Conv1d(channels, half, kernel_size=1) for _ in range(3))
        self.back, self.norm = nn.Conv1d(half, channels, kernel_size=1), nn.BatchNorm1d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        affinity = self.theta(x).transpose(1, 2) @ self.phi(x) / x.shape[2]
        return x + self.norm(self.back(self.g(x) @ affinity.transpose(1, 2)))


class AxialTransformer(nn.Module):
    """Learned positions, then ``depth`` units of an attention block and a convolution block: (B, E, S, F) → same.

    Equations and names are those of axial_attention 0.6.1, whose reversible blocks compute the same in less memory.
    """

    def __init__(self, width: int, shape: tuple[int, int], depth: int, heads: int, dim_heads: int | None):
        super().__init__()
        positions = {"param_0": torch.randn(1, width, shape[0], 1), "param_1": torch.randn(1, width, 1, shape[1])}
        self.pos_emb = nn.ParameterDict(positions)
        dim_heads, blocks = dim_heads or width // heads, []
        for _ in range(depth):
            blocks.append(Coupled(*(AxialAttention(width, heads, dim_heads, axis) for axis in (ROWS, COLUMNS))))
            blocks.append(Coupled(convolutions(width), convolutions(width)))
        self.layers = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})

    def forward(self, x: Tensor) -> Tensor:
        first = second = x + self.pos_emb["param_0"] + self.pos_emb["param_1"]
        for block in self.layers["blocks"].children():
            first, second = block(first, second)
        return (first + second) / 2


class Coupled(nn.Module):
    """Two residual streams, each fed by the other: y1 = x1 + f(x2), y2 = x2 + g(y1)."""

    def __init__(self, f: nn.Module, g: nn.Module):
        super().__init__()
        self.f, self.g = nn.ModuleDict({"net": f}), nn.ModuleDict({"net": g})

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        first = first + self.f["net"](second)
        return first, second + self.g["net"](first)


class AxialAttention(nn.Module):
    """LayerNorm and self-attention within each line of the grid along ``axis``."""

    def __init__(self, width: int, heads: int, dim_heads: int, axis: int):
        super().__init__()
        self.axis = axis
        self.fn = nn.ModuleDict({"norm": nn.LayerNorm(width), "fn": SelfAttention(width, heads, dim_heads)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, E, S, F) → (B, E, S, F)."""
        lines = x.movedim((1, self.axis), (3, 2))
        attended = self.fn["fn"](self.fn["norm"](lines).flatten(0, 1))
        return attended.view(lines.shape).movedim((3, 2), (1, self.axis))


class SelfAttention(nn.Module):
    """Multi-head self-attention whose queries, keys and values have no bias."""

    def __init__(self, width: int, heads: int, dim_heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * dim_heads, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * dim_heads, bias=False)
        self.to_out = nn.Linear(heads * dim_heads, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, E) → (N, L, E)."""
        keys, values = self.to_kv(x).chunk(2, dim=-1)
        heads = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q(x), keys, values)]
        return self.to_out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class ChannelNorm(nn.Module):
    """(x − mean) / (std + ε) · g + b over the channels of each position; ε is added to the deviation."""

    def __init__(self, width: int):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(1, width, 1, 1)), nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        return (x - mean) / (variance.sqrt() + 1e-5) * self.g + self.b


def convolutions(width: int, kernel: int = 3) -> nn.Sequential:
    """The feed-forward part, E → 4E → E; a kernel above 1×1 also mixes neighbours on the grid."""
    wide = nn.Conv2d(width, 4 * width, kernel, padding=kernel // 2)
    narrow = nn.Conv2d(4 * width, width, kernel, padding=kernel // 2)
    return nn.Sequential(ChannelNorm(width), wide, nn.LeakyReLU(), narrow)
