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
    """Render as Markdown with title and note; ends with a line break.

    Given a ``width`` in characters, a wider table is split into several, each with the labels repeated.
    """
    lines = [[_clean(cell).replace("|", "\\|") for cell in line] for line in (table.header, *table.rows)]
    parts = _split_columns(lines, table.labels, width) if width else [lines]
    blocks = []
    for number, part in enumerate(parts):
        if table.title:
            blocks.append(f"**{table.title}{' (continued)' if number else ''}**")
        blocks.append(_tabulate(part, table.labels, "pipe"))
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


def _split_columns(lines: Sequence[Sequence[str]], labels: int, width: int) -> list[list[list[str]]]:
    """Split the columns into parts that are at most ``width`` characters wide, where a single one allows it."""
    # The renderer pads a cell with 3 characters, and a header with 2 more.
    widths = [max(len(head) + 2, *map(len, cells), 3) + 3 for head, *cells in zip(*lines, strict=True)]
    parts: list[list[int]] = [[]]
    for column in range(labels, len(widths)):
        if parts[-1] and 1 + sum(widths[:labels]) + sum(widths[i] for i in (*parts[-1], column)) > width:
            parts.append([])
        parts[-1].append(column)
    return [[[line[i] for i in (*range(labels), *part)] for line in lines] for part in parts]


def _tabulate(lines: Sequence[Sequence[str]], labels: int, form: str) -> str:
    from tabulate import tabulate

    align = ["left" if column < labels else "right" for column in range(len(lines[0]))]
    # Numbers are formatted already, and the indent of a label has a meaning.
    text: str = tabulate(
        lines[1:], lines[0], form, disable_numparse=True, preserve_whitespace=True,
        colalign=align if len(lines) > 1 else None,
    )  # fmt: skip
    return text


def _clean(text: str) -> str:
    """Text in one line, without characters that a terminal would act on."""
    return "".join(sign if sign.isprintable() else "?" for sign in re.sub(r"\s", " ", text))
