"""The two gates of the global attention module (GAM) over a video, beside its score and truth.

n snippets of a video, D channels. Gates lie in 0..1 and are multiplied onto their input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from clipfusionvad.io.errors import UserError
from clipfusionvad.models import Method, find_method, method_names
from clipfusionvad.models.layers.attention import GlobalAttentionModule
from clipfusionvad.report.plots import COARSE_COLOUR, FINE_COLOUR
from clipfusionvad.tools.analysis.result import Insight, Table, bare
from clipfusionvad.tools.analysis.view import View, draw_score, shade

# The switch of the module, by which a method that has one is known.
OPTION = "gam"


@dataclass(frozen=True)
class Gates:
    """The channel gate and the gate along time of each snippet, (n, D) each."""

    channel: np.ndarray
    temporal: np.ndarray


def find_gam(model: Method) -> GlobalAttentionModule:
    """The module in a model; ``UserError`` where it has none, saying which methods do."""
    found = [module for module in model.modules() if isinstance(module, GlobalAttentionModule)]
    if not found:
        having = ", ".join(name for name in method_names() if OPTION in find_method(name).option_names())
        raise UserError(
            f"this {model.name} has no global attention module, whose gates these are; {having} may have it"
        )
    return found[0]


@torch.inference_mode()
def read_gates(model: Method, seen: View) -> Gates:
    """The gates of every snippet of a video."""
    module = find_gam(model)
    held: dict[nn.Module, Tensor] = {}
    parts = module.channel_attention, module.spatial_attention
    hooks = [part.register_forward_hook(lambda part, _, output: held.update({part: output})) for part in parts]
    try:
        model(seen.windows, seen.lengths, model.encode_text())
    finally:
        for hook in hooks:
            hook.remove()
    channel, temporal = held[parts[0]].sigmoid(), held[parts[1]].transpose(1, 2).sigmoid()
    rows = (part.float().flatten(0, 1).cpu().numpy() for part in (channel, temporal))
    return Gates(*(model.sampling.restore(part, len(seen.anomaly)) for part in rows))


def contrast(gate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean gate of abnormal over that of normal snippets minus one, by channel: (D,); NaN where a kind is missing."""
    abnormal = truth > 0.5
    if abnormal.all() or not abnormal.any():
        return np.full(gate.shape[1], np.nan)
    return gate[abnormal].mean(axis=0) / gate[~abnormal].mean(axis=0) - 1


def draw_gates(gates: Gates, seen: View) -> Figure:
    """Score; mean of both gates; every channel of both over time, those that differ most with the truth on top."""
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    figure.suptitle(f"GAM gates, {seen.title}", fontsize=11)
    axes = figure.subplots(4, 1, sharex=True, height_ratios=(1, 1.1, 1.6, 1.6))
    draw_score(axes[0], seen)
    step = seen.seconds_per_snippet
    edges = np.arange(len(seen.anomaly) + 1) * step
    shade(axes[1], seen.truth, step)
    for gate, name, colour in ((gates.channel, "channel", COARSE_COLOUR), (gates.temporal, "temporal", FINE_COLOUR)):
        low, high = np.quantile(gate, [0.1, 0.9], axis=1)
        middle = (edges[:-1] + edges[1:]) / 2
        axes[1].fill_between(middle, low, high, color=colour, alpha=0.15, lw=0)
        axes[1].plot(middle, gate.mean(axis=1), color=colour, lw=1.4, label=f"{name} gate, mean and 80 % of channels")
    axes[1].set(ylim=(0, 1.02), ylabel="gate")
    axes[1].legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 0.98))
    for axis, gate, name in ((axes[2], gates.channel, "channel"), (axes[3], gates.temporal, "temporal")):
        change = gate - np.median(gate, axis=0)
        difference = np.nan_to_num(contrast(gate, seen.truth))
        change = change[:, np.argsort(-difference)].T
        extent = (0.0, float(edges[-1]), float(gate.shape[1]), 0.0)
        limit = max(float(np.quantile(np.abs(change), 0.995)), 1e-3)
        image = axis.imshow(change, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent)
        figure.colorbar(image, ax=axis, label="gate − its median", pad=0.01)
        axis.set_ylabel(f"{name} gate,\nchannels")
        # Where the truth begins and ends.
        for place in np.flatnonzero(np.diff((seen.truth > 0).astype(np.int8), prepend=0, append=0)) * step:
            axis.axvline(place, color="black", lw=0.8, ls=":")
    axes[3].set_xlabel("seconds; shaded or between dotted lines: annotated anomaly")
    for axis in axes[:2]:
        bare(axis)
    return figure


def gates_insight(model: Method, seen: View) -> Insight:
    """The gates as table and picture."""
    gates = read_gates(model, seen)
    header = ("snippet", "start_seconds", "truth", "score", "channel_gate", "temporal_gate")
    means = gates.channel.mean(axis=1), gates.temporal.mean(axis=1)
    starts = np.arange(len(seen.truth)) * seen.seconds_per_snippet
    columns = (np.arange(len(seen.truth)), starts, seen.truth, seen.anomaly, *means)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    abnormal = seen.truth > 0.5
    short = []
    for name, gate in (("channel", gates.channel), ("temporal", gates.temporal)):
        parts = [float(gate[part].mean()) if part.any() else float("nan") for part in (abnormal, ~abnormal)]
        spread, moved = float(gate.std(axis=0).mean()), np.abs(contrast(gate, seen.truth))
        share = float("nan") if np.isnan(moved).any() else float((moved > 0.2).mean())
        short.append((name, *parts, spread, share))
    table = Table(("gate", "abnormal", "normal", "deviation over time", "channels off by 20 %"), short)
    return Insight(Table(header, rows), draw_gates(gates, seen), [seen.title, table.text()])
