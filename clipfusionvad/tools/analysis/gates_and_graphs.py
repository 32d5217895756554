"""The gates of global attention (GAM) over a video, and the graphs of the dual branch on one of its inputs.

n snippets of a video, D channels, L valid snippets of an input. Gates lie in 0..1 and are multiplied with their input.
"""

from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipfusionvad.io.errors import UserError
from clipfusionvad.models import Method, find_method, method_names
from clipfusionvad.models.layers.dual_branch import (
    SIMILARITY_THRESHOLD,
    DualBranch,
    GlobalAttentionModule,
    similarity_adjacency,
)
from clipfusionvad.report.scores import abnormal_spans
from clipfusionvad.tools.analysis import figures
from clipfusionvad.tools.analysis.result import AnalysisResult, table_text
from clipfusionvad.tools.analysis.view import LoadedModel, VideoName, VideoView, WindowIndex, mean_by_truth


def find_gam(model: Method) -> GlobalAttentionModule:
    """Return the module of a model; ``UserError`` if it has none, naming the methods that do."""
    for module in model.modules():
        if isinstance(module, GlobalAttentionModule):
            return module
    having = ", ".join(name for name in method_names() if "gam" in find_method(name).option_names())
    raise UserError(f"this {model.name} has no global attention module (GAM) with gates; {having} may have it")


@torch.inference_mode()
def read_gates(model: Method, seen: VideoView) -> dict[str, np.ndarray]:
    """Return the "channel" gate and the "temporal" one of every snippet of a video, (n, D) each."""
    gam, held = find_gam(model), {}

    def keep(name: str, logits: Tensor) -> None:
        rows = logits.sigmoid().float().flatten(0, 1).cpu().numpy()
        held[name] = model.sampling.restore(rows, len(seen.anomaly))

    hooks = [
        gam.channel_attention.register_forward_hook(lambda *call: keep("channel", call[-1])),
        gam.spatial_attention.register_forward_hook(lambda *call: keep("temporal", call[-1].transpose(1, 2))),
    ]
    try:
        model(seen.windows, seen.lengths, *model.fixed_inputs())
    finally:
        for hook in hooks:
            hook.remove()
    return held


