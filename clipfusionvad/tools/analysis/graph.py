"""The two graphs of the dual branch on one input: similarity of the snippets, and their distance in time.

L valid snippets of the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from clipfusionvad.io.errors import UserError
from clipfusionvad.models import Method
from clipfusionvad.models.layers.dual_branch import DualBranch
from clipfusionvad.models.layers.graph import SIMILARITY_THRESHOLD, similarity_adjacency
from clipfusionvad.tools.analysis.figures import Figure, mark_truth, new_figure
from clipfusionvad.tools.analysis.result import AnalysisResult, make_table, table_text
from clipfusionvad.tools.analysis.view import LoadedModel, VideoName, VideoView, WindowIndex


@dataclass(frozen=True)
class Graphs:
    """Cosines of an input's features after attention, and the adjacency of the two graphs, (L, L) each.

    Rows of ``similarity`` sum to one. None for a graph that the model was made without. ``rows`` (L,): the snippets.
    """

    cosine: np.ndarray
    similarity: np.ndarray | None
    distance: np.ndarray | None
    rows: np.ndarray


@torch.inference_mode()
def read_graphs(model: Method, seen: VideoView, which: int) -> Graphs:
    """Return the graphs on input number ``which``; ``UserError`` for a model without any."""
    if not isinstance(model, DualBranch) or not (model.similarity_graph or model.distance_graph):
        raise UserError(f"this {model.name} has no graph over snippets: it is part of the dual branch (--graph)")
    chosen = slice(which, which + 1)
    x, length = model.encode_temporal(seen.windows[chosen]), int(seen.lengths[which])
    unit = torch.nn.functional.normalize(x[0, :length], dim=-1)
    similarity = distance = None
    if model.similarity_graph:
        similarity = similarity_adjacency(x, seen.lengths[chosen])[0, :length, :length].cpu().numpy()
    if model.distance_graph:
        distance = model.disAdj(x.shape[1])[:length, :length].cpu().numpy()
    return Graphs((unit @ unit.T).cpu().numpy(), similarity, distance, seen.rows[which, :length])


def blocks(matrix: np.ndarray, truth: np.ndarray) -> list[float]:
    """Return the means of a matrix (L, L) from abnormal rows to abnormal and normal columns, and from normal rows."""
    abnormal = truth > 0.5
    parts = [matrix[np.ix_(rows, columns)] for rows in (abnormal, ~abnormal) for columns in (abnormal, ~abnormal)]
    return [float(part.mean()) if part.size else float("nan") for part in parts]


def draw_graphs(graphs: Graphs, seen: VideoView, which: int) -> Figure:
    """Draw the cosines and the adjacency matrices of the model's graphs."""
    panels = [(graphs.cosine, "cosine of the features", "RdBu_r", -1.0, 1.0)]
    if graphs.similarity is not None:
        scaled = graphs.similarity * len(graphs.rows)
        limit = max(float(np.quantile(scaled, 0.995)), 1.0)
        panels.append((scaled, "similarity graph, 1: an even share", "viridis", 0.0, limit))
    if graphs.distance is not None:
        panels.append((graphs.distance, "distance graph, exp(−|i − j| / e)", "viridis", 0.0, 1.0))
    figure = new_figure(4.9 * len(panels), 4.9, f"{seen.title}, input {which}; red bars: annotated anomaly")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (matrix, title, colours, low, high) in zip(axes, panels, strict=True):
        image = axis.imshow(matrix, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        figure.colorbar(image, ax=axis, shrink=0.75)
        mark_truth(axis, seen.truth[graphs.rows])
        axis.set_title(title, fontsize=10, loc="left", pad=14)
        axis.set_xlabel("snippet of the input")
    axes[0].set_ylabel("snippet of the input")
    return figure


def graph(loaded: LoadedModel, *, video: VideoName = None, window: WindowIndex = None) -> AnalysisResult:
    """Both graphs over the snippets of an input."""
    seen = loaded.view(video)
    which = seen.check_window(window)
    found = read_graphs(loaded.model, seen, which)
    truth = seen.truth[found.rows]
    alike = found.cosine > SIMILARITY_THRESHOLD
    matrices = {"cosine": found.cosine, f"cosine over {SIMILARITY_THRESHOLD}": alike.astype(np.float64)}
    to_abnormal = np.full(len(truth), np.nan)
    if found.similarity is not None:
        matrices["similarity weight × L"] = found.similarity * len(truth)
        to_abnormal = (found.similarity @ (truth > 0.5)).astype(np.float64)
    if found.distance is not None:
        matrices["distance weight"] = found.distance
    header = ["mean of", "abnormal → abnormal", "abnormal → normal", "normal → abnormal", "normal → normal"]
    short = make_table([(name, *blocks(matrix, truth)) for name, matrix in matrices.items()], header)
    further = {"alike_snippets": alike.sum(axis=1), "similarity_weight_on_abnormal": to_abnormal}
    lines = [f"{seen.title}, input {which}", table_text(short)]
    return AnalysisResult(seen.table(which, further), draw_graphs(found, seen, which), lines)
