"""The axial transformer against its equations, written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clipfusionvad.models.layers.axial import AxialTransformer


def plain_attention(line, weights, heads):
    """Self-attention of one line (L, E), head by head and query by query."""
    normed = nn.functional.layer_norm(line, line.shape[1:], weights["norm.weight"], weights["norm.bias"])
    queries = normed @ weights["fn.to_q.weight"].T
    both = normed @ weights["fn.to_kv.weight"].T
    inner = queries.shape[1]
    keys, values = both[:, :inner], both[:, inner:]
    width = inner // heads
    rows = []
    for query in queries:
        parts = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            weight = torch.softmax(keys[:, own] @ query[own] / math.sqrt(width), dim=0)
            parts.append((weight[:, None] * values[:, own]).sum(0))
        rows.append(torch.cat(parts))
    return torch.stack(rows) @ weights["fn.to_out.weight"].T + weights["fn.to_out.bias"]


def plain_convolution(grid, weight, bias):
    """3×3 convolution of (E, S, F) with zeros around it."""
    _, rows, columns = grid.shape
    padded = nn.functional.pad(grid, (1, 1, 1, 1))
    out = bias[:, None, None].expand(-1, rows, columns)
    for dy in range(3):
        for dx in range(3):
            part = padded[:, dy : dy + rows, dx : dx + columns]
            out = out + torch.einsum("oc,cyx->oyx", weight[:, :, dy, dx], part)
    return out


def plain_feed_forward(grid, weights):
    normed = torch.empty_like(grid)
    for y in range(grid.shape[1]):
        for x in range(grid.shape[2]):
            place = grid[:, y, x]
            normed[:, y, x] = (place - place.mean()) / (place.std(correction=0) + 1e-5)
    normed = normed * weights["0.g"][0] + weights["0.b"][0]
    hidden = plain_convolution(normed, weights["1.weight"], weights["1.bias"])
    return plain_convolution(torch.where(hidden > 0, hidden, 0.01 * hidden), weights["3.weight"], weights["3.bias"])


def plain_axial(grid, state, depth, heads):
    """One grid (E, S, F) through the released names of the weights."""

    def part(prefix):
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    x = grid + state["pos_emb.param_0"][0] + state["pos_emb.param_1"][0]
    first, second = x, x
    for unit in range(depth):
        block = f"layers.blocks.{2 * unit}."
        columns = [plain_attention(second[:, :, f].T, part(f"{block}f.net.fn."), heads).T for f in range(x.shape[2])]
        first = first + torch.stack(columns, dim=2)
        rows = [plain_attention(first[:, s].T, part(f"{block}g.net.fn."), heads).T for s in range(x.shape[1])]
        second = second + torch.stack(rows, dim=1)
        block = f"layers.blocks.{2 * unit + 1}."
        first = first + plain_feed_forward(second, part(f"{block}f.net."))
        second = second + plain_feed_forward(first, part(f"{block}g.net."))
    return (first + second) / 2


@pytest.mark.parametrize(("depth", "dim_heads"), [(1, None), (2, 5)])
def test_axial_transformer_equals_the_plain_equations(depth, dim_heads):
    torch.manual_seed(1)
    model = AxialTransformer(8, depth, heads=2, dim_heads=dim_heads, shape=(4, 3)).double()
    nn.init.normal_(model.layers["blocks"][1].f["net"][0].g)  # not the 1 that would hide it
    x = torch.randn(2, 8, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([plain_axial(grid, model.state_dict(), depth, heads=2) for grid in x])
        torch.testing.assert_close(model(x), expected)
