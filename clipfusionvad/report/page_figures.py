"""The figures of a run's page, in Plotly's own form; colours are those of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from clipfusionvad.metrics import snippet_metrics
from clipfusionvad.report.curves import PooledScores, bucket_means, precision_recall, roc, thin
from clipfusionvad.report.table import BRANCHES, RANKING

COLOURS = [f"var(--curve-{number})" for number in range(1, 9)]


def ranking_figures(pooled: PooledScores) -> list[dict[str, Any]]:
    """ROC and precision over recall of every branch, over all frames; none where all frames are of one kind."""
    found = [
        (roc(curve, pooled.positives, pooled.frames), precision_recall(curve, pooled.positives, pooled.frames))
        for curve in pooled.anomaly
    ]
    known = [(ranks, precisions) for ranks, precisions in found if ranks and precisions]
    if not known:
        return []
    chance = float(pooled.positives.sum() / pooled.frames.sum())
    left, right = [_guide([0, 1], [0, 1])], [_guide([0, 1], [chance, chance])]
    for number, (ranks, precisions) in enumerate(known, start=1):
        metrics = snippet_metrics(pooled.anomaly[number - 1], pooled.positives, pooled.frames)
        for traces, curve, key in ((left, ranks, "auc"), (right, precisions, "ap")):
            points, label = thin(curve), f"{_short_branch(str(number))}, {key.upper()} {100 * metrics[key]:.2f}"
            traces.append(_line(label, points.x, points.y, number - 1))
    return [
        _figure("ROC", left, "false positive rate", "true positive rate", unit=True),
        _figure("Precision and recall", right, "recall", "precision", unit=True),
    ]


def training_figures(losses: pd.DataFrame | None, evaluations: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Loss terms and learning rate over steps, metrics over evaluations; those that there are."""
    figures = []
    if losses is not None and len(losses):
        terms = losses.drop(columns=["epoch", "lr"], errors="ignore")
        figures.append(_series("Training loss", terms, "loss"))
        if "lr" in losses:
            figures.append(_series("Learning rate", losses[["lr"]], ""))
    if evaluations is not None and len(evaluations):
        ranking = [name for name in evaluations if "auc" in name or name.startswith("ap")]
        if ranking:
            table = evaluations[ranking].rename(columns=_short_name)
            figures.append(_series("Evaluations", table, "AUC, AP", marked=True))
        if "map_average" in evaluations:
            table = evaluations[["map_average"]]
            figures.append(_series("Detection mAP, average", table, "percent", marked=True))
    return figures


def _short_name(metric: str) -> str:
    """A metric of a branch as a legend has room for it: AUC coarse."""
    kind = RANKING.get(metric[:-1])
    return f"{kind} {_short_branch(metric[-1])}" if kind else metric


def _short_branch(number: str) -> str:
    return BRANCHES.get(number, f"branch {number}").removesuffix(" branch")


def _series(title: str, table: pd.DataFrame, unit: str, marked: bool = False) -> dict[str, Any]:
    steps, values = bucket_means(table.index.to_numpy(), table.to_numpy(np.float64))
    traces = [
        _line(str(name), steps, column, number, marked)
        for number, (name, column) in enumerate(zip(table.columns, values.T, strict=True))
    ]
    return _figure(title, traces, "step", unit)


def _line(name: str, x: np.ndarray, y: np.ndarray, number: int, marked: bool = False) -> dict[str, Any]:
    look = {"color": COLOURS[number % len(COLOURS)], "width": 2}
    if number >= len(COLOURS):
        look["dash"] = "dot"
    return {
        "type": "scatter",
        "mode": "lines+markers" if marked else "lines",
        "name": name,
        "x": _rounded(x),
        "y": _rounded(y),
        "line": look,
    }


def _guide(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """What chance would give."""
    look = {"color": "var(--muted)", "width": 1, "dash": "dash"}
    return {"type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "line": look, "name": "chance"}


def _rounded(values: np.ndarray) -> list[float]:
    """Four significant digits are more than a picture shows; whole numbers stay as they are."""
    if values.dtype.kind in "iu":
        return values.tolist()
    return [float(f"{value:.4g}") for value in values.tolist()]


def _figure(title: str, traces: Sequence[Mapping[str, Any]], x: str, y: str, unit: bool = False) -> dict[str, Any]:
    """``unit``: both axes from 0 to 1."""
    limits = {"range": [0, 1.005]} if unit else {}
    layout = {
        "title": {"text": title, "x": 0.02, "font": {"size": 15}},
        "xaxis": {"title": {"text": x}, **limits},
        "yaxis": {"title": {"text": y}, **limits},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        "showlegend": len(traces) > 1,
        "hovermode": "closest" if unit else "x unified",
    }
    return {"data": list(traces), "layout": layout}
