"""Many trainings as one: what they differ in, running them, and the tables of their results."""

from dataclasses import dataclass
from typing import Annotated

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option
from clipfusionvad.tools.tables import FULL


@dataclass(frozen=True)
class SweepOptions:
    """How the settings of a sweep are trained."""

    seeds: Annotated[tuple[int, ...], Option("how many seeds, or which ones", minimum=0, metavar="N")] = (3,)
    output_dir: Annotated[str, Option("folder of all its runs")] = "runs/sweep"
    jobs: Annotated[int, Option("trainings at a time; each takes the next GPU", minimum=1)] = 1
    engine: Annotated[str, Option("ray: on a Ray cluster", choices=("local", "ray"))] = "local"
    ray_address: Annotated[
        str | None, Option("its address, or auto; without: Ray on this machine", metavar="HOST:PORT")
    ] = None
    full: Annotated[bool, Option(f"also train '{FULL}', with nothing changed")] = True
    overwrite: Annotated[bool, Option("train again what is finished already")] = False

    def seeds_from(self, first: int) -> list[int]:
        """Return several seeds as given; a single number as that many seeds from ``first`` on, in steps of ten."""
        seeds = list(self.seeds)
        if len(seeds) == 1:
            seeds = [first + 10 * number for number in range(seeds[0])]
        if not seeds or len(set(seeds)) < len(seeds):
            raise UserError("--seeds takes a number of at least 1, or several different seeds")
        return seeds
