"""Tables of text: one form of a table, rendered as plain text, Markdown or LaTeX."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "→": r"$\to$",
    "−": "$-$", "–": "--", "…": r"\ldots{}", "<": r"\textless{}", ">": r"\textgreater{}",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table of strings. The first ``labels`` columns name the row and are aligned left, the others hold numbers.

    In LaTeX, the first of a header's two lines names a group of columns, and a cell's second line is small, below it.
    """

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


def to_latex(table: Table, label: str = "results") -> str:
    """Render as a LaTeX table, at most as wide as the text; names and signs are escaped, the label keeps letters."""
    groups, _, names = zip(*(name.rpartition("\n") for name in table.header), strict=True)
    lines, rules, column = [], "", 1
    if any(groups):
        spans = [(group, len([*own])) for group, own in groupby(groups)]
        lines.append(_latex_row(rf"\multicolumn{{{width}}}{{c}}{{{escape_latex(group)}}}" for group, width in spans))
        for group, width in spans:
            rules += rf"\cmidrule(lr){{{column}-{column + width - 1}}}" if group else ""
            column += width
        lines.append(rules)
    lines += [_latex_row(map(escape_latex, names)), r"\midrule"]
    for row in table.rows:
        upper, _, lower = zip(*(cell.partition("\n") for cell in row), strict=True)
        lines.append(_latex_row(map(escape_latex, upper)))
        if any(lower):
            small = (rf"{{\scriptsize {escape_latex(cell)}}}" if cell else "" for cell in lower)
            lines.append(_latex_row(small) + r"[2pt]")
    caption = escape_latex(". ".join(filter(None, (table.title, table.note))))
    columns = "l" * table.labels + "r" * (len(table.header) - table.labels)
    return "\n".join([
        r"% \usepackage{booktabs, graphicx}; over both columns of a page: table*",
        r"\begin{table}", r"\centering", rf"\caption{{{caption}}}",
        rf"\label{{tab:{re.sub('[^A-Za-z0-9-]+', '-', label)}}}", r"\vspace{4pt}",
        # Only what is wider than the text is made smaller.
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}", "",
    ])  # fmt: skip


def _latex_row(cells: Iterable[str]) -> str:
    text = " & ".join(cells)
    # After the end of a row, TeX would read these signs as an option of it.
    return ("{}" if text.startswith(("[", "*")) else "") + text + r" \\"


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
