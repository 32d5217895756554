"""VadCLIP (AAAI 2024): dual branch whose visual prompt is weighted by the coarse logits."""

from collections.abc import Mapping

from torch import Tensor

from clipfusionvad.models.base import register_method
from clipfusionvad.models.layers.dual_branch import DualBranch


@register_method
class VadCLIP(DualBranch):
    """The plain dual branch."""

    name = "vadclip"

    @classmethod
    def matches_state_dict(cls, state: Mapping[str, Tensor]) -> bool:
        others = ("u_head_video.weight", "distilbert_model.", "clip_adapter.")
        return "gc1.weight" in state and not any(key.startswith(others) for key in state)
