"""VadCLIP (AAAI 2024): dual branch with a visual prompt made of the coarse logits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from clipfusionvad.models.base import register_method
from clipfusionvad.models.layers.dual_branch import DualBranch


@register_method
class VadCLIP(DualBranch):
    """The plain dual branch."""

    name = "vadclip"

    @classmethod
    def recognises(cls, state: Mapping[str, Tensor]) -> bool:
        more = ("u_head_video.weight", "distilbert_model.")
        return "gc1.weight" in state and not any(key.startswith(more) for key in state)
