"""CLIP-TSA (ICIP 2023, arXiv 2212.05136): RTFM on CLIP features, behind a stochastic selection of snippets.

The paper shortens the sequence to the selected snippets. The released code keeps all of them and multiplies each by
the share of random samples in which it is selected.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad.io.option import Option, size
from clipfusionvad.models.base import register_method
from clipfusionvad.models.layers.magnitude import MagnitudeMethod

# Most snippets that the released code selects of a test video.
_MOST_AT_TEST = 1000
# Seed and snippets of the noise of tests; a longer video repeats it.
_TEST_SEED, _TEST_NOISE = 0, 4096


class _SelectedShare(torch.autograd.Function):
    """In how many of S noisy samples a snippet is among the k largest: scores (B, T), noise (B, S, T) → (B, T).

    The gradient is the released estimate, in which sample s adds its selection times n_s · upstream. ``transposed``
    is that of the literature, in which it adds n_s times selection · upstream. Both have the same mean here.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, noise: Tensor, sigma: float, k: Tensor, transposed: bool) -> Tensor:
        selected = select_largest(scores[:, None] + sigma * noise, k)
        ctx.save_for_backward(selected, noise)
        ctx.sigma, ctx.transposed = sigma, transposed
        return selected.mean(dim=1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        selected, noise = ctx.saved_tensors
        left, right = (noise, selected) if ctx.transposed else (selected, noise)
        weights = torch.einsum("bst,bt->bs", right, upstream) / (noise.shape[1] * ctx.sigma)
        return torch.einsum("bst,bs->bt", left, weights), None, None, None, None


def select_largest(values: Tensor, k: Tensor) -> Tensor:
    """Mark the k largest values along the last dim with 1, others with 0; ``k`` is a tensor of one integer."""
    smallest = values.sort(dim=-1, descending=True).values.index_select(-1, k.view(1) - 1)
    return (values >= smallest).to(values.dtype)


class HardAttention(nn.Module):
    """Multiply each snippet by the share of samples that select it: (B, T, D) → (B, T, D)."""

    test_noise: Tensor

    def __init__(self, width: int, share: float, samples: int, sigma: float, transposed: bool):
        super().__init__()
        self.share, self.samples, self.sigma, self.transposed = share, samples, sigma, transposed
        self.scorer = nn.ModuleDict({"fc1": nn.Linear(width, 256), "fc2": nn.Linear(256, 1)})
        noise = torch.randn(samples, _TEST_NOISE, generator=torch.Generator().manual_seed(_TEST_SEED))
        self.register_buffer("test_noise", noise, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.sigmoid(self.scorer["fc2"](F.relu(self.scorer["fc1"](x)))).squeeze(-1).float()
        count = x.shape[1]
        most = count if self.training else _MOST_AT_TEST
        # As tensors: an export traces them for every T.
        k = (torch.full((), count, dtype=torch.float64, device=x.device) * self.share).floor()
        k = k.clamp(min=1).clamp(max=most).long()
        noise = self.noise(scores)
        if torch.is_grad_enabled():
            share = _SelectedShare.apply(scores, noise, self.sigma, k, self.transposed)  # type: ignore[no-untyped-call]
            return x * share[..., None]
        return x * select_largest(scores[:, None] + self.sigma * noise, k).mean(dim=1)[..., None]

    def noise(self, scores: Tensor) -> Tensor:
        """Return standard normal noise (B, S, T): new in training, always the same at test."""
        if self.training:
            return torch.randn(len(scores), self.samples, scores.shape[1], device=scores.device)
        rows = torch.arange(scores.shape[1], device=scores.device) % _TEST_NOISE
        return self.test_noise[:, rows].expand(len(scores), -1, -1)


@register_method
class CLIPTSA(MagnitudeMethod):
    """RTFM with widths in proportion to the features' and a hard attention in front."""

    name = "cliptsa"

    def __init__(
        self,
        classes: int,
        *,
        hard_attention: Annotated[bool, Option("stochastic selection of snippets in front")] = True,
        selected_share: Annotated[
            float, Option("share of the snippets that a sample selects", above=0, maximum=1)
        ] = 0.95,
        samples: Annotated[int, size("noisy samples of the selection")] = 100,
        sigma: Annotated[float, Option("deviation of the selection's noise", minimum=1e-6)] = 0.05,
        transposed_gradient: Annotated[
            bool, Option("gradient of the literature's estimator, not the released one")
        ] = False,
        **shared: Any,
    ):
        super().__init__(classes, **shared)
        attention = HardAttention(self.visual_width, selected_share, samples, sigma, transposed_gradient)
        self.hard_attention = attention if hard_attention else nn.Identity()

    @staticmethod
    def hidden_widths(width: int) -> tuple[int, int]:
        return max(width // 4, 1), max(width // 16, 1)

    def attend(self, visual: Tensor) -> Tensor:
        return self.hard_attention(visual)

    @classmethod
    def matches_state_dict(cls, state: Mapping[str, Tensor]) -> bool:
        return "hard_attention.scorer.fc1.weight" in state

    @classmethod
    def from_released(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Layers for I3D and C3D features, which the released program does not use with CLIP.
        return {key: value for key, value in state.items() if not key.startswith("mlp.")}
