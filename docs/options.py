"""Write the tables of options in docs/methods.md from the declarations: python docs/options.py

A table lies between <!-- options of NAME … --> and <!-- end --> lines; NAME is a method, or the title of a config.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clipfusionvad.cli.options import option_file_of
from clipfusionvad.datasets import DATASETS
from clipfusionvad.engine.config import CONFIGS
from clipfusionvad.io.option import declared_options
from clipfusionvad.models import ModelConfig, find_method, method_names

PAGE = Path(__file__).with_name("methods.md")
SECTION = re.compile(r"(<!-- options of (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
#: Whose values are shown.
SHOWN = [DATASETS["ucf"], DATASETS["xd"]]


def render(text: str) -> str:
    """Return a page with its tables written anew."""
    return SECTION.sub(lambda found: found[1] + table(found[2].split()) + found[3], text)


def table(names: list[str]) -> str:
    methods = [name for name in names if name in method_names()]
    if methods:
        options = {}
        for name in methods:
            options |= find_method(name).declared_options()
        options = {name: found for name, found in options.items() if name not in declared_options(ModelConfig)}
    else:
        methods = [option_file_of(SHOWN[0]).parse_args([]).method]
        options = {name: found for title in names for name, found in declared_options(CONFIGS[title]).items()}
    defaults = {name: values_of(name) for name in methods}
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for name, declared in options.items():
        having = [method for method in methods if name in defaults[method]]
        shown = [defaults[method][name] for method in having]
        others = [f"`{method}`: {value}" for method, value in zip(having, shown, strict=True) if value != shown[0]]
        default = shown[0] + (f" ({', '.join(others)})" if others else "") if shown else "–"
        meaning = declared.option.help
        if declared.option.choices:
            meaning += f" ({', '.join(declared.option.choices)})"
        if 0 < len(having) < len(methods):
            meaning += f"; {', '.join(f'`{method}`' for method in having)} only"
        lines.append(f"| `{declared.flag}` | {default} | {meaning} |".replace("{}", "`{}`"))
    return "\n".join(lines) + "\n"


def values_of(method: str) -> dict[str, str]:
    """Return the values of all options of a method, as text: two where the datasets differ."""
    first, second = (vars(option_file_of(dataset).parse_args(["--method", method])) for dataset in SHOWN)
    return {key: " / ".join(dict.fromkeys(map(as_text, (first[key], second[key])))) for key in first}


def as_text(value: object) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
