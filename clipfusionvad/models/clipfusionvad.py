"""ClipFusionVAD: VadCLIP's two branches with global attention, Visual Aggregator and Visual Product fusion."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad.models.base import VADOutput, own_stream, register_method
from clipfusionvad.models.clip import ClipWeights
from clipfusionvad.models.layers.attention import GlobalAttentionModule
from clipfusionvad.models.layers.dual_branch import DualBranch


@register_method
class ClipFusionVAD(DualBranch):
    """The main system.

    Two heads give each snippet a fine view v and a coarse view u. The *Visual Aggregator* feeds v + u to the
    coarse classifier; the *Visual Product* weighs u with the coarse logits into a visual prompt for the class
    text, with which v is aligned.
    """

    name = "clipfusionvad"

    def __init__(
        self,
        class_prompts: list[str],
        clip: ClipWeights,
        *,
        gam: bool = True,
        aggregator: bool = True,
        **shared: Any,
    ):
        super().__init__(class_prompts, clip, **shared)
        self.aggregator = aggregator
        with own_stream("gam"):
            self.gam_attention = GlobalAttentionModule(self.visual_width) if gam else nn.Identity()
        self.head_video = nn.Linear(self.visual_width, self.visual_width)
        self.u_head_video = nn.Linear(self.visual_width, self.visual_width)

    def forward(self, visual: Tensor, lengths: Tensor | None = None, text: Tensor | None = None) -> VADOutput:
        text = self.encode_once() if text is None else text
        x = self.gam_attention(self.encode_video(visual, lengths))
        v = F.normalize(self.head_video(x), dim=-1)
        u = F.normalize(self.u_head_video(x), dim=-1)
        coarse = self.classifier(x + self.mlp2(v + u if self.aggregator else x))
        if self.product:
            prompt = F.normalize(coarse.transpose(1, 2) @ u, dim=-1)
            fine = self.align(v, self.fuse(F.normalize(text, dim=-1), prompt))
        else:
            fine = self.align(v, text)
        return VADOutput(coarse, fine, text)

    @classmethod
    def add_options(cls, group: argparse._ArgumentGroup) -> None:
        super().add_options(group)
        switch = argparse.BooleanOptionalAction
        group.add_argument("--gam", action=switch, default=True, help="global attention module")
        group.add_argument("--aggregator", action=switch, default=True, help="Visual Aggregator before the coarse head")

    @classmethod
    def recognises(cls, state: Mapping[str, Tensor]) -> bool:
        return "u_head_video.weight" in state
