"""What a trained model costs: its size, and the work and time of scoring one video."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipfusionvad.models import Method

#: Snippets of the video.
SNIPPETS = 256
_ROUNDS = 9
NOTE = (
    f"parameters: millions that are trained, without CLIP's; MMACs: 1e6 multiply-accumulates of a test video of "
    f"{SNIPPETS} snippets, CLIP not counted; ms: milliseconds of it, the median of {_ROUNDS} on this machine"
)


@dataclass(frozen=True)
class Cost:
    """Trained parameters, multiply-accumulates and milliseconds of a video of ``SNIPPETS`` snippets."""

    parameters: int
    macs: int
    milliseconds: float

    def columns(self) -> list[str]:
        return [f"{self.parameters / 1e6:.2f}", f"{self.macs / 1e6:.1f}", f"{self.milliseconds:.1f}"]


COLUMNS = ["parameters", "MMACs", "ms"]


def cost_of(model: Method, state: Mapping[str, Tensor]) -> Cost:
    """Measure a model that only scores; ``state`` is what its file stores, parts that only train included."""
    buffers = dict(model.named_buffers())
    shape = SNIPPETS, len(model.streams) * model.feature_width
    video = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    # The counter does not know the fused attention of every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.score_video(video)
    taken = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        model.score_video(video)
        taken.append(1000 * (time.perf_counter() - start))
    parameters = sum(value.numel() for name, value in state.items() if name not in buffers)
    return Cost(parameters, counter.get_total_flops() // 2, median(taken))
