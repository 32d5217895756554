"""Learned prompts: words near the learned vectors, and cosines between the classes' texts.

n learned vectors, C classes, V words of CLIP's vocabulary, W width of its text tower, R random vectors.
"""

from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option
from clipfusionvad.models.base import TextMethod
from clipfusionvad.models.clip import token_words
from clipfusionvad.tools.analysis import figures
from clipfusionvad.tools.analysis.result import AnalysisResult, DataFrame, make_table, table_text
from clipfusionvad.tools.analysis.view import LoadedModel

WORDS = 3
RANDOM = 256
# A vector counts as near a word if at most this share of random vectors is as near to any.
CHANCE = 0.05
# Columns of the printed table and their titles.
SHOWN = {"class": "class", "position": "vector", "nearest": "nearest", "cosine": "cosine"}
SHOWN |= {"random_as_near": "random as near", "nearest_distance": "distance", "random_distance": "of random"}


def nearest_words(
    context: Tensor, table: Tensor, labels: list[str], count: int = WORDS, seed: int = 0
) -> tuple[DataFrame, np.ndarray]:
    """Compare learned vectors (n, W), or (C, n, W) of each class, with all words (V, W).

    Returns a row for each vector: its class ("all" if shared) and position, its norm, the tokens of highest cosine,
    their cosines, the Euclidean distance to the nearest word, the share of random directions that are as near to a
    word (``random_as_near``), and the median distance of random vectors of the same norm (``random_distance``). The
    second result is the highest cosine of each random direction with any word, in rising order (R,).
    """
    vectors = context.detach().float().flatten(0, -2)
    table = table.detach().float()
    names = labels if context.dim() == 3 else ["all"]
    directions = F.normalize(table, dim=-1)
    cosine, tokens = (F.normalize(vectors, dim=-1) @ directions.T).topk(count, dim=-1)
    generator = torch.Generator().manual_seed(seed)
    drawn = F.normalize(torch.randn(RANDOM, vectors.shape[1], generator=generator), dim=-1).to(table.device)
    random_cosine = np.sort((drawn @ directions.T).amax(dim=-1).cpu().numpy())
    projected, squares = drawn @ table.T, table.square().sum(dim=-1)
    norms = vectors.norm(dim=-1)
    # One at a time: all at once would be n · R · V numbers.
    away = [(squares + norm**2 - 2 * norm * projected).amin(dim=-1).clamp(min=0).sqrt().median() for norm in norms]
    below = np.searchsorted(random_cosine, cosine[:, 0].cpu().numpy(), side="left")
    places = [(name, place) for name in names for place in range(1, context.shape[-2] + 1)]
    rows = make_table(places, ["class", "position"]).assign(
        norm=norms.tolist(),
        tokens=tokens.tolist(),
        cosine=cosine.tolist(),
        nearest_distance=torch.cdist(vectors, table).amin(dim=-1).tolist(),
        random_as_near=1 - below / RANDOM,
        random_distance=torch.stack(away).tolist(),
    )
    return rows, random_cosine


def class_similarity(text: Tensor) -> np.ndarray:
    """Return the cosines between the text features (C, E) of the classes, (C, C)."""
    unit = F.normalize(text.detach().float(), dim=-1)
    return (unit @ unit.T).cpu().numpy()


def draw_prompts(
    vectors: DataFrame | None, random_cosine: np.ndarray, similarity: np.ndarray, prompts: list[str]
) -> figures.Figure:
    """Draw how near each learned vector and random ones are to their nearest word, and the cosines of the classes."""
    size = 0.33 * len(prompts) + 2.6
    if vectors is None:
        figure = figures.new_figure(size + 0.6, size)
        axis = figure.subplots()
    else:
        # A row for each class, or for each vector if all classes share them.
        shared = (vectors["class"] == "all").all()
        rows = vectors["position"].astype(str) if shared else vectors["class"]
        figure = figures.new_figure(size + 6.2, max(size, min(0.22 * rows.nunique(), 9) + 1.6))
        words, axis = figure.subplots(1, 2, width_ratios=(5.4, size))
        words.set_ylabel("learned vector" if shared else "class (a dot for each of its vectors)")
        _draw_words(words, vectors, rows, random_cosine)
    lowest = min(0.0, float(similarity.min()))
    image = figures.draw_matrix(axis, similarity, prompts, prompts, cmap="viridis", vmin=lowest, vmax=1)
    axis.set_title("cosine of the classes' texts", fontsize=10, loc="left")
    figure.colorbar(image, ax=axis, shrink=0.6)
    return figure


def _draw_words(axis: figures.Axes, vectors: DataFrame, rows: DataFrame, random_cosine: np.ndarray) -> None:
    low, middle, high = np.quantile(random_cosine, [CHANCE, 0.5, 1 - CHANCE])
    axis.axvspan(low, high, color=figures.TRUTH_COLOUR, lw=0, label="random vectors: 90 %, median", zorder=0)
    axis.axvline(middle, color=figures.TRUTH_BAR, lw=1, zorder=0)
    cosine, names = vectors["cosine"].str[0], rows.unique().tolist()
    places = rows.map(names.index)
    axis.plot(cosine, places, "o", color=figures.COARSE_COLOUR, ms=5, alpha=0.7, mew=0)
    for place, best in enumerate(cosine.groupby(places).idxmax()):
        text = ", ".join(token_words(vectors["tokens"][best])).replace("$", "")
        # Letters that every font of matplotlib has; "$" would start a formula.
        text = "".join(letter if letter.isprintable() and ord(letter) < 0x2100 else "?" for letter in text)
        axis.text(cosine[best], place, f"   {text}", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(min(low, cosine.min()) * 0.9, max(high, cosine.max()) * 1.45)
    axis.set_xlabel("cosine with the nearest word of CLIP")
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figures.hide_spines(axis)


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
    off = similarity[first, second]
    pairs = make_table({"class": [f"cosine of {labels[i]}" for i in first], "position": [labels[i] for i in second]})
    header = ["class", "position", "word", "rank", "norm", "nearest_distance", "random_as_near", "cosine"]
    numbers = pairs.assign(cosine=off.astype(np.float64)).reindex(columns=header)
    lines, vectors, random_cosine = ["the prompts are fixed: no vector in them was learned"], None, np.zeros(0)
    if context is not None:
        table = model.get_parameter("clipmodel.token_embedding.weight")
        vectors, random_cosine = nearest_words(context, table, labels, words)
        vectors["word"] = vectors["tokens"].map(token_words)
        by_word = vectors.assign(rank=[range(1, words + 1)] * len(vectors)).explode(["word", "rank", "cosine"])
        numbers = pd.concat([by_word[header].astype(object), numbers.astype(object)])
        # The ten vectors that are nearest to a word.
        shown = vectors.assign(nearest=vectors["word"].str.join(", "), cosine=vectors["cosine"].str[0])
        shown = shown.sort_values("cosine", ascending=False, kind="stable")[:10]
        near = int((vectors["random_as_near"] <= CHANCE).sum())
        lines = [
            table_text(shown[[*SHOWN]].rename(columns=SHOWN)),
            f"{near} of {len(vectors)} learned vectors are nearer to a word than 95 % of random vectors; the words of "
            f"the others mean nothing",
        ]
    most = off.argmax()
    lines.append(
        f"cosines between classes: mean {off.mean():.3f}, from {off.min():.3f} to {off.max():.3f} "
        f"({labels[first[most]]} and {labels[second[most]]})"
    )
    return AnalysisResult(numbers, draw_prompts(vectors, random_cosine, similarity, labels), lines)
