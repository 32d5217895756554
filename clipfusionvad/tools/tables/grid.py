"""Tables of text, written as Markdown, LaTeX or for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "→": r"$\to$",
    "−": "$-$", "–": "--", "…": r"\ldots{}", "<": r"\textless{}", ">": r"\textgreater{}",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """A titled table. The first ``labels`` columns name the row and are set flush left, the others hold numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 1
    note: str = ""


def markdown(grid: Grid) -> str:
    """As Markdown, columns aligned for reading as text too."""
    table = [_plain(row) for row in (grid.header, *grid.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    rule = ["-" * width if i < grid.labels else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [_line(row, widths, grid.labels) for row in (table[0], rule, *table[1:])]
    return "\n".join([f"**{grid.title}**", "", *lines, *(["", grid.note] if grid.note else [])]) + "\n"


def fitted(grid: Grid, width: int) -> str:
    """As Markdown for a terminal: a table wider than ``width`` characters goes on below, with its labels repeated."""
    return "\n".join(markdown(part) for part in _split(grid, width))


def latex(grid: Grid) -> str:
    """As a LaTeX table for the package booktabs; names and signs are escaped."""
    columns = "l" * grid.labels + "r" * (len(grid.header) - grid.labels)
    body = [" & ".join(map(escape, row)) + r" \\" for row in (grid.header, *grid.rows)]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape('. '.join(filter(None, (grid.title, grid.note))))}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        body[0],
        r"\midrule",
        *body[1:],
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(sign, sign) for sign in _clean(text))


def _split(grid: Grid, width: int) -> Iterator[Grid]:
    """The columns in parts that are no wider than that, if a single one can be."""
    columns = list(zip(*(_plain(row) for row in (grid.header, *grid.rows)), strict=True))
    widths = [max(3, *map(len, column)) + 3 for column in columns]
    fixed = 1 + sum(widths[: grid.labels])
    parts: list[list[int]] = [[]]
    for column in range(grid.labels, len(columns)):
        if parts[-1] and fixed + sum(widths[i] for i in (*parts[-1], column)) > width:
            parts.append([])
        parts[-1].append(column)
    for number, part in enumerate(parts):
        kept = [*range(grid.labels), *part]
        yield Grid(
            grid.title + (" (continued)" if number else ""),
            tuple(grid.header[i] for i in kept),
            tuple(tuple(row[i] for i in kept) for row in grid.rows),
            grid.labels,
            grid.note if number == len(parts) - 1 else "",
        )


def _line(cells: Sequence[str], widths: Sequence[int], labels: int) -> str:
    padded = [
        cell.ljust(width) if i < labels else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "| " + " | ".join(padded) + " |"


def _plain(row: Sequence[str]) -> list[str]:
    return [_clean(cell).replace("|", "\\|") for cell in row]


def _clean(text: str) -> str:
    """In one line, without what a terminal would act on."""
    return "".join(sign if sign.isprintable() else "?" for sign in re.sub(r"\s", " ", text))
