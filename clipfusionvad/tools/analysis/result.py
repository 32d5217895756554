"""What an analysis returns, and the files and the text that it becomes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from clipfusionvad.io.files import write_text
from clipfusionvad.tools.analysis.figures import Figure

# pandas is imported by the first table, so that --help is fast.
if TYPE_CHECKING:
    from pandas import DataFrame as DataFrame
else:
    DataFrame = Any

#: Formats of a figure.
FORMATS = ("png", "pdf", "svg")
#: How a missing number is shown.
UNKNOWN = "n/a"


@dataclass(frozen=True)
class AnalysisResult:
    """``numbers`` are written as CSV beside the ``figure``; ``lines`` (a title, a table, a remark) are printed."""

    numbers: DataFrame
    figure: Figure
    lines: list[str]


def make_table(content: Any, columns: Sequence[str] | None = None) -> DataFrame:
    """Return a table of columns by name, or of rows."""
    from pandas import DataFrame

    return DataFrame(content, columns=columns)


def table_text(content: Any, columns: Sequence[str] | None = None) -> str:
    """Return aligned columns: text to the left, numbers with four digits to the right, missing ones as "n/a"."""
    aligned = {}
    for column, cells in make_table(content, columns).items():
        is_text = all(isinstance(cell, str) for cell in cells)
        width = max([len(column), *map(len, cells)]) if is_text else 0
        # The blank keeps columns two apart.
        aligned[f" {column:{width}}"] = cells.str.ljust(width) if is_text else cells
    text = make_table(aligned).to_string(index=False, na_rep=UNKNOWN, float_format="{:.4g}".format)
    return dedent("\n".join(line.rstrip() for line in text.splitlines()))


def write_result(result: AnalysisResult, output: Path, formats: Iterable[str] = ()) -> list[Path]:
    """Write the figure as ``output`` and in further formats, and the numbers as CSV; return the paths."""
    import matplotlib

    from clipfusionvad.report.plots import save_figure

    figures = dict.fromkeys([output, *(output.with_suffix(f".{suffix}") for suffix in formats)])
    # Text stays text, in a font that publishers accept.
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
        for path in figures:
            save_figure(result.figure, path)
    numbers = output.with_suffix(".csv")
    write_text(numbers, result.numbers.to_csv(index=False, lineterminator="\n"))
    return [*figures, numbers]


def branch_names(count: int) -> Sequence[str]:
    """Return the names of a method's scoring branches."""
    return ("coarse branch", "fine branch")[:count] if count <= 2 else [f"branch {n + 1}" for n in range(count)]
