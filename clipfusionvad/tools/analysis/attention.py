"""Attention along time in one input of a model.

The models compute attention in fused kernels, which return no weights. Here the weights are computed by formula from
the inputs of the attention modules; the models do not change. T snippets of an input, H heads; a module attends within
lines of L places: windows, rows of a grid, or the whole input as its only line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad.io.errors import UserError
from clipfusionvad.models import Method
from clipfusionvad.models.layers import axial, glimpse, transformer
from clipfusionvad.models.layers.dual_branch import DualBranch
from clipfusionvad.tools.analysis.figures import COLOURS, Figure, hide_spines, mark_truth, new_figure, shade
from clipfusionvad.tools.analysis.result import AnalysisResult, make_table, table_text
from clipfusionvad.tools.analysis.view import LoadedModel, VideoName, VideoView, WindowIndex, mean_by_truth

# Snippets of an input that are drawn where attention is in windows: more would be a thin line.
SHOWN = 64
# Matrices that are drawn at most: of deeper models the last ones.
PANELS = 4


@dataclass(frozen=True)
class Weights:
    """``weights`` (lines, H, L, L) of a module, whose rows sum to one, and its ``values`` (lines, H, L, d)."""

    weights: Tensor
    values: Tensor


def plain_weights(module: transformer.SelfAttention, x: Tensor, attend: Any) -> Weights:
    """Return the weights of CLIP's attention; x (lines, L, D), each line attends to itself."""
    q, k, v = transformer.split_heads(F.linear(x, module.in_proj_weight, module.in_proj_bias), module.heads)
    return Weights((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1), v)


def glimpse_weights(module: glimpse.SegmentAttention, x: Tensor, valid: Tensor) -> Weights:
    """Return the weights of ReFLIP-VAD's Glimpse; x (B, T, c), valid (B, T); the last window may be padded."""
    window = min(module.window or x.shape[1], x.shape[1])
    padding = -x.shape[1] % window
    qkv = F.pad(module.qkv(x.transpose(1, 2)), (0, padding)).transpose(1, 2)
    q, k, v = (part.reshape(-1, 1, window, x.shape[2]) for part in qkv.chunk(3, dim=-1))
    seen = F.pad(valid, (0, padding)).view(-1, window)
    mask = (seen[:, None, :] | ~seen[:, :, None])[:, None]
    logits = q @ k.transpose(-1, -2) * (x.shape[2] ** -0.5 if module.scaled else 1.0)
    return Weights(logits.masked_fill(~mask, -torch.inf).softmax(dim=-1), v)


def axial_weights(module: axial.SelfAttention, x: Tensor) -> Weights:
    """Return the weights along the lines of AnomalyCLIP's grid; x (lines, L, E)."""
    keys, values = module.to_kv(x).chunk(2, dim=-1)
    q, k, v = (part.unflatten(-1, (module.heads, -1)).transpose(1, 2) for part in (module.to_q(x), keys, values))
    return Weights((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1), v)


def torch_weights(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, **_: Any
) -> Weights:
    """Return the weights of torch's module as IEF-VAD uses it, (B, T, D), batch first."""
    projected = F.linear(query, module.in_proj_weight, module.in_proj_bias)
    q, k, v = transformer.split_heads(projected, module.num_heads)
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if key_padding_mask is not None:
        logits = logits.masked_fill(key_padding_mask[:, None, None], -torch.inf)
    return Weights(logits.softmax(dim=-1), v)


READERS: dict[type[nn.Module], Callable[..., Weights]] = {
    transformer.SelfAttention: plain_weights,
    glimpse.SegmentAttention: glimpse_weights,
    axial.SelfAttention: axial_weights,
    nn.MultiheadAttention: torch_weights,
}


@dataclass(frozen=True)
class Layer:
    """One module on one input: ``weights`` (lines, L, L), the mean over its heads, and the ``places`` (lines, L) of
    the input that each line covers, -1 for padding. ``strided``: lines take one place of every segment."""

    name: str
    heads: int
    weights: np.ndarray
    places: np.ndarray
    strided: bool

    def dense(self, length: int) -> np.ndarray:
        """Return all weights between the first ``length`` places of the input, (length, length); 0 between lines."""
        matrix = np.zeros((length, length))
        kept = (self.places >= 0) & (self.places < length)
        both = kept[:, :, None] & kept[:, None, :]
        queries, keys = np.broadcast_arrays(self.places[:, :, None], self.places[:, None, :])
        matrix[queries[both], keys[both]] = self.weights[both]
        return matrix

    def received(self, length: int) -> np.ndarray:
        """Return the attention that each of the first ``length`` places receives, 1 for an even share: (length,)."""
        return self.dense(length).sum(axis=0)

    def effective(self, length: int) -> float:
        """Return e to the entropy of the weights of a place: the effective number of places that it attends to, padding
        included; the mean over the first ``length`` places."""
        matrix = self.dense(int(self.places.max()) + 1)[:length]
        return float(np.exp(-(matrix * np.log(np.maximum(matrix, 1e-12))).sum(axis=1)).mean())


