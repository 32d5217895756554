"""Learned prompts: words near the learned vectors, and cosines between the classes' texts.

n learned vectors, C classes, V words of CLIP's vocabulary, W width of its text tower, R random vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option
from clipfusionvad.models.base import TextMethod
from clipfusionvad.models.clip import token_words
from clipfusionvad.tools.analysis.figures import (
    COARSE_COLOUR,
    TRUTH_BAR,
    TRUTH_COLOUR,
    Axes,
    Figure,
    draw_matrix,
    hide_spines,
    new_figure,
)
from clipfusionvad.tools.analysis.result import AnalysisResult, DataFrame, make_table, table_text
from clipfusionvad.tools.analysis.view import LoadedModel

WORDS = 3
RANDOM = 256
# A vector counts as near a word if at most this share of random vectors is as near to any.
CHANCE = 0.05


@dataclass(frozen=True)
class Nearest:
    """The nearest words of n learned vectors.

    ``classes`` (n,) ("all" for shared vectors), ``position`` and ``norm`` (n,) of each vector; the k ``tokens`` of
    highest cosine and their ``cosine`` (n, k); the Euclidean ``distance`` (n,) to the nearest word.

    ``random_cosine`` (R,): the highest cosine with any word of random directions, in rising order;
    ``random_distance`` (n,): how far vectors of random direction and the same norm are from the nearest word, the
    median.
    """

    classes: list[str]
    position: list[int]
    norm: np.ndarray
    tokens: np.ndarray
    cosine: np.ndarray
    distance: np.ndarray
    random_cosine: np.ndarray
    random_distance: np.ndarray

    @property
    def shared(self) -> bool:
        """Whether all classes use the same vectors."""
        return len(set(self.classes)) == 1

    @property
    def groups(self) -> list[str]:
        """The row of the figure in which each vector is drawn: its class, or its position if it is shared."""
        return [str(place) for place in self.position] if self.shared else self.classes

    @property
    def chance(self) -> np.ndarray:
        """Return the share of random vectors that are at least as near to their nearest word, (n,)."""
        below = np.searchsorted(self.random_cosine, self.cosine[:, 0], side="left")
        return 1 - below / len(self.random_cosine)


def nearest_words(context: Tensor, table: Tensor, labels: list[str], count: int = WORDS, seed: int = 0) -> Nearest:
    """Compare learned vectors (n, W), or (C, n, W) of each class, with all words (V, W)."""
    flat = context.detach().float().flatten(0, -2)
    table = table.detach().float()
    names = labels if context.dim() == 3 else ["all"]
    places = range(1, context.shape[-2] + 1)
    directions = F.normalize(table, dim=-1)
    cosine, tokens = (F.normalize(flat, dim=-1) @ directions.T).topk(count, dim=-1)
    generator = torch.Generator().manual_seed(seed)
    drawn = F.normalize(torch.randn(RANDOM, flat.shape[1], generator=generator), dim=-1).to(table.device)
    shadows, squares = drawn @ table.T, table.square().sum(dim=-1)
    norms = flat.norm(dim=-1)
    # One at a time: all at once would be n · R · V numbers.
    away = [(squares + norm**2 - 2 * norm * shadows).amin(dim=-1).clamp(min=0).sqrt().median() for norm in norms]
    return Nearest(
        [name for name in names for _ in places],
        [place for _ in names for place in places],
        norms.cpu().numpy(),
        tokens.cpu().numpy(),
        cosine.cpu().numpy(),
        torch.cdist(flat, table).amin(dim=-1).cpu().numpy(),
        np.sort((drawn @ directions.T).amax(dim=-1).cpu().numpy()),
        torch.stack(away).cpu().numpy(),
    )


def class_similarity(text: Tensor) -> np.ndarray:
    """Return the cosines between the text features (C, E) of the classes, (C, C)."""
    unit = F.normalize(text.detach().float(), dim=-1)
    return (unit @ unit.T).cpu().numpy()


def draw_prompts(found: Nearest | None, similarity: np.ndarray, prompts: list[str]) -> Figure:
    """Draw how near each learned vector and random ones are to their nearest word, and the cosines of the classes."""
    rows = 0 if found is None else len(set(found.groups))
    size = 0.33 * len(prompts) + 2.6
    figure = new_figure(size + (6.2 if rows else 0.6), max(size, min(0.22 * rows, 9) + 1.6))
    axes = figure.subplots(1, 2, width_ratios=(5.4, size), squeeze=False)[0] if rows else [figure.subplots()]
    if found is not None:
        _draw_words(axes[0], found)
    lowest = min(0.0, float(similarity.min()))
    image = draw_matrix(axes[-1], similarity, prompts, prompts, cmap="viridis", vmin=lowest, vmax=1)
    axes[-1].set_title("cosine of the classes' texts", fontsize=10, loc="left")
    figure.colorbar(image, ax=axes[-1], shrink=0.6)
    return figure


def _draw_words(axis: Axes, found: Nearest) -> None:
    low, middle, high = np.quantile(found.random_cosine, [CHANCE, 0.5, 1 - CHANCE])
    axis.axvspan(low, high, color=TRUTH_COLOUR, lw=0, label="90 % of random vectors", zorder=0)
    axis.axvline(middle, color=TRUTH_BAR, lw=1, zorder=0)
    groups = np.array(found.groups)
    names = list(dict.fromkeys(found.groups))
    for row, name in enumerate(names):
        indices = np.flatnonzero(groups == name)
        cosines = found.cosine[indices, 0]
        axis.plot(cosines, np.full(len(indices), row), "o", color=COARSE_COLOUR, ms=5, alpha=0.7, mew=0)
        best = indices[cosines.argmax()]
        words = ", ".join(_printable(word) for word in token_words(found.tokens[best].tolist()))
        axis.text(found.cosine[best, 0], row, f"   {words}", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylabel("learned vector" if found.shared else "class (a dot for each of its vectors)")
    axis.set_ylim(len(names) - 0.4, -0.6)
    reach = max(high, float(found.cosine.max()))
    axis.set_xlim(min(low, float(found.cosine[:, 0].min())) * 0.9, reach * 1.45)
    axis.set_xlabel("cosine with the nearest word of CLIP")
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    hide_spines(axis)


def _printable(word: str) -> str:
    """Return a word in letters that every font of matplotlib has; "$" would start a formula."""
    return "".join(letter if letter.isprintable() and ord(letter) < 0x2100 else "?" for letter in word).replace("$", "")


def prompts(
    loaded: LoadedModel, *, words: Annotated[int, Option("words for each vector", minimum=1)] = WORDS
) -> AnalysisResult:
    """Words near the learned prompts, and similarity of the classes."""
    import pandas as pd

    model, labels = loaded.model, loaded.prompts
    if not isinstance(model, TextMethod):
        raise UserError(f"{model.name} does not read class prompts")
    with torch.inference_mode():
        text, context = model.encode_text(), model.context_vectors()
    similarity = class_similarity(text)
    first, second = np.triu_indices(len(labels), 1)
    pairs = [(f"cosine of {labels[i]}", labels[j], float(similarity[i, j])) for i, j in zip(first, second, strict=True)]
    tables = [make_table(pairs, ["class", "position", "cosine"])]
    lines, found = ["the prompts are fixed: no vector in them was learned"], None
    if context is not None:
        table = model.get_parameter("clipmodel.token_embedding.weight")
        found = nearest_words(context, table, labels, words)
        tables.insert(0, _word_table(found))
        near = int((found.chance <= CHANCE).sum())
        lines = [
            table_text(_nearest_vectors(found)),
            f"{near} of {len(found.position)} learned vectors are nearer to a word than 95 % of random vectors; the "
            f"words of the others mean nothing",
        ]
    off = similarity[first, second]
    most = off.argmax()
    lines.append(
        f"cosines between classes: mean {off.mean():.3f}, from {off.min():.3f} to {off.max():.3f} "
        f"({labels[first[most]]} and {labels[second[most]]})"
    )
    header = ["class", "position", "word", "rank", "norm", "nearest_distance", "random_as_near", "cosine"]
    numbers = pd.concat([table.astype(object) for table in tables]).reindex(columns=header)
    return AnalysisResult(numbers, draw_prompts(found, similarity, labels), lines)


def _word_table(found: Nearest) -> DataFrame:
    """Return a row for each vector and each of its nearest words."""

    rows = []
    for index, (name, place) in enumerate(zip(found.classes, found.position, strict=True)):
        about = float(found.norm[index]), float(found.distance[index]), float(found.chance[index])
        for rank, word in enumerate(token_words(found.tokens[index].tolist())):
            rows.append((name, place, word, rank + 1, *about, float(found.cosine[index, rank])))
    header = ["class", "position", "word", "rank", "norm", "nearest_distance", "random_as_near", "cosine"]
    return make_table(rows, header)


def _nearest_vectors(found: Nearest) -> DataFrame:
    """Return the ten vectors that are nearest to a word."""

    best = np.argsort(-found.cosine[:, 0], kind="stable")[:10]
    return make_table(
        {
            "class": [found.classes[index] for index in best],
            "vector": [found.position[index] for index in best],
            "nearest": [", ".join(token_words(found.tokens[index].tolist())) for index in best],
            "cosine": found.cosine[best, 0].astype(np.float64),
            "random as near": found.chance[best],
            "distance": found.distance[best].astype(np.float64),
            "of random": found.random_distance[best].astype(np.float64),
        }
    )
