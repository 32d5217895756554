"""AnomalyCLIP's temporal model, and the alternatives that its paper compares with.

B inputs, D feature width, E width of the model, a grid of S segments × F frames.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from clipfusionvad.io.errors import UserError
from clipfusionvad.models.base import isolated_rng
from clipfusionvad.models.layers.axial import COLUMNS, ROWS, AxialAttention, AxialTransformer, convolutions
from clipfusionvad.models.layers.transformer import MLP

#: The axis of the grid along which a transformer with one axis attends.
LINES = {"short": COLUMNS, "long": ROWS}
TEMPORAL_MODELS = ("axial", *LINES, "mtn", "mlp")
DILATIONS = (1, 2, 4)


class TemporalModel(nn.Module):
    """A linear map to E dimensions, one of ``TEMPORAL_MODELS``, and a linear head that gives a logit per frame.

    ``axial`` attends along segments and along frames, ``short`` within a segment, ``long`` across segments; ``mtn``
    reads the sequence of all frames, ``mlp`` one frame. ``depth``, ``heads`` and ``dim_heads`` (None: E / heads) are
    those of the three transformers. Raises ``UserError`` where E does not fit the ``kind``.
    """

    def __init__(
        self,
        width: int,
        kind: str,
        grid: tuple[int, int],
        *,
        emb_size: int,
        depth: int,
        heads: int,
        dim_heads: int | None,
    ):
        super().__init__()
        self.projection = nn.Linear(width, emb_size)
        # One of them becomes a module; the names are those in files.
        self.axial_attn = self.mtn = self.mlp = None
        self.line_attn: Any = None
        with isolated_rng("axial" if kind in LINES else kind):
            if kind == "axial":
                self.axial_attn = AxialTransformer(emb_size, depth, heads, dim_heads, grid)
            elif kind in LINES:
                self.line_attn = LineTransformer(emb_size, depth, heads, dim_heads, grid, LINES[kind])
            elif kind == "mtn":
                self.mtn = MultiScale(emb_size)
            else:
                self.mlp = MLP(emb_size)
        self.classifier = nn.Sequential(
            OrderedDict(layer_norm=nn.LayerNorm(emb_size), linear=nn.Linear(emb_size, 1)),
        )

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, S·F, D) of a ``grid`` (S, F) → logits (B, S·F, 1)."""
        return self.classifier(self._mix(self.projection(x), grid))

    def _mix(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, S·F, E) → (B, S·F, E)."""
        if self.mlp is not None:
            return self.mlp(x)
        channels = x.transpose(1, 2)
        if self.mtn is not None:
            return self.mtn(channels).transpose(1, 2)
        transformer = self.line_attn if self.axial_attn is None else self.axial_attn
        return transformer(channels.unflatten(2, grid)).flatten(2).transpose(1, 2)


class LineTransformer(nn.Module):
    """A pre-norm transformer within each line of the grid along ``axis``: (B, E, S, F) → same.

    The paper does not describe its short-term and long-term transformers. These have the attention and layer norm of
    the axial one, a learned position along the line, and a feed-forward part of the same width for each frame.
    """

    def __init__(self, width: int, depth: int, heads: int, dim_heads: int | None, shape: tuple[int, int], axis: int):
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
    """The multi-scale temporal network (MTN) of RTFM, arXiv 2101.10030, of width E: (B, E, T) → same.

    Three dilated convolutions and a self-attention without softmax compute E/4 channels each; a convolution combines
    them, and the input is added. Raises ``UserError`` where E is not a multiple of 8.
    """

    def __init__(self, width: int):
        super().__init__()
        if width % 8:
            raise UserError(f"--temporal mtn takes an --emb-size that is a multiple of 8, not {width}")
        quarter = width // 4
        self.pyramid = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, quarter, kernel_size=3, dilation=dilation, padding=dilation),
                nn.ReLU(),
                nn.BatchNorm1d(quarter),
            )
            for dilation in DILATIONS
        )
        self.squeeze = nn.Sequential(nn.Conv1d(width, quarter, kernel_size=1, bias=False), nn.ReLU())
        self.everywhere = NonLocal(quarter)
        self.join = nn.Sequential(
            nn.Conv1d(width, width, kernel_size=3, padding=1, bias=False), nn.ReLU(), nn.BatchNorm1d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        scales = [convolve(x) for convolve in self.pyramid]
        return x + self.join(torch.cat([*scales, self.everywhere(self.squeeze(x))], dim=1))


class NonLocal(nn.Module):
    """x + W · (θᵀφ / T) g, (B, C, T) → same: attention of all steps by their dot product, in C/2 channels.

    The normalisation after W starts at zero, so that the block starts as the identity (as in RTFM).
    """

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.theta, self.phi, self.g = (nn.Conv1d(channels, half, kernel_size=1) for _ in range(3))
        self.back, self.norm = nn.Conv1d(half, channels, kernel_size=1), nn.BatchNorm1d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        affinity = self.theta(x).transpose(1, 2) @ self.phi(x) / x.shape[2]
        return x + self.norm(self.back(self.g(x) @ affinity.transpose(1, 2)))