def contrast(gate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the mean gate of abnormal over that of normal snippets minus one, by channel: (D,); NaN without both."""
    abnormal = truth > 0.5
    if abnormal.all() or not abnormal.any():
        return np.full(gate.shape[1], np.nan)
    return gate[abnormal].mean(axis=0) / gate[~abnormal].mean(axis=0) - 1


def draw_gates(found: dict[str, np.ndarray], seen: VideoView) -> figures.Figure:
    """Draw the score, the mean of both gates, and every channel over time, those that follow the truth most on top."""
    figure = figures.new_figure(11, 8.4, f"GAM gates, {seen.title}")
    axes = figure.subplots(4, 1, sharex=True, height_ratios=(1, 1.1, 1.6, 1.6))
    step = seen.seconds_per_snippet
    edges = np.arange(len(seen.anomaly) + 1) * step
    for axis, title in zip(axes[:2], ("anomaly score", "gate"), strict=True):
        figures.shade(axis, seen.truth, step)
        axis.set(xlim=(0, edges[-1]), ylim=(0, 1.02), ylabel=title)
    axes[0].stairs(seen.anomaly, edges, color=figures.COARSE_COLOUR, lw=1.4, baseline=None)
    for axis, (name, gate), colour in zip(axes[2:], found.items(), figures.COLOURS, strict=False):
        low, high = np.quantile(gate, [0.1, 0.9], axis=1)
        middle = (edges[:-1] + edges[1:]) / 2
        axes[1].fill_between(middle, low, high, color=colour, alpha=0.15, lw=0)
        axes[1].plot(middle, gate.mean(axis=1), color=colour, lw=1.4, label=f"{name} gate: mean, 80 % of channels")
        change = gate - np.median(gate, axis=0)
        change = change[:, np.argsort(-np.nan_to_num(contrast(gate, seen.truth)))].T
        extent = (0.0, float(edges[-1]), float(gate.shape[1]), 0.0)
        limit = max(float(np.quantile(np.abs(change), 0.995)), 1e-3)
        image = axis.imshow(change, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent)
        figure.colorbar(image, ax=axis, label="gate − its median", pad=0.01)
        axis.set_ylabel(f"{name} gate,\nchannels, sorted")
        for place in chain.from_iterable(abnormal_spans(seen.truth > 0)):
            axis.axvline(place * step, color="black", lw=0.8, ls=":")
    axes[1].legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 0.98))
    axes[3].set_xlabel("seconds; shaded or between dotted lines: annotated anomaly")
    figures.hide_spines(*axes[:2])
    return figure


def gates(loaded: LoadedModel, *, video: VideoName = None) -> AnalysisResult:
    """The gates of global attention over a video."""
    # Before all features are read.
    find_gam(loaded.model)
    seen = loaded.view(video)
    found = read_gates(loaded.model, seen)
    rows = np.arange(len(seen.truth))
    numbers = seen.table(rows, {f"{name}_gate": gate.mean(axis=1).astype(np.float64) for name, gate in found.items()})
    numbers.insert(1, "start_seconds", rows * seen.seconds_per_snippet)
    short = []
    for name, gate in found.items():
        moved = np.abs(contrast(gate, seen.truth))
        share = float("nan") if np.isnan(moved).any() else float((moved > 0.2).mean())
        short.append((name, *mean_by_truth(gate, seen.truth), float(gate.std(axis=0).mean()), share))
    text = table_text(short, ["gate", "abnormal", "normal", "deviation over time", "channels changed by 20 %"])
    return AnalysisResult(numbers, draw_gates(found, seen), [seen.title, text])


class Graphs(NamedTuple):
    """Cosines of an input's features after attention, and the adjacency of the two graphs, (L, L) each.

    Rows of ``similarity`` sum to one. None for a graph that the model was made without.
    """

    cosine: np.ndarray
    similarity: np.ndarray | None
    distance: np.ndarray | None


@torch.inference_mode()
def read_graphs(model: Method, seen: VideoView, which: int) -> Graphs:
    """Return the graphs on input number ``which``; ``UserError`` for a model without any."""
    if not isinstance(model, DualBranch) or not (model.similarity_graph or model.distance_graph):
        raise UserError(f"this {model.name} has no graph over snippets: it is part of the dual branch (--graph)")
    chosen, length = slice(which, which + 1), int(seen.lengths[which])
    x = model.encode_temporal(seen.windows[chosen])
    unit = F.normalize(x[0, :length], dim=-1)
    similar = similarity_adjacency(x, seen.lengths[chosen])[0] if model.similarity_graph else None
    distant = model.disAdj(x.shape[1]) if model.distance_graph else None
    graphs = (None if graph is None else graph[:length, :length].cpu().numpy() for graph in (similar, distant))
    return Graphs((unit @ unit.T).cpu().numpy(), *graphs)


def blocks(matrix: np.ndarray, truth: np.ndarray) -> list[float]:
    """Return the means of a matrix (L, L) from abnormal rows to abnormal and normal columns, and from normal rows."""
    abnormal = truth > 0.5
    parts = [matrix[np.ix_(rows, columns)] for rows in (abnormal, ~abnormal) for columns in (abnormal, ~abnormal)]
    return [float(part.mean()) if part.size else float("nan") for part in parts]


def graph(loaded: LoadedModel, *, video: VideoName = None, window: WindowIndex = None) -> AnalysisResult:
    """Both graphs over the snippets of an input."""
    seen = loaded.view(video)
    which = seen.check_window(window)
    found, rows = read_graphs(loaded.model, seen, which), seen.rows[which, : int(seen.lengths[which])]
    truth, title = seen.truth[rows], f"{seen.title}, input {which}"
    alike, to_abnormal = found.cosine > SIMILARITY_THRESHOLD, np.full(len(truth), np.nan)
    matrices = {"cosine": found.cosine, f"cosine over {SIMILARITY_THRESHOLD}": alike.astype(np.float64)}
    panels = [(found.cosine, "cosine of the features", "RdBu_r", -1.0, 1.0)]
    if found.similarity is not None:
        scaled = matrices["similarity weight × L"] = found.similarity * len(truth)
        to_abnormal = (found.similarity @ (truth > 0.5)).astype(np.float64)
        limit = max(float(np.quantile(scaled, 0.995)), 1.0)
        panels.append((scaled, "similarity graph, weight × L (1: an even share)", "viridis", 0.0, limit))
    if found.distance is not None:
        matrices["distance weight"] = found.distance
        panels.append((found.distance, "distance graph, exp(−|i − j| / e)", "viridis", 0.0, 1.0))
    figure = figures.new_figure(4.9 * len(panels), 4.9, f"{title}; red bars: annotated anomaly")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (matrix, name, colours, low, high) in zip(axes, panels, strict=True):
        image = axis.imshow(matrix, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        figure.colorbar(image, ax=axis, shrink=0.75)
        figures.mark_truth(axis, truth)
        axis.set_title(name, fontsize=10, loc="left", pad=14)
        axis.set_xlabel("snippet of the input")
    axes[0].set_ylabel("snippet of the input")
    header = ["mean of", "abnormal → abnormal", "abnormal → normal", "normal → abnormal", "normal → normal"]
    text = table_text([(name, *blocks(matrix, truth)) for name, matrix in matrices.items()], header)
    further = {"alike_snippets": alike.sum(axis=1), "similarity_weight_on_abnormal": to_abnormal}
    return AnalysisResult(seen.table(rows, further), figure, [title, text])
