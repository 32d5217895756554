"""VadCLIP (AAAI 2024): dual branch with a visual prompt made of the coarse logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from clipfusionvad.models.method import VADOutput, register_method
from clipfusionvad.models.parts.dual_branch import DualBranch


@register_method
class VadCLIP(DualBranch):
    """Coarse logits from the visual features; class text plus a visual prompt aligned with them."""

    name = "vadclip"

    def forward(self, visual: Tensor, lengths: Tensor | None = None, text: Tensor | None = None) -> VADOutput:
        text = self.encode_text() if text is None else text
        x = self.encode_video(visual, lengths)
        coarse = self.classifier(x + self.mlp2(x))
        if self.product:
            prompt = F.normalize(coarse.transpose(1, 2) @ x, dim=-1)
            fine = self.align(x, self.fuse(text, prompt))
        else:
            fine = self.align(x, text)
        return VADOutput(coarse, fine, text)

    @classmethod
    def recognises(cls, state: dict[str, Tensor]) -> bool:
        return "gc1.weight" in state and "u_head_video.weight" not in state
