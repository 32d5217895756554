"""HTML pages that need nothing but themselves: styles, scripts and data are in the one file, nothing is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from clipfusionvad.io.files import without_nan


def render(template: str, **values: Any) -> str:
    """A whole page from a template of ``templates/``; every value in it is escaped (file names are foreign text).

    What a template takes stands at its head. A value that it needs and does not get raises
    ``jinja2.UndefinedError``.
    """
    text = _environment().get_template(template).render(**values)
    # Names of files need not be text: what is none is shown as a question mark.
    return text.encode("utf-8", "replace").decode("utf-8")


def figure_html(figure: Mapping[str, Any]) -> str:
    """A Plotly figure in Plotly's own form, ``{"data": [...], "layout": {...}}`` of plain values, for a page.

    A colour may be one of the page's (``"var(--curve-1)"``): it then follows light and dark, as background, text and
    grid do by themselves. The page's template must extend ``base.html.j2`` and set ``plots``.
    """
    return Markup('<div class="plot"><script type="application/json">{}</script></div>').format(_json(dict(figure)))


def _json(value: Any) -> Markup:
    """Compact strict JSON that may stand in a script element, whatever it says."""
    return htmlsafe_json_dumps(without_nan(value), allow_nan=False, separators=(",", ":"))


def _url(path: str | os.PathLike[str]) -> str:
    """A relative path as a link: no character of a file's name means anything else there."""
    return quote(os.fsencode(path).replace(os.sep.encode(), b"/"))


def _clock(seconds: float) -> str:
    """Seconds as 1:02.3 or 1:01:02.3."""
    tenths = round(10 * seconds)
    hours, minutes, rest = tenths // 36000, tenths // 600 % 60, tenths % 600
    head = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{head}:{rest // 10:02}.{rest % 10}"


@cache
def _plotly() -> Markup:
    """Plotly's script for a script element. Importing the Python side of it would take longer than reading it."""
    script = resources.files("plotly").joinpath("package_data").joinpath("plotly.min.js").read_text(encoding="utf-8")
    return Markup(re.sub("</(?=script)", r"<\\/", script, flags=re.IGNORECASE))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("clipfusionvad.report"), PackageLoader("clipfusionvad.tools.detect")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"json": _json, "url": _url, "clock": _clock}
    environment.globals |= {"plotly": _plotly}
    return environment
