"""The axial image transformer: attention along rows and along columns of a grid, in two coupled streams.

B inputs, E width, a grid of S rows × F columns. Equations and parameter names are those of the package
axial_attention 0.6.1, whose reversible blocks save memory but compute the same numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS, COLUMNS = 2, 3


class AxialTransformer(nn.Module):
    """Learned positions, then ``depth`` units of an attention block and a convolution block: (B, E, S, F) → same.

    ``dim_heads`` is the width of an attention head (None: E / heads).
    """

    def __init__(self, width: int, depth: int, heads: int, dim_heads: int | None, shape: tuple[int, int]):
        super().__init__()
        rows, columns = shape
        self.pos_emb = nn.ParameterDict(
            {"param_0": torch.randn(1, width, rows, 1), "param_1": torch.randn(1, width, 1, columns)}
        )
        blocks: list[nn.Module] = []
        for _ in range(depth):
            blocks.append(
                Coupled(*(AxialAttention(width, heads, dim_heads or width // heads, axis) for axis in (ROWS, COLUMNS)))
            )
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

    def __init__(self, width: int, epsilon: float = 1e-5):
        super().__init__()
        self.epsilon = epsilon
        self.g = nn.Parameter(torch.ones(1, width, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        return (x - mean) / (variance.sqrt() + self.epsilon) * self.g + self.b


def convolutions(width: int, kernel: int = 3) -> nn.Sequential:
    """The feed-forward part, E → 4E → E; a kernel above 1×1 also mixes neighbours on the grid."""
    return nn.Sequential(
        ChannelNorm(width),
        nn.Conv2d(width, 4 * width, kernel, padding=kernel // 2),
        nn.LeakyReLU(),
        nn.Conv2d(4 * width, width, kernel, padding=kernel // 2),
    )
