"""ClipFusionVAD: VadCLIP's two branches with global attention, Visual Aggregator and Visual Product fusion."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad.io.option import Option
from clipfusionvad.models.base import VADOutput, isolated_rng, register_method
from clipfusionvad.models.clip import ClipWeights
from clipfusionvad.models.layers.dual_branch import DualBranch, GlobalAttentionModule


@register_method
class ClipFusionVAD(DualBranch):
    """The main system.

    Two heads compute a fine view v and a coarse view u of each snippet. The *Visual Aggregator* feeds v + u to the
    coarse classifier. The *Visual Product*, the sum of u weighted by the coarse logits, prompts the class text for v.
    """

    name = "clipfusionvad"

    def __init__(
        self,
        class_prompts: list[str],
        clip: ClipWeights | None,
        *,
        gam: Annotated[bool, Option("global attention module")] = True,
        aggregator: Annotated[bool, Option("Visual Aggregator before the coarse head")] = True,
        **shared: Any,
    ):
        super().__init__(class_prompts, clip, **shared)
        self.aggregator = aggregator
        with isolated_rng("gam"):
            self.gam_attention = GlobalAttentionModule(self.visual_width) if gam else nn.Identity()
        self.head_video, self.u_head_video = (nn.Linear(self.visual_width, self.visual_width) for _ in range(2))

    def forward(self, visual: Tensor, lengths: Tensor | None = None, text: Tensor | None = None) -> VADOutput:
        text = self.encode_once() if text is None else text
        x = self.gam_attention(self.encode_video(visual, lengths))
        v = F.normalize(self.head_video(x), dim=-1)
        u = F.normalize(self.u_head_video(x), dim=-1)
        coarse = self.classifier(x + self.mlp2(v + u if self.aggregator else x))
        classes = text
        if self.product:
            classes = self.fuse(F.normalize(text, dim=-1), F.normalize(coarse.transpose(1, 2) @ u, dim=-1))
        return VADOutput(coarse, self.align(v, classes), text)

    @classmethod
    def matches_state_dict(cls, state: Mapping[str, Tensor]) -> bool:
        return "u_head_video.weight" in state
