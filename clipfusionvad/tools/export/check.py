"""Whether an exported graph gives what the model gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipfusionvad.io.errors import UserError
from clipfusionvad.models import Method
from clipfusionvad.tools.export.graph import Run
from clipfusionvad.tools.export.scorer import VideoScorer, made_up_video, score_by_method

#: By how much a probability may differ.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Checked:
    """The largest difference of each output over made-up videos of so many snippets."""

    lengths: tuple[int, ...]
    largest: dict[str, float]

    def __str__(self) -> str:
        found = ", ".join(f"{name} {value:.1e}" for name, value in self.largest.items())
        return f"largest difference from PyTorch on videos of {', '.join(map(str, self.lengths))} snippets: {found}"


def check_graph(run: Run, scorer: VideoScorer, method: Method) -> Checked:
    """Compare on videos shorter and longer than one and two windows; ``UserError`` where a score differs."""
    window = scorer.sampling.length
    lengths = tuple(sorted({1, window - 1, window, window + 1, 2 * window, 2 * window + 3} - {0}))
    largest: dict[str, float] = {}
    for count in lengths:
        streams = [stream.numpy() for stream in made_up_video(method, count, seed=count)]
        found, wanted = run(dict(zip(scorer.inputs, streams, strict=True))), score_by_method(method, streams)
        for name, difference in _differences(found, wanted, count).items():
            largest[name] = max(largest.get(name, 0.0), difference)
    return Checked(lengths, largest)


def _differences(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], count: int) -> dict[str, float]:
    shapes = [{name: value.shape for name, value in outputs.items()} for outputs in (found, wanted)]
    if shapes[0] != shapes[1]:
        raise UserError(f"the exported graph gives {shapes[0]} for {count} snippets, not {shapes[1]}: nothing written")
    differences = {name: float(np.abs(found[name] - value).max()) for name, value in wanted.items()}
    for name, difference in differences.items():
        # Written so that NaN is refused.
        if not difference <= TOLERANCE:
            raise UserError(
                f"the exported graph's {name} differs from PyTorch's by {difference:.1e} on a video of {count} "
                f"snippets, more than {TOLERANCE:.0e}: nothing written"
            )
    return differences
