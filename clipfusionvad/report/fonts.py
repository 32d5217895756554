"""Fonts for letters that matplotlib's own font lacks: names in Chinese, Japanese, Korean and other scripts."""

import contextlib
import warnings
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def drawing(figure: "Figure") -> Iterator[None]:
    """Draw a figure with names as they are, without the library's warnings.

    Letters that the chosen font lacks come from an installed one, and "$" starts no formula.
    """
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for axis in figure.findobj(Axis):
            axis.get_ticklabels()  # makes their texts
        texts = figure.findobj(Text)
        fonts = fonts_for("".join(sorted({letter for text in texts for letter in text.get_text()})))
        for text in texts:
            if fonts:
                text.set_fontfamily([*text.get_fontfamily(), *fonts])
            # Powers on logarithmic axes are formulas of the library.
            if "mathdefault" not in text.get_text():
                text.set_parse_math(False)
        yield


@cache
def fonts_for(letters: str) -> tuple[str, ...]:
    """Return the families of installed fonts that have the letters which matplotlib's own font lacks."""
    from matplotlib.font_manager import findfont, findSystemFonts, fontManager, get_font

    own = get_font(findfont("DejaVu Sans"))
    missing = {ord(letter) for letter in letters if not own.get_char_index(ord(letter))}
    families: list[str] = []
    if not missing:
        return ()
    # matplotlib remembers the fonts that it found when it first ran. It cannot draw those of bitmaps.
    for path in sorted(set(findSystemFonts()) - {entry.fname for entry in fontManager.ttflist}):
        with contextlib.suppress(OSError, RuntimeError):
            fontManager.addfont(path)
    for entry in sorted(fontManager.ttflist, key=lambda entry: ("Sans" not in entry.name, entry.name)):
        # matplotlib's font of boxes has all letters.
        if not missing or entry.name.startswith("Last Resort"):
            continue
        # A font may have been removed since matplotlib listed it.
        with contextlib.suppress(OSError, RuntimeError):
            font = get_font(entry.fname)
            if found := {letter for letter in missing if font.get_char_index(letter)}:
                families.append(entry.name)
                missing -= found
    return tuple(families)


@cache
def font_file(text: str) -> str:
    """Return the file of an installed font for a text, for libraries that do not combine fonts."""
    from matplotlib.font_manager import findfont

    return str(findfont([*fonts_for(text), "DejaVu Sans"][0]))
