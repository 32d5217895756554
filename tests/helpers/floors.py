"""Print constraints that pin every main dependency to the lowest version that pyproject.toml allows.

``--keep NAME``: pin these as requirements.txt does instead.
"""

import argparse
import re
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]


def versions(lines: list[str]) -> dict[str, str]:
    """The versions that requirements name, the lowest ones, by package."""
    found = [re.match(r"([\w.-]+)(?:>=|==)([\w.]+)", line) for line in lines if "python_version <" not in line]
    return {match[1].lower(): match[2] for match in found if match}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", nargs="+", default=[], metavar="NAME")
    known = versions(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"])
    pinned = versions((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    known |= {name: pinned[name] for name in parser.parse_args().keep}
    print("\n".join(f"{name}=={version}" for name, version in known.items()))


if __name__ == "__main__":
    main()