@torch.inference_mode()
def read_attention(model: Method, seen: VideoView, which: int) -> list[Layer]:
    """Return all attention along time on input number ``which``; ``UserError`` for a model without any."""
    modules = {
        name: module
        for name, module in model.named_modules()
        if type(module) in READERS and not name.startswith("clipmodel.") and "distilbert" not in name
    }
    found: dict[str, Weights] = {}
    hooks = []
    for name, module in modules.items():

        def keep(module: nn.Module, args: Any, kwargs: Any, _: Any, name: str = name) -> None:
            given = inspect.getcallargs(module.forward, *args, **kwargs)
            found[name] = READERS[type(module)](module, **{key: given[key] for key in given.keys() - {"self"}})

        hooks.append(module.register_forward_hook(keep, with_kwargs=True))
    chosen = slice(which, which + 1)
    try:
        if isinstance(model, DualBranch):
            # Its forward skips windows of padding, whose lines would be missing.
            model.temporal(seen.windows[chosen] + model.frame_position_embeddings.weight)
        else:
            model(seen.windows[chosen], seen.lengths[chosen], *model.fixed_inputs())
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise UserError(f"this {model.name} has no attention along time")
    axes = {name: module.axis for name, module in model.named_modules() if isinstance(module, axial.AxialAttention)}
    grid = getattr(model, "grid", (1, seen.rows.shape[1]))
    return [_layer(name, weights, grid, axes.get(name.removesuffix(".fn.fn"))) for name, weights in found.items()]


def _layer(name: str, found: Weights, grid: tuple[int, int], axis: int | None) -> Layer:
    lines, heads, length, _ = found.weights.shape
    places = np.arange(lines * length).reshape(lines, length)
    if axis == axial.ROWS:
        places = np.arange(grid[0] * grid[1]).reshape(grid).T
    return Layer(name, heads, found.weights.mean(dim=1).float().cpu().numpy(), places, axis == axial.ROWS)


def draw_attention(layers: list[Layer], seen: VideoView, which: int) -> Figure:
    """Draw a matrix for each of the last layers, and what each snippet of the input receives."""
    truth, length = seen.truth_at(seen.rows[which]), int(seen.lengths[which])
    shown = layers[-PANELS:]
    title = f"{seen.title}, input {which}; red bars and shading: annotated anomaly"
    figure = new_figure(max(3.7 * len(shown) + 0.4, 9), 7, title)
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.7, 1))
    upper, lower = parts
    for axis, layer in zip(upper.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        upper.colorbar(_draw_layer(axis, layer, truth, length), ax=axis, shrink=0.7)
    axis = lower.subplots()
    shade(axis, truth[:length])
    for layer, colour in zip(shown, COLOURS, strict=False):
        values = layer.received(length)
        axis.stairs(values, np.arange(length + 1), baseline=None, color=colour, lw=1.2, label=layer.name)
    axis.axhline(1, color="#bbbbbb", lw=1, zorder=0)
    axis.set(xlim=(0, length), xlabel="snippet of the input", ylabel="attention received,\n1: an even share")
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    hide_spines(axis)
    return figure


def _draw_layer(axis: Any, layer: Layer, truth: np.ndarray, length: int) -> Any:
    lines, side = layer.places.shape
    first = 0
    if layer.strided:
        matrix, truth, unit = layer.weights.mean(axis=0), truth.reshape(side, lines).max(axis=1), "segment"
    else:
        matrix, unit = layer.dense(length), "snippet of the input"
        if side < length:
            abnormal = np.flatnonzero(truth[:length] > 0)
            centre = int(abnormal.mean()) if len(abnormal) else 0
            first = max(0, min(centre - SHOWN // 2, length - SHOWN)) // side * side
            shown = slice(first, min(first + SHOWN, length))
            matrix, truth = matrix[shown, shown], truth[shown]
    scaled = matrix * side
    limit = max(float(np.quantile(scaled[scaled > 0], 0.99)), 1.5)
    image = axis.imshow(scaled, cmap="viridis", vmin=0, vmax=limit, interpolation="nearest")
    mark_truth(axis, truth)
    if not layer.strided and side < length:
        for edge in np.arange(0, len(matrix) + 1, side) - 0.5:
            axis.axhline(edge, color="white", lw=0.4)
            axis.axvline(edge, color="white", lw=0.4)
    ticks = np.linspace(0, len(matrix) - 1, min(5, len(matrix))).astype(int)
    axis.set_xticks(ticks, ticks + first)
    axis.set_yticks(ticks, ticks + first)
    axis.set_title(f"{layer.name}\nweight × {side}", fontsize=9, loc="left", pad=12)
    axis.set_xlabel(f"{unit}, key", fontsize=9)
    axis.set_ylabel(f"{unit}, query", fontsize=9)
    return image


def attention(loaded: LoadedModel, *, video: VideoName = None, window: WindowIndex = None) -> AnalysisResult:
    """Attention along time, layer by layer."""
    seen = loaded.view(video)
    which = seen.check_window(window)
    layers = read_attention(loaded.model, seen, which)
    length = int(seen.lengths[which])
    truth = seen.truth_at(seen.rows[which])[:length]
    received = {layer.name: layer.received(length) for layer in layers}
    short = [
        (layer.name, layer.heads, layer.places.shape[1], layer.effective(length), *mean_by_truth(values, truth))
        for layer, values in zip(layers, received.values(), strict=True)
    ]
    header = ["attention", "heads", "attends to", "of these in effect", "received by abnormal", "by normal"]
    lines = [f"{seen.title}, input {which}", table_text(make_table(short, header))]
    return AnalysisResult(seen.table(which, received), draw_attention(layers, seen, which), lines)
