"""The two gates of the global attention module (GAM) over a video, beside its score and truth.

n snippets of a video, D channels. Gates lie in 0..1 and are multiplied with their input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from clipfusionvad.io.errors import UserError
from clipfusionvad.models import Method, find_method, method_names
from clipfusionvad.models.layers.attention import GlobalAttentionModule
from clipfusionvad.tools.analysis.figures import (
    COARSE_COLOUR,
    FINE_COLOUR,
    Figure,
    abnormal_runs,
    hide_spines,
    new_figure,
    shade,
)
from clipfusionvad.tools.analysis.result import AnalysisResult, make_table, table_text
from clipfusionvad.tools.analysis.view import LoadedModel, VideoName, VideoView, mean_by_truth

# The switch of the module: methods that have this option may have the module.
OPTION = "gam"


@dataclass(frozen=True)
class Gates:
    """The channel gate and the gate along time of each snippet, (n, D) each."""

    channel: np.ndarray
    temporal: np.ndarray


def find_gam(model: Method) -> GlobalAttentionModule:
    """Return the module of a model; ``UserError`` if it has none, naming the methods that do."""
    found = [module for module in model.modules() if isinstance(module, GlobalAttentionModule)]
    if not found:
        having = ", ".join(name for name in method_names() if OPTION in find_method(name).option_names())
        raise UserError(f"this {model.name} has no global attention module (GAM) with gates; {having} may have it")
    return found[0]


@torch.inference_mode()
def read_gates(model: Method, seen: VideoView) -> Gates:
    """Return the gates of every snippet of a video."""
    module = find_gam(model)
    held: dict[nn.Module, Tensor] = {}
    parts = module.channel_attention, module.spatial_attention
    hooks = [part.register_forward_hook(lambda part, _, output: held.update({part: output})) for part in parts]
    try:
        model(seen.windows, seen.lengths, *model.fixed_inputs())
    finally:
        for hook in hooks:
            hook.remove()
    channel, temporal = held[parts[0]].sigmoid(), held[parts[1]].transpose(1, 2).sigmoid()
    rows = (part.float().flatten(0, 1).cpu().numpy() for part in (channel, temporal))
    return Gates(*(model.sampling.restore(part, len(seen.anomaly)) for part in rows))


def contrast(gate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the mean gate of abnormal over that of normal snippets minus one, by channel: (D,); NaN without both."""
    abnormal = truth > 0.5
    if abnormal.all() or not abnormal.any():
        return np.full(gate.shape[1], np.nan)
    return gate[abnormal].mean(axis=0) / gate[~abnormal].mean(axis=0) - 1


def draw_gates(gates: Gates, seen: VideoView) -> Figure:
    """Draw the score, the mean of both gates, and every channel over time, those that follow the truth most on top."""
    figure = new_figure(11, 8.4, f"GAM gates, {seen.title}")
    axes = figure.subplots(4, 1, sharex=True, height_ratios=(1, 1.1, 1.6, 1.6))
    step = seen.seconds_per_snippet
    edges = np.arange(len(seen.anomaly) + 1) * step
    for axis in axes[:2]:
        shade(axis, seen.truth, step)
    axes[0].stairs(seen.anomaly, edges, color=COARSE_COLOUR, lw=1.4, baseline=None)
    axes[0].set(xlim=(0, edges[-1]), ylim=(0, 1.02), ylabel="anomaly score")
    axes[1].set(ylim=(0, 1.02), ylabel="gate")
    named = (("channel", gates.channel, COARSE_COLOUR), ("temporal", gates.temporal, FINE_COLOUR))
    for axis, (name, gate, colour) in zip(axes[2:], named, strict=True):
        low, high = np.quantile(gate, [0.1, 0.9], axis=1)
        middle = (edges[:-1] + edges[1:]) / 2
        axes[1].fill_between(middle, low, high, color=colour, alpha=0.15, lw=0)
        axes[1].plot(middle, gate.mean(axis=1), color=colour, lw=1.4, label=f"{name} gate, mean and 80 % of channels")
        change = gate - np.median(gate, axis=0)
        change = change[:, np.argsort(-np.nan_to_num(contrast(gate, seen.truth)))].T
        extent = (0.0, float(edges[-1]), float(gate.shape[1]), 0.0)
        limit = max(float(np.quantile(np.abs(change), 0.995)), 1e-3)
        image = axis.imshow(change, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent)
        figure.colorbar(image, ax=axis, label="gate − its median", pad=0.01)
        axis.set_ylabel(f"{name} gate,\nchannels")
        for place in abnormal_runs(seen.truth).ravel() * step:
            axis.axvline(place, color="black", lw=0.8, ls=":")
    axes[1].legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 0.98))
    axes[3].set_xlabel("seconds; shaded or between dotted lines: annotated anomaly")
    hide_spines(*axes[:2])
    return figure


def gates(loaded: LoadedModel, *, video: VideoName = None) -> AnalysisResult:
    """The gates of global attention over a video."""
    # Before all features are read.
    find_gam(loaded.model)
    seen = loaded.view(video)
    found = read_gates(loaded.model, seen)
    numbers = make_table(
        {
            "snippet": np.arange(len(seen.truth)),
            "start_seconds": np.arange(len(seen.truth)) * seen.seconds_per_snippet,
            "truth": seen.truth,
            "score": seen.anomaly.astype(np.float64),
            "channel_gate": found.channel.mean(axis=1).astype(np.float64),
            "temporal_gate": found.temporal.mean(axis=1).astype(np.float64),
        }
    )
    short = []
    for name, gate in vars(found).items():
        moved = np.abs(contrast(gate, seen.truth))
        share = float("nan") if np.isnan(moved).any() else float((moved > 0.2).mean())
        short.append((name, *mean_by_truth(gate, seen.truth), float(gate.std(axis=0).mean()), share))
    header = ["gate", "abnormal", "normal", "deviation over time", "channels off by 20 %"]
    table = table_text(make_table(short, header))
    return AnalysisResult(numbers, draw_gates(found, seen), [seen.title, table])
