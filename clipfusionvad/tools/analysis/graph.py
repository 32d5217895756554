"""The two graphs of the dual branch on one input: which snippets look alike, and which are close.

L valid snippets of the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from clipfusionvad.io.errors import UserError
from clipfusionvad.models import Method
from clipfusionvad.models.layers.dual_branch import DualBranch
from clipfusionvad.models.layers.graph import SIMILARITY_THRESHOLD, similarity_adjacency
from clipfusionvad.tools.analysis.result import Insight, Table
from clipfusionvad.tools.analysis.view import View, mark_truth


@dataclass(frozen=True)
class Graphs:
    """Of an input: cosines of its features after attention, and what the two graphs make of them and of time, (L, L)
    each; rows of ``similarity`` sum to one. None for a graph that the model was made without. ``rows`` (L,): the
    snippets."""

    cosine: np.ndarray
    similarity: np.ndarray | None
    distance: np.ndarray | None
    rows: np.ndarray


@torch.inference_mode()
def read_graphs(model: Method, seen: View, which: int) -> Graphs:
    """The graphs on input number ``which``; ``UserError`` for a model without any."""
    if not isinstance(model, DualBranch) or not (model.similarity_graph or model.distance_graph):
        raise UserError(f"this {model.name} has no graph over snippets: it is part of the dual branch (--graph)")
    chosen = slice(which, which + 1)
    x, length = model.encode_temporal(seen.windows[chosen]), int(seen.lengths[which])
    unit = torch.nn.functional.normalize(x[0, :length], dim=-1)
    similarity = similarity_adjacency(x, seen.lengths[chosen])[0] if model.similarity_graph else None
    distance = model.disAdj(x.shape[1]) if model.distance_graph else None
    kept = [None if a is None else a[:length, :length].cpu().numpy() for a in (unit @ unit.T, similarity, distance)]
    assert kept[0] is not None
    return Graphs(kept[0], kept[1], kept[2], seen.rows[which, :length])


def blocks(matrix: np.ndarray, truth: np.ndarray) -> list[float]:
    """Means of a matrix (L, L) from abnormal rows to abnormal and to normal columns, and from normal rows likewise."""
    abnormal = truth > 0.5
    parts = [matrix[np.ix_(rows, columns)] for rows in (abnormal, ~abnormal) for columns in (abnormal, ~abnormal)]
    return [float(part.mean()) if part.size else float("nan") for part in parts]


def draw_graphs(graphs: Graphs, seen: View, which: int) -> Figure:
    """Cosines, and the adjacency matrices of the model's graphs."""
    limit = float(np.quantile(graphs.similarity * len(graphs.rows), 0.995)) if graphs.similarity is not None else 1.0
    panels = [(graphs.cosine, "cosine of the features", "RdBu_r", -1.0, 1.0)]
    if graphs.similarity is not None:
        title = "similarity graph, 1: as much as all"
        panels.append((graphs.similarity * len(graphs.rows), title, "viridis", 0.0, max(limit, 1.0)))
    if graphs.distance is not None:
        panels.append((graphs.distance, "distance graph, exp(−|i − j| / e)", "viridis", 0.0, 1.0))
    figure = Figure(figsize=(4.9 * len(panels), 4.9), layout="constrained")
    figure.suptitle(f"{seen.title}, input {which}; red bars: annotated anomaly", fontsize=11)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (matrix, title, colours, low, high) in zip(axes, panels, strict=True):
        image = axis.imshow(matrix, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        figure.colorbar(image, ax=axis, shrink=0.75)
        mark_truth(axis, seen.truth[graphs.rows])
        axis.set_title(title, fontsize=10, loc="left", pad=14)
        axis.set_xlabel("snippet of the input")
    axes[0].set_ylabel("snippet of the input")
    return figure


def graph_insight(model: Method, seen: View, which: int) -> Insight:
    """The graphs as picture, and by snippet to whom they connect it."""
    graphs = read_graphs(model, seen, which)
    truth = seen.truth[graphs.rows]
    alike = graphs.cosine > SIMILARITY_THRESHOLD
    given = {"cosine": graphs.cosine, f"cosine over {SIMILARITY_THRESHOLD}": alike.astype(np.float64)}
    if graphs.similarity is not None:
        given["similarity weight × L"] = graphs.similarity * len(truth)
    if graphs.distance is not None:
        given["distance weight"] = graphs.distance
    header = ("mean of", "abnormal → abnormal", "abnormal → normal", "normal → abnormal", "normal → normal")
    short = Table(header, [(name, *blocks(matrix, truth)) for name, matrix in given.items()])
    to_abnormal = np.full(len(truth), np.nan) if graphs.similarity is None else graphs.similarity @ (truth > 0.5)
    columns = (graphs.rows, truth, seen.anomaly[graphs.rows], alike.sum(axis=1), to_abnormal)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    numbers = Table(("snippet", "truth", "score", "alike_snippets", "similarity_weight_on_abnormal"), rows)
    return Insight(numbers, draw_graphs(graphs, seen, which), [f"{seen.title}, input {which}", short.text()])
