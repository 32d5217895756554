"""Draw docs/images/architecture.png: how ClipFusionVAD gets from features and class names to scores and losses.

Run from the repository's folder: python docs/images/architecture.py
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

TARGET = Path(__file__).with_suffix(".png")
VISUAL, TEXT, COARSE, FINE, LOSS = "#dce8f5", "#e6efdc", "#c9dbf0", "#fbe3bf", "#f6d3c8"
INK = "#22303c"

# Name: left, lower, width, height, colour, text. Units are inches.
BOXES = {
    "features": (0.2, 3.55, 1.5, 0.8, VISUAL, "CLIP features,\n16 frames a row"),
    "temporal": (2.25, 3.55, 1.55, 0.8, VISUAL, "position, window\ntransformer"),
    "graphs": (4.35, 3.55, 1.5, 0.8, VISUAL, "similarity graph,\ndistance graph"),
    "gam": (6.4, 3.55, 1.3, 0.8, VISUAL, "GAM: channel\nand time gates"),
    "u": (8.2, 4.35, 1.1, 0.6, VISUAL, "coarse view u"),
    "v": (8.2, 2.95, 1.1, 0.6, VISUAL, "fine view v"),
    "aggregator": (10.0, 4.3, 1.6, 0.7, COARSE, "Visual Aggregator\nx + MLP(v + u)"),
    "classifier": (12.2, 4.3, 1.15, 0.7, COARSE, "classifier"),
    "names": (0.2, 0.6, 1.5, 0.8, TEXT, "class names in\nlearned context"),
    "clip": (2.25, 0.6, 1.55, 0.8, TEXT, "CLIP text tower\n(frozen)"),
    "product": (9.6, 0.6, 2.0, 0.8, FINE, "Visual Product\nt + p + MLP(t + p)"),
    "align": (12.2, 1.95, 1.15, 0.8, FINE, "alignment:\ncosine / 0.07"),
    "bce": (14.15, 4.3, 1.75, 0.7, LOSS, "top-k mean,\nbinary cross entropy"),
    "mil": (14.15, 1.95, 1.75, 0.8, LOSS, "top-k mean by class,\ncross entropy"),
    "separation": (4.35, 0.6, 1.75, 0.8, LOSS, "separation of\nnormal from others"),
}
# Points of each arrow, its text, and where that stands.
ARROWS = [
    ([(1.7, 3.95), (2.25, 3.95)], "B×T×D", (1.97, 4.1)),
    ([(3.8, 3.95), (4.35, 3.95)], "B×T×D", (4.07, 4.1)),
    ([(5.85, 3.95), (6.4, 3.95)], "B×T×D", (6.12, 4.1)),
    ([(7.7, 3.95), (7.95, 3.95), (7.95, 4.65), (8.2, 4.65)], "x", (7.82, 4.1)),
    ([(7.95, 3.95), (7.95, 3.25), (8.2, 3.25)], "", (0, 0)),
    ([(9.3, 4.65), (10.0, 4.65)], "B×T×D", (9.65, 4.8)),
    ([(9.3, 3.35), (10.35, 3.35), (10.35, 4.3)], "v", (10.22, 4.02)),
    ([(7.95, 4.65), (7.95, 5.3), (10.8, 5.3), (10.8, 5.0)], "x", (9.4, 5.42)),
    ([(11.6, 4.65), (12.2, 4.65)], "B×T×D", (11.9, 4.8)),
    ([(13.35, 4.65), (14.15, 4.65)], "B×T×1", (13.75, 4.8)),
    ([(12.75, 4.3), (12.75, 3.75), (11.1, 3.75), (11.1, 1.4)], "coarse logits\nweigh u: p, B×1×D", (11.95, 3.35)),
    ([(8.75, 4.35), (8.75, 3.75), (11.1, 3.75)], "u", (9.6, 3.88)),
    ([(9.3, 3.1), (10.6, 3.1), (10.6, 2.35), (12.2, 2.35)], "v, B×T×D", (9.95, 2.95)),
    ([(1.7, 1.0), (2.25, 1.0)], "C×77×W", (1.97, 1.52)),
    ([(3.8, 1.0), (4.35, 1.0)], "t, C×D", (4.07, 1.15)),
    ([(4.07, 1.0), (4.07, 0.3), (8.9, 0.3), (8.9, 1.0), (9.6, 1.0)], "t, C×D", (6.5, 0.42)),
    ([(11.6, 1.0), (12.75, 1.0), (12.75, 1.95)], "B×C×D", (12.15, 1.15)),
    ([(13.35, 2.35), (14.15, 2.35)], "B×T×C", (13.75, 2.5)),
]


def draw() -> Figure:
    """The picture, on a white card that stands out on a dark page too."""
    figure = Figure(figsize=(16.2, 6), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 16.2), ylim=(0, 6))
    axis.axis("off")
    axis.add_patch(
        FancyBboxPatch((0.1, 0.1), 16, 5.8, "round,pad=0,rounding_size=0.2", fc="none", ec="#c5ccd3", lw=1.5)
    )
    for left, lower, width, height, colour, text in BOXES.values():
        shape = FancyBboxPatch((left, lower), width, height, "round,pad=0,rounding_size=0.08", fc=colour, ec=INK, lw=1)
        axis.add_patch(shape)
        axis.text(left + width / 2, lower + height / 2, text, ha="center", va="center", fontsize=10.5, color=INK)
    for points, text, place in ARROWS:
        across, up = zip(*points, strict=True)
        axis.plot(across[:-1], up[:-1], color=INK, lw=1.3, solid_joinstyle="miter")
        axis.annotate(
            "", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.3, "shrinkA": 0}
        )
        axis.text(*place, text, ha="center", va="center", fontsize=9, color="#51606d")
    titles = {"video": (0.25, 4.65), "text": (0.25, 1.7)}
    for title, place in titles.items():
        axis.text(*place, title, fontsize=12, weight="bold", color=INK)
    axis.text(12.2, 5.2, "coarse branch: σ is the anomaly score", fontsize=11, weight="bold", color=INK)
    axis.text(
        12.2,
        0.6,
        "fine branch: softmax over C classes,\n1 − P(normal) is its anomaly score",
        fontsize=11,
        weight="bold",
        color=INK,
        va="center",
        ha="left",
    )
    legend = "B videos · T snippets · D feature width · C classes · W width of CLIP's text tower"
    axis.text(8.1, 5.68, legend, ha="center", va="center", fontsize=9.5, color="#51606d")
    return figure


if __name__ == "__main__":
    draw().savefig(TARGET, dpi=100)
    print(TARGET)
