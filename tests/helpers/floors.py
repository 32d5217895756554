"""Print constraints that pin every main dependency to the lowest version that pyproject.toml allows.

``--keep NAME``: pin these as requirements.txt does instead.
"""

import argparse
import re
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]


def floors() -> dict[str, str]:
    """Return the lowest version of each package (needs Python 3.11, which can read TOML)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [line for line in project["dependencies"] if "python_version <" not in line]
    found = [re.match(r"([\w.-]+)(?:>=|==)([\w.]+)", line) for line in wanted]
    return {match[1].lower(): match[2] for match in found if match}


def pinned() -> dict[str, str]:
    """The versions of requirements.txt by package."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {match[1].lower(): match[2] for line in lines if (match := re.match(r"([\w.-]+)==([\w.]+)", line))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", nargs="+", default=[], metavar="NAME")
    known = floors() | {name: pinned()[name] for name in parser.parse_args().keep}
    print("\n".join(f"{name}=={version}" for name, version in known.items()))


if __name__ == "__main__":
    main()
