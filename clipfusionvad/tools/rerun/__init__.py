"""Repeat a run from its record: what has changed since then, and whether the numbers agree."""

from dataclasses import dataclass
from typing import Annotated

from clipfusionvad.io.option import Option

_TOLERANCE = "how far apart numbers may be where equal bits cannot be expected (default: 0.001)"


@dataclass(frozen=True)
class RerunOptions:
    """How a run is repeated."""

    output_dir: Annotated[str | None, Option("folder of the repetition (default: RUN_rerun)")] = None
    device: Annotated[str | None, Option("another device than that of the run")] = None
    anyway: Annotated[bool, Option("also where the data has changed or files are missing")] = False
    tolerance: Annotated[float, Option(_TOLERANCE, above=0)] = 1e-3
