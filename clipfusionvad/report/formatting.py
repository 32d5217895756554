"""Tables of text: one form of a table, rendered as plain text, Markdown or LaTeX."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "→": r"$\to$",
    "−": "$-$", "–": "--", "…": r"\ldots{}", "<": r"\textless{}", ">": r"\textgreater{}",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table of strings. The first ``labels`` columns name the row and are aligned left, the others hold numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    labels: int = 1
    note: str = ""


def to_text(table: Table) -> str:
    """Render as plain text for a terminal: columns separated by spaces, no title."""
    return _tabulate([list(map(_clean, line)) for line in (table.header, *table.rows)], table.labels, "plain")


def to_markdown(table: Table, width: int | None = None) -> str:
    """Render as Markdown with title and note; one wider than ``width`` characters becomes several with its labels."""
    lines = [[_clean(cell).replace("|", "\\|") for cell in line] for line in (table.header, *table.rows)]
    # The renderer pads a cell with 3 characters, and a header with 2 more.
    widths = [max(len(head) + 2, *map(len, cells), 3) + 3 for head, *cells in zip(*lines, strict=True)]
    labels, parts = range(table.labels), [list[int]()]
    for column in range(table.labels, len(widths)):
        if width and parts[-1] and 1 + sum(widths[i] for i in (*labels, *parts[-1], column)) > width:
            parts.append([])
        parts[-1].append(column)
    blocks: list[str] = []
    for part in parts:
        if table.title:
            blocks.append(f"**{table.title}{' (continued)' if blocks else ''}**")
        blocks.append(_tabulate([[line[i] for i in (*labels, *part)] for line in lines], table.labels, "pipe"))
    return "\n\n".join([*blocks, *([table.note] if table.note else [])]) + "\n"


def to_latex(table: Table) -> str:
    """Render as a LaTeX table for the package booktabs; names and signs are escaped."""
    import pandas as pd

    # Numbered columns: two may have the same name.
    frame = pd.DataFrame([[escape_latex(cell) for cell in row] for row in table.rows])
    text: str = frame.to_latex(
        header=[escape_latex(name) for name in table.header],
        index=False,
        escape=False,
        column_format="l" * table.labels + "r" * (len(table.header) - table.labels),
        caption=escape_latex(". ".join(filter(None, (table.title, table.note)))),
    )
    return text.replace("\n", "\n\\centering\n", 1)


def escape_latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in _clean(text))


def _tabulate(lines: Sequence[Sequence[str]], labels: int, form: str) -> str:
    from tabulate import tabulate

    header, *rows = lines
    align = ["left"] * labels + ["right"] * (len(header) - labels) if rows else None
    # Numbers are formatted already, and the indent of a label has a meaning.
    text: str = tabulate(rows, header, form, disable_numparse=True, preserve_whitespace=True, colalign=align)
    return text


def _clean(text: str) -> str:
    """Text in one line, without characters that a terminal would act on."""
    return "".join(sign if sign.isprintable() else "?" for sign in re.sub(r"\s", " ", text))
