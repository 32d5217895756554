"""RTFM (ICCV 2021, arXiv 2101.10030): robust temporal feature magnitude learning."""

from collections.abc import Mapping

from torch import Tensor

from clipfusionvad.models.base import register_method
from clipfusionvad.models.layers.magnitude import MagnitudeMethod


@register_method
class RTFM(MagnitudeMethod):
    """A temporal block whose rewritten features are the larger, the more anomalous a snippet is."""

    name = "rtfm"

    @classmethod
    def matches_state_dict(cls, state: Mapping[str, Tensor]) -> bool:
        return "Aggregate.conv_1.0.weight" in state and not any(key.startswith("hard_attention.") for key in state)
