"""How a model that fuses two modalities by uncertainty weighs each of them, also when one is damaged.

For any method whose output has the fields of ``NEEDED``. n snippets of all videos, D dimensions of the fused state,
T snippets of a model input; the two modalities, image and event, are the method's streams in their order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from clipfusionvad.engine.device import autocast
from clipfusionvad.engine.evaluator import VideoDataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import atomic_write, write_text
from clipfusionvad.metrics import count_frames, snippet_metrics
from clipfusionvad.models.base import Method
from clipfusionvad.report.formatting import Table, to_text
from clipfusionvad.report.plots import TRUTH_COLOUR, save_figure
from clipfusionvad.report.scores import abnormal_spans

MODALITIES = ("image", "event")
NEEDED = ("fused", *(f"{kind}_{what}" for what in ("mu", "weight") for kind in MODALITIES))
CURVES = [f"{kind}_{what}" for what in ("weight", "cosine", "euclidean") for kind in MODALITIES]
# The factor of a corrupted feature. Source: released code of IEF-VAD.
ATTENUATION = 0.01
PROBABILITY_FLOOR = 1e-8
# Frames along the time axis of one figure. Source: released code of IEF-VAD.
CHUNK = 3000
COLOURS = dict(zip(MODALITIES, ("#56b4e9", "#e69f00"), strict=True))
TABLE = {"brier": "Brier", "kl": "KL", "auc": "AUC", "ap": "AP"}
TABLE |= {"image_weight": "image weight", "event_weight": "event weight"}
PARTS = ("anomalous", "normal")
#: The columns of uncertainty.csv that are drawn.
PANELS = {"brier": "Brier score", "kl": "KL from the clean scores, in nats", "auc": "AUC", "ap": "AP"}
PANELS |= {f"image_weight_{part}": f"mean weight of the image, {part} frames" for part in PARTS}
CURVES_FILE = "curves.npz"


@dataclass(frozen=True)
class Corruption:
    """Attenuation of one modality at a random share ``level`` of the T positions of a model input.

    The positions are the same in all inputs of a video, and differ between videos. With one seed the positions of a
    level contain those of each lower level, for either modality, so that only the level differs between results.
    """

    modality: int
    level: float
    seed: int

    def positions(self, video: int, length: int) -> np.ndarray:
        """Return the corrupted positions of a video by its number in the list, floor(T · level) of 0..T-1."""
        return np.random.default_rng([self.seed, video]).permutation(length)[: int(length * self.level)]

    def apply(self, windows: np.ndarray, video: int) -> np.ndarray:
        """Return a corrupted copy of a video's inputs (N, T, 2 · D)."""
        width = windows.shape[2] // len(MODALITIES)
        corrupted = windows.astype(np.float32)
        stream = corrupted[:, :, self.modality * width : (self.modality + 1) * width]
        stream[:, self.positions(video, windows.shape[1])] *= ATTENUATION
        return corrupted


def observe_videos(
    model: Method,
    videos: VideoDataset,
    device: torch.device,
    precision: str = "fp32",
    corruption: Corruption | None = None,
) -> tuple[pd.DataFrame, np.ndarray]:
    """Run a model on videos whose truth is known, and leave it in eval mode.

    Returns a row for each snippet: the number of its ``video``, the ``frames`` behind it and how many are abnormal
    (``positives``), the ``anomaly`` probability, and ``CURVES``: the mean over D of a modality's weights, and cosine
    similarity and Euclidean distance of the fused state and the modality's mean. The second result is the weights
    (2, D), averaged over frames. ``UserError`` for a model that does not weigh two modalities.
    """
    if len(model.streams) != len(MODALITIES):
        raise _unsuitable(model)
    model.eval()
    tables, dimensions = [], np.zeros(1)
    with torch.inference_mode(), autocast(device, precision):
        fixed = model.fixed_inputs()
        for video, (rows, truth) in enumerate(zip(videos.features, videos.known_truth.frames, strict=True)):
            positives, frames = count_frames(truth, len(rows), videos.frames_per_snippet)
            windows, lengths = model.sampling.windows(rows)
            if corruption:
                windows = corruption.apply(windows, video)
            curves, weights = (
                model.sampling.restore(values, len(rows)) for values in _observe_windows(model, windows, lengths, fixed)
            )
            counted = {"video": video, "frames": frames, "positives": positives}
            tables.append(pd.DataFrame(curves, columns=["anomaly", *CURVES]).assign(**counted))
            dimensions = dimensions + np.einsum("n,nmd->md", frames.astype(np.float64), weights)
    table = pd.concat(tables, ignore_index=True)
    return table, dimensions / table.frames.sum()


