"""How much a model that fuses image and event trusts each of them, also when one is damaged."""

from dataclasses import dataclass
from typing import Annotated

from clipfusionvad.io.option import Option

LEVELS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class UncertaintyOptions:
    """How the analysis corrupts a modality, and how many figures it draws."""

    levels: Annotated[tuple[float, ...], Option("shares of attenuated positions in an input", minimum=0, maximum=1)] = (
        LEVELS
    )
    sweep_seed: Annotated[int, Option("seed that chooses these positions", minimum=0)] = 0
    curve_pictures: Annotated[int, Option("figures of curves for a class at most; 0: all", minimum=0)] = 10
