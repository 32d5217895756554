"""What an insight gives: named numbers, a picture, and a short table that says the main thing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from clipfusionvad.io.files import write_csv
from clipfusionvad.report.plots import save_figure

#: Formats in which a picture can be written besides the one that its name says.
FORMATS = ("png", "pdf", "svg")
#: How a number that cannot be told is shown.
UNKNOWN = "n/a"
GREY = "#8a8a8a"

Row = tuple[Any, ...]


@dataclass(frozen=True)
class Table:
    """Rows under a header; a cell is text, a number, or NaN or None for what cannot be told."""

    header: tuple[str, ...]
    rows: list[Row]

    def text(self) -> str:
        """Aligned columns: text to the left, numbers with four digits to the right."""
        cells = [[said(cell) for cell in row] for row in self.rows]
        lines = [list(self.header), *cells]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        left = [all(isinstance(row[column], str) for row in self.rows) for column in range(len(self.header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if to_left else cell.rjust(width)
                for cell, width, to_left in zip(line, widths, left, strict=True)
            ).rstrip()
            for line in lines
        )


@dataclass(frozen=True)
class Insight:
    """``numbers`` go beside the ``picture`` into a CSV file; ``lines`` (a title, a table, a remark) are printed."""

    numbers: Table
    picture: Figure
    lines: list[str]


def said(cell: Any) -> str:
    """A cell as a reader sees it."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return UNKNOWN
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def write_insight(insight: Insight, output: Path, formats: Iterable[str] = ()) -> list[Path]:
    """Write the picture as ``output`` and in further formats, the numbers as CSV; returns the files."""
    pictures = dict.fromkeys([output, *(output.with_suffix(f".{suffix}") for suffix in formats)])
    # Text stays text, in a font that publishers take.
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
        for path in pictures:
            save_figure(insight.picture, path)
    numbers = output.with_suffix(".csv")
    rows = [[None if said(cell) == UNKNOWN else cell for cell in row] for row in insight.numbers.rows]
    write_csv(numbers, insight.numbers.header, rows)
    return [*pictures, numbers]


def bare(axis: matplotlib.axes.Axes) -> None:
    """Take away the frame's upper and right line."""
    axis.spines[["top", "right"]].set_visible(False)


def branch_names(count: int) -> Sequence[str]:
    """What the anomaly scores of a method are called."""
    return ("coarse branch", "fine branch")[:count] if count <= 2 else [f"branch {n + 1}" for n in range(count)]