def _observe_windows(
    model: Method, windows: np.ndarray, lengths: np.ndarray, fixed: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the anomaly and ``CURVES`` (N·T, 7), and weights (N·T, 2, D) of model inputs (N, T, 2 · D)."""
    device, at_once = next(model.parameters()).device, model.windows_at_once
    curves, weights = [], []
    for start in range(0, len(windows), at_once):
        chosen = slice(start, start + at_once)
        visual = torch.from_numpy(windows[chosen]).to(device, torch.float32)
        output: Any = model(visual, torch.from_numpy(lengths[chosen]).to(device), *fixed)
        if any(getattr(output, name, None) is None for name in NEEDED):
            raise _unsuitable(model)
        weight, mu = (
            torch.stack([getattr(output, f"{kind}_{what}").float() for kind in MODALITIES], dim=-2)
            for what in ("weight", "mu")
        )
        fused, anomaly = output.fused.float().unsqueeze(-2), model.scores(output).anomaly[0]
        compared = weight.mean(-1), F.cosine_similarity(fused, mu, dim=-1), (fused - mu).norm(dim=-1)
        curves.append(torch.cat([anomaly[..., None], *compared], dim=-1).flatten(0, 1).cpu().numpy())
        weights.append(weight.flatten(0, 1).cpu().numpy())
    return np.concatenate(curves), np.concatenate(weights)


def _unsuitable(model: Method) -> UserError:
    return UserError(f"{model.name} does not weigh two modalities by their uncertainty, so there is nothing to analyse")


def sweep(
    model: Method, videos: VideoDataset, device: torch.device, precision: str, levels: Sequence[float], seed: int
) -> tuple[pd.DataFrame, np.ndarray]:
    """Corrupt the image at each level with clean events, then the reverse. Source: released code of IEF-VAD.

    Returns rows (``corrupted``, ``level``, ``sweep_metrics``) of P corruptions, and by how much weights fell (P, 2, D).
    """
    clean, before = observe_videos(model, videos, device, precision)
    rows, changes = [], []
    for index, modality in enumerate(MODALITIES):
        for level in levels:
            corrupt, after = observe_videos(model, videos, device, precision, Corruption(index, level, seed))
            rows.append({"corrupted": modality, "level": level} | sweep_metrics(clean, corrupt))
            changes.append(before - after)
    return pd.DataFrame(rows), np.stack(changes)


def sweep_metrics(clean: pd.DataFrame, corrupt: pd.DataFrame) -> dict[str, float]:
    """Average the effect of a corruption over frames.

    ``brier``: (p_corrupt - truth)²; ``kl``: Bernoulli KL(p_clean ‖ p_corrupt) in nats; ``auc``, ``ap`` and the mean
    weights (``image_weight``, ``image_weight_anomalous``, …) of the corrupted. NaN without such frames.
    """
    before, after = (table["anomaly"].to_numpy(np.float64) for table in (clean, corrupt))
    parts = _parts(corrupt)
    brier = (parts["anomalous"] * (after - 1) ** 2 + parts["normal"] * after**2).sum() / parts["all"].sum()
    metrics = {"brier": float(brier), "kl": _mean(bernoulli_kl(before, after), parts["all"])}
    metrics |= snippet_metrics(after, parts["anomalous"], parts["all"])
    for part, frames in parts.items():
        suffix = "" if part == "all" else f"_{part}"
        metrics |= {f"{name}{suffix}": _mean(corrupt[name], frames) for name in CURVES[:2]}
    return metrics


def bernoulli_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return KL(Bernoulli(p) ‖ Bernoulli(q)) in nats, elementwise, both clipped to [1e-8, 1 - 1e-8]."""
    p, q = (np.clip(values, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR) for values in (p, q))
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def class_averages(table: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Return the mean of every curve of ``observe_videos`` over the frames of each class's videos: all, the anomalous
    and the normal ones by truth. ``classes`` names the class of each video; parts without frames are left out."""
    rows = []
    for name, videos in table.groupby(table["video"].map(dict(enumerate(classes))), sort=False):
        for part, frames in _parts(videos).items():
            if frames.any():
                means = {curve: _mean(videos[curve], frames) for curve in CURVES}
                rows.append({"class": name, "part": part, "frames": int(frames.sum())} | means)
    return pd.DataFrame(rows)


def _parts(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return the frames that averages are taken over."""
    frames, positives = table["frames"].to_numpy(), table["positives"].to_numpy()
    return {"all": frames, "anomalous": positives, "normal": frames - positives}


def _mean(values: Any, frames: np.ndarray) -> float:
    """Average one value per snippet over the frames behind the snippets; NaN without frames."""
    return float(np.asarray(values, dtype=np.float64) @ frames / frames.sum()) if frames.any() else float("nan")


def write_analysis(
    folder: Path,
    model: Method,
    videos: VideoDataset,
    device: torch.device,
    precision: str,
    levels: Sequence[float],
    seed: int,
    limit: int,
) -> str:
    """Analyse a model on test videos, write every table and figure into a folder, and return the sweep as text.

    ``uncertainty.csv`` and ``weight_change_image.csv``, … have a row for each corrupted modality and level; a change of
    each dimension's weight concerns the modality in the file's name.
    """
    # A video of several classes counts for its first, as in the released code of IEF-VAD.
    classes = [videos.dataset.codes(entry.label)[0] for entry in videos.entries]
    table, _ = observe_videos(model, videos, device, precision)
    write_curves(folder / CURVES_FILE, videos, table)
    averages = class_averages(table, classes)
    for name, curves in (("weights_by_class", CURVES[:2]), ("distances", CURVES[2:])):
        _write_table(folder / f"{name}.csv", averages[["class", "part", "frames", *curves]])
    draw_class_bars(folder / "weights_by_class.png", averages, {"weight": "mean weight"})
    distances = {"cosine": "cosine similarity to the fused state", "euclidean": "distance to the fused state"}
    draw_class_bars(folder / "distances.png", averages, distances)
    for name in dict.fromkeys(classes):
        own = [index for index, other in enumerate(classes) if other == name]
        draw_curves(folder / "curves", name, videos, table[table.video.isin(own)], limit)

    points, changes = sweep(model, videos, device, precision, sorted(set(levels)), seed)
    _write_table(folder / "uncertainty.csv", points)
    for modality, change in zip(MODALITIES, changes.swapaxes(0, 1), strict=True):
        dimensions = [points[["corrupted", "level"]], pd.DataFrame(change)]
        _write_table(folder / f"weight_change_{modality}.csv", pd.concat(dimensions, axis=1))
    draw_sweep(folder / "uncertainty.png", points)
    cells = [[row.corrupted, f"{row.level:.2f}", *(f"{row[key]:.4f}" for key in TABLE)] for _, row in points.iterrows()]
    remark = f"level: share of the snippets of an input whose features are multiplied by {ATTENUATION:g}"
    return f"{to_text(Table(['corrupted', 'level', *TABLE.values()], cells))}\n{remark}"


def _write_table(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, na_rep="nan"))


def write_curves(path: Path, videos: VideoDataset, table: pd.DataFrame) -> None:
    """Write all curves by snippet, the videos joined, as one .npz.

    ``videos``, ``labels`` and ``snippets`` hold each video's name, label and length; split a curve by ``snippets``.
    """
    arrays = {
        "videos": np.array([entry.video for entry in videos.entries]),
        "labels": np.array([entry.label for entry in videos.entries]),
        "snippets": np.bincount(table.video, minlength=len(videos.entries)),
    }
    arrays |= {name: table[name].to_numpy() for name in ("anomaly", *CURVES)}
    with atomic_write(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def draw_curves(folder: Path, name: str, videos: VideoDataset, table: pd.DataFrame, limit: int) -> None:
    """Draw ``NAME_0.png`` …: the videos of a table joined, 3000 frames per figure, at most ``limit`` (0: all)."""
    parts = [videos.known_truth.frames[index] for index in table.video.unique()]
    truth, borders = np.concatenate(parts), np.cumsum([len(part) for part in parts])
    edges = np.concatenate([[0], np.cumsum(table.frames)])
    rows = {"anomaly": "anomaly probability", "weight": "mean weight", "cosine": "cosine to fused"}
    rows |= {"euclidean": "distance to fused"}
    starts = range(0, len(truth), CHUNK)
    for number, start in enumerate(starts[:limit] if limit else starts):
        figure, end = Figure(figsize=(12, 8), layout="constrained"), min(start + CHUNK, len(truth))
        figure.suptitle(f"{name}: frames {start} to {end} of its test videos, one after the other")
        shown = slice(np.searchsorted(edges, start, "right") - 1, np.searchsorted(edges, end))
        axes = figure.subplots(len(rows), 1, sharex=True)
        for axis, (curve, title) in zip(axes, rows.items(), strict=True):
            lines = {curve: "#1f4e79"} if curve in table else {f"{kind}_{curve}": COLOURS[kind] for kind in MODALITIES}
            for column, colour in lines.items():
                values, label = table[column].to_numpy()[shown], column.partition("_")[0]
                axis.stairs(values, edges[shown.start : shown.stop + 1], color=colour, baseline=None, label=label)
            for low, high in abnormal_spans(truth[start:end]):
                axis.axvspan(start + low, start + high, color=TRUTH_COLOUR, lw=0, zorder=0)
            for border in borders[(borders > start) & (borders < end)]:
                axis.axvline(border, color="#999999", lw=0.6, ls=":")
            axis.set_ylabel(title, fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set(xlim=(start, end), ylim=(0, 1))
        axes[1].legend(loc="upper right", frameon=False, fontsize=8, ncols=2)
        axes[-1].set_xlabel("frames; shaded: annotated anomaly; dotted line: start of the next video")
        save_figure(figure, folder / f"{name}_{number}.png")


def draw_class_bars(path: Path, averages: pd.DataFrame, curves: Mapping[str, str]) -> None:
    """Draw bars of both modalities per class, over its anomalous and its normal frames.

    ``averages`` come from ``class_averages``; ``curves`` (weight, cosine, euclidean) have a row and a title each.
    """
    figure = Figure(figsize=(15, 3.2 * len(curves) + 1), layout="constrained")
    axes = figure.subplots(len(curves), len(PARTS), sharey="row", squeeze=False)
    for row, (curve, title) in zip(axes, curves.items(), strict=True):
        for axis, part in zip(row, PARTS, strict=True):
            bars = averages[averages.part == part]
            places = np.arange(len(bars))
            for shift, kind in zip((-0.2, 0.2), MODALITIES, strict=True):
                axis.bar(places + shift, bars[f"{kind}_{curve}"], 0.4, color=COLOURS[kind], label=kind)
            axis.set_xticks(places, bars["class"], rotation=35, ha="right", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{title}, {part} frames", fontsize=9, loc="left")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, path)


def draw_sweep(path: Path, points: pd.DataFrame) -> None:
    """Draw ``PANELS`` over the level, a line for each corrupted modality, which is named at the line's end."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        lines = {name: own.set_index("level")[key] for name, own in points.groupby("corrupted", sort=False)}
        # The lower line's name is below its end, the upper one's above, so that they cannot overlap.
        for place, name in zip(("top", "bottom"), sorted(lines, key=lambda name: lines[name].iloc[-1]), strict=True):
            line, font = lines[name], {"color": COLOURS[name], "weight": "bold", "fontsize": 9}
            axis.plot(line, color=COLOURS[name], marker="o", ms=4)
            end = line.index[-1], line.iloc[-1]
            axis.annotate(f"{name}\ndamaged", end, (7, 0), textcoords="offset points", va=place, **font)
        axis.margins(y=0.2)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"share of the snippets of an input whose features are damaged (× {ATTENUATION:g})", fontsize=9)
    save_figure(figure, path)
