"""Where the parity cases are: numbers measured on the original systems, kept outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def parity_dir() -> Path:
    """The folder named by PARITY_DIR, else ``shared/parity`` beside the repository."""
    return Path(os.environ.get("PARITY_DIR") or Path(__file__).parents[3] / "shared" / "parity")


def cases(prefix: str, holding: str = "config.json") -> list[Path]:
    """Case folders whose name starts with ``prefix`` and that hold the file ``holding``, by name."""
    return sorted(path.parent for path in parity_dir().glob(f"{prefix}*/{holding}"))


def each_case(*prefixes: str, holding: str = "config.json") -> pytest.MarkDecorator:
    """Run a test with every such folder as ``case``; where there is none, one skipped test says so."""
    reason = f"no {' or '.join(prefixes)}*/{holding} in {parity_dir()}; name the folder of parity cases in PARITY_DIR"
    nothing = pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))
    found = [pytest.param(path, id=path.name) for prefix in prefixes for path in cases(prefix, holding)]
    return pytest.mark.parametrize("case", found or [nothing], scope="module")
