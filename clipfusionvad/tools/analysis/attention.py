"""Attention along time in one input of a model.

The models compute attention in fused kernels, which return no weights. Here the weights are computed by formula from
the queries and keys of each call of ``F.scaled_dot_product_attention``; the models do not change. T snippets of an
input, H heads; a module attends within lines of L places: windows, rows of a grid, or the whole input as its only line.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad.io.errors import UserError
from clipfusionvad.models import Method
from clipfusionvad.models.layers.temporal import ROWS
from clipfusionvad.tools.analysis import figures
from clipfusionvad.tools.analysis.result import AnalysisResult, table_text
from clipfusionvad.tools.analysis.view import LoadedModel, VideoName, VideoView, WindowIndex, mean_by_truth

# Snippets of an input that are drawn where attention is in windows: more would be a thin line.
SHOWN = 64
# Matrices that are drawn at most: of deeper models the last ones.
PANELS = 4


def attention_weights(
    q: Tensor, k: Tensor, mask: Any = None, _: float = 0, is_causal: bool = False, *, scale: float | None = None
) -> Tensor:
    """Return the weights (…, L, L) of ``F.scaled_dot_product_attention``, whose rows sum to one; q, k (…, L, d)."""
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(dim=-1)


@contextlib.contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, bool]]]:
    """Record the weights (lines, H, L, L) of all attention computed within, by the name of the innermost module.

    True beside them: a module around it attends along the rows of a grid.
    """
    found: dict[str, tuple[Tensor, bool]] = {}
    running: list[tuple[str, bool]] = []
    compute, fast = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()

    def enter(name: str, module: nn.Module) -> None:
        running.append((name, getattr(module, "axis", None) == ROWS or bool(running and running[-1][1])))

    def leave(*_: Any) -> None:
        running.pop()

    def record(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        name, along_rows = running[-1]
        found[name] = attention_weights(q, k, attn_mask, *args, **kwargs), along_rows
        return compute(q, k, v, attn_mask, *args, **kwargs)

    torch.backends.mha.set_fastpath_enabled(False)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", record))
        for name, module in model.named_modules():
            before = module.register_forward_pre_hook(lambda module, _, name=name: enter(name, module))
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield found


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
        """Return e to the entropy of a place's weights, how many it attends to: the mean over the first places."""
        matrix = self.dense(int(self.places.max()) + 1)[:length]
        return float(np.exp(-(matrix * np.log(np.maximum(matrix, 1e-12))).sum(axis=1)).mean())


@torch.inference_mode()
def read_attention(model: Method, seen: VideoView, which: int) -> list[Layer]:
    """Return all attention along time on input number ``which``; ``UserError`` for a model without any."""
    chosen, fixed = slice(which, which + 1), model.fixed_inputs()
    with record_attention(model) as found:
        model(seen.windows[chosen], seen.lengths[chosen], *fixed)
    if not found:
        raise UserError(f"this {model.name} has no attention along time")
    layers = []
    for name, (weights, strided) in found.items():
        lines, heads, length, _ = weights.shape
        places = np.arange(lines * length).reshape((length, lines) if strided else (lines, length))
        mean = weights.mean(dim=1).float().cpu().numpy()
        layers.append(Layer(name, heads, mean, places.T if strided else places, strided))
    return layers


def _draw_layer(axis: Any, layer: Layer, truth: np.ndarray, length: int) -> Any:
    """Draw the weights between segments, between all snippets, or between those of the windows around the anomaly."""
    lines, side = layer.places.shape
    first, windowed = 0, not layer.strided and side < length
    if layer.strided:
        matrix, truth, unit = layer.weights.mean(axis=0), truth.reshape(side, lines).max(axis=1), "segment"
    else:
        matrix, unit = layer.dense(length), "snippet of the input"
    if windowed:
        abnormal = np.flatnonzero(truth[:length] > 0)
        centre = int(abnormal.mean()) if len(abnormal) else 0
        first = max(0, min(centre - SHOWN // 2, length - SHOWN)) // side * side
        shown = slice(first, min(first + SHOWN, length))
        matrix, truth = matrix[shown, shown], truth[shown]
    scaled = matrix * side
    limit = max(float(np.quantile(scaled[scaled > 0], 0.99)), 1.5)
    image = axis.imshow(scaled, cmap="viridis", vmin=0, vmax=limit, interpolation="nearest")
    figures.mark_truth(axis, truth)
    for edge in np.arange(0, len(matrix) + 1, side) - 0.5 if windowed else ():
        axis.axhline(edge, color="white", lw=0.4)
        axis.axvline(edge, color="white", lw=0.4)
    ticks = np.linspace(0, len(matrix) - 1, min(5, len(matrix))).astype(int)
    axis.set_xticks(ticks, ticks + first)
    axis.set_yticks(ticks, ticks + first)
    axis.set_title(f"{layer.name}\nweight × {side} (1: an even share)", fontsize=9, loc="left", pad=12)
    axis.set_xlabel(f"{unit}, key", fontsize=9)
    axis.set_ylabel(f"{unit}, query", fontsize=9)
    return image


def attention(loaded: LoadedModel, *, video: VideoName = None, window: WindowIndex = None) -> AnalysisResult:
    """Attention along time, layer by layer."""
    seen = loaded.view(video)
    which = seen.check_window(window)
    layers, length = read_attention(loaded.model, seen, which), int(seen.lengths[which])
    truth, title = seen.truth_at(seen.rows[which]), f"{seen.title}, input {which}"
    received, short = {}, []
    for layer in layers:
        values = received[layer.name] = layer.received(length)
        means = layer.effective(length), *mean_by_truth(values, truth[:length])
        short.append((layer.name, layer.heads, layer.places.shape[1], *means))
    # A matrix for each of the last layers, and what each snippet of the input receives.
    shown = layers[-PANELS:]
    figure = figures.new_figure(max(3.7 * len(shown) + 0.4, 9), 7, f"{title}; red bars and shading: annotated anomaly")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.7, 1))
    axis, matrices = parts[1].subplots(), parts[0].subplots(1, len(shown), squeeze=False)[0]
    figures.shade(axis, truth[:length])
    for matrix, layer, colour in zip(matrices, shown, figures.COLOURS, strict=False):
        parts[0].colorbar(_draw_layer(matrix, layer, truth, length), ax=matrix, shrink=0.7)
        axis.stairs(received[layer.name], baseline=None, color=colour, lw=1.2, label=layer.name)
    axis.axhline(1, color="#bbbbbb", lw=1, zorder=0)
    axis.set(xlim=(0, length), xlabel="snippet of the input", ylabel="attention received,\n1: an even share")
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figures.hide_spines(axis)
    header = ["attention", "heads", "keys", "effective keys", "received by abnormal", "by normal"]
    return AnalysisResult(seen.table(seen.rows[which, :length], received), figure, [title, table_text(short, header)])
