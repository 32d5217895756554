"""What learned prompts mean: words near the learned vectors, and how alike the classes' texts are.

n learned vectors, C classes, V words of CLIP's vocabulary, W width of its text tower, R random vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from clipfusionvad.io.errors import UserError
from clipfusionvad.models import Method
from clipfusionvad.models.clip import token_words
from clipfusionvad.report.plots import COARSE_COLOUR, TRUTH_COLOUR
from clipfusionvad.tools.analysis.result import Insight, Row, Table, bare

WORDS = 3
RANDOM = 256
# A vector counts as near a word where no more than this share of random vectors is as near to any.
CHANCE = 0.05


@dataclass(frozen=True)
class Nearest:
    """Of each learned vector: its ``classes`` entry ("all" where shared), ``position`` and ``norm`` (n,), the k tokens
    of highest cosine ``tokens`` and their ``cosine`` (n, k), the Euclidean ``distance`` (n,) to the nearest word.

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
    def chance(self) -> np.ndarray:
        """The share of random vectors that are at least as near to their nearest word, (n,)."""
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
    """Cosines between the text features (C, E) of the classes, (C, C)."""
    unit = F.normalize(text.detach().float(), dim=-1)
    return (unit @ unit.T).cpu().numpy()


def draw_prompts(found: Nearest | None, similarity: np.ndarray, labels: list[str]) -> Figure:
    """Left, how near each learned vector is to its nearest word and how near random ones are; right, the classes."""
    rows = 0 if found is None else len(set(found.position if len(set(found.classes)) == 1 else found.classes))
    size = 0.33 * len(labels) + 2.6
    height = max(size, min(0.22 * rows, 9) + 1.6)
    figure = Figure(figsize=(size + (6.2 if rows else 0.6), height), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=(5.4, size), squeeze=False)[0] if rows else [figure.subplots()]
    if found is not None:
        _draw_words(axes[0], found)
    image = axes[-1].imshow(similarity, cmap="viridis", vmin=min(0.0, float(similarity.min())), vmax=1)
    axes[-1].set_xticks(range(len(labels)), labels, rotation=90)
    axes[-1].set_yticks(range(len(labels)), labels)
    axes[-1].set_title("cosine of the classes' texts", fontsize=10, loc="left")
    figure.colorbar(image, ax=axes[-1], shrink=0.6)
    return figure


def _draw_words(axis: Axes, found: Nearest) -> None:
    low, middle, high = np.quantile(found.random_cosine, [CHANCE, 0.5, 1 - CHANCE])
    axis.axvspan(low, high, color=TRUTH_COLOUR, lw=0, label="90 % of random vectors", zorder=0)
    axis.axvline(middle, color="#c4452d", lw=1, zorder=0)
    shared = len(set(found.classes)) == 1
    groups = [str(place) for place in found.position] if shared else found.classes
    names = list(dict.fromkeys(groups))
    for row, name in enumerate(names):
        own = [index for index, group in enumerate(groups) if group == name]
        axis.plot(found.cosine[own, 0], [row] * len(own), "o", color=COARSE_COLOUR, ms=5, alpha=0.7, mew=0)
        best = max(own, key=lambda index: found.cosine[index, 0])
        words = ", ".join(_printable(word) for word in token_words(found.tokens[best].tolist()))
        axis.text(found.cosine[best, 0], row, f"   {words}", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylabel("learned vector" if shared else "class (a dot for each of its vectors)")
    axis.set_ylim(len(names) - 0.4, -0.6)
    reach = max(high, float(found.cosine.max()))
    axis.set_xlim(min(low, float(found.cosine[:, 0].min())) * 0.9, reach * 1.45)
    axis.set_xlabel("cosine with the nearest word of CLIP")
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    bare(axis)


def _printable(word: str) -> str:
    """A word in letters that every font of matplotlib has; "$" would start a formula."""
    return "".join(letter if letter.isprintable() and ord(letter) < 0x2100 else "?" for letter in word).replace("$", "")


def prompts_insight(model: Method, labels: list[str], count: int = WORDS) -> Insight:
    """Words and similarities as table and picture; ``UserError`` for a model that encodes no text."""
    with torch.inference_mode():
        text, context = model.encode_text(), model.context_vectors()
    if not isinstance(text, Tensor):
        raise UserError(f"{model.name} does not read class prompts")
    similarity = class_similarity(text)
    rows: list[Row] = []
    lines = []
    found = None
    if context is None:
        lines.append("the prompts are fixed: nothing in them was learned")
    else:
        table = model.get_parameter("clipmodel.token_embedding.weight")
        found = nearest_words(context, table, labels, count)
        rows = _rows(found)
        near = int((found.chance <= CHANCE).sum())
        lines += [
            _short(found).text(),
            f"{near} of {len(found.position)} learned vectors are nearer to a word than 95 % of random",
        ]
        lines[-1] += " vectors; of the others, the words say nothing"
    off = similarity[~np.eye(len(labels), dtype=bool)]
    row, column = np.unravel_index(np.argmax(similarity - 2 * np.eye(len(labels))), similarity.shape)
    lines.append(
        f"cosines between classes: mean {off.mean():.3f}, from {off.min():.3f} to {off.max():.3f} "
        f"({labels[row]} and {labels[column]})"
    )
    rows += [
        (f"cosine of {first}", second, *[None] * 5, float(similarity[i, j]))
        for i, first in enumerate(labels)
        for j, second in enumerate(labels)
        if i < j
    ]
    header = ("class", "position", "word", "rank", "norm", "nearest_distance", "random_as_near", "cosine")
    return Insight(Table(header, rows), draw_prompts(found, similarity, labels), lines)


def _rows(found: Nearest) -> list[Row]:
    """A row for each vector and each of its nearest words."""
    rows: list[Row] = []
    for index, (name, place) in enumerate(zip(found.classes, found.position, strict=True)):
        for rank, word in enumerate(token_words(found.tokens[index].tolist())):
            numbers = (found.norm[index], found.distance[index], found.chance[index], found.cosine[index, rank])
            rows.append((name, place, word, rank + 1, *map(float, numbers)))
    return rows


def _short(found: Nearest) -> Table:
    """The ten vectors that are nearest to a word."""
    best = np.argsort(-found.cosine[:, 0], kind="stable")[:10]
    rows = [
        (
            found.classes[index],
            found.position[index],
            ", ".join(token_words(found.tokens[index].tolist())),
            float(found.cosine[index, 0]),
            float(found.chance[index]),
            float(found.distance[index]),
            float(found.random_distance[index]),
        )
        for index in best.tolist()
    ]
    return Table(("class", "vector", "nearest", "cosine", "random as near", "distance", "of random"), rows)
