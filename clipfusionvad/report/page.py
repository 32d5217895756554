"""HTML pages in one file each: styles, the script and the data are inside, nothing is loaded."""

import os
from functools import cache
from typing import Any
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from clipfusionvad.io.files import without_nan


def render(template: str, **values: Any) -> str:
    """Render a page from a template; every value is escaped, because names of files and classes are foreign text.

    The head of a template lists its values; a missing one raises ``jinja2.UndefinedError``.
    """
    text = _environment().get_template(template).render(**values)
    # A file name may hold bytes that are not text: they become question marks.
    return text.encode("utf-8", "replace").decode("utf-8")


def _json(value: Any) -> Markup:
    """Return compact strict JSON that is safe inside a script element."""
    return htmlsafe_json_dumps(without_nan(value), allow_nan=False, separators=(",", ":"))


def _url(path: str | os.PathLike[str]) -> str:
    """Return a relative path as a link in which every character of the name means itself."""
    return quote(os.fsencode(path).replace(os.sep.encode(), b"/"))


def clock(seconds: float) -> str:
    """Return seconds as 1:02.3 or 1:01:02.3."""
    tenths = round(10 * seconds)
    hours, minutes, rest = tenths // 36000, tenths // 600 % 60, tenths % 600
    head = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{head}:{rest // 10:02}.{rest % 10}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("clipfusionvad.report"), PackageLoader("clipfusionvad.tools.detect")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"json": _json, "url": _url, "clock": clock}
    return environment
