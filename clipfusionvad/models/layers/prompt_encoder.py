"""Class prompts of ReFLIP-VAD: learned tokens around the class name, reparameterised by DistilBERT.

C classes, N prompt tokens, W width of CLIP's text tower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipfusionvad.io.errors import UserError
from clipfusionvad.models.clip import CONTEXT_LENGTH, tokenize
from clipfusionvad.models.layers.text import LearnedPrompts, PromptLayout


class MiddlePrompts(LearnedPrompts):
    """N prompt tokens with the class name in their middle: SOT, the first half, the name, the second half, EOT.

    An odd token goes to the second half. ``shared``: all classes have the same prompt tokens.
    Source: section "RL-prompt" of the paper.
    """

    order: Tensor

    def __init__(self, class_prompts: list[str], count: int, shared: bool):
        room = CONTEXT_LENGTH - 1 - int(tokenize(class_prompts).argmax(dim=1).max())
        if count > room:
            raise UserError(f"--prompt-length {count}, but beside the class names CLIP has room for {room} tokens")
        super().__init__(class_prompts, count // 2, count - count // 2)
        if not shared:
            self.layout = PromptLayout(self.layout.ends, shared=1)
        # Positions after EOT have an index too, but nothing attends to them.
        order = self.learned.squeeze(-1).cumsum(dim=1) - 1
        self.register_buffer("order", order.clamp(0, max(count - 1, 0)), persistent=False)

    def place(self, context: Tensor) -> Tensor:
        """context (N, W), or (C, N, W) for prompts of each class → (C, n, W)."""
        rows = torch.arange(len(self.order), device=context.device)[:, None]
        return context.expand(len(rows), -1, -1)[rows, self.order]


class PromptEncoder(nn.Module):
    """φ(p) = p + θ(p), where θ is DistilBERT over the sequence of prompt tokens (paper, RL-prompt).

    Linear layers adapt CLIP's width to DistilBERT's and back (not stated in the paper). The second one starts at zero,
    so that φ starts as the identity. A frozen DistilBERT runs without dropout.
    """

    def __init__(self, distilbert: Any, width: int, length: int, trained: bool):
        super().__init__()
        longest = distilbert.config.max_position_embeddings
        if length > longest:
            raise UserError(f"--prompt-length {length}, but --prompt-encoder reads {longest} tokens")
        self.trained = trained
        self.distilbert = distilbert.requires_grad_(trained)
        self.widen = nn.Linear(width, distilbert.config.dim)
        self.narrow = nn.Linear(distilbert.config.dim, width)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def train(self, mode: bool = True) -> PromptEncoder:
        super().train(mode)
        self.distilbert.train(mode and self.trained)
        return self

    def forward(self, prompts: Tensor) -> Tensor:
        """(N, W) or (C, N, W) → the same shape."""
        sequences = prompts if prompts.dim() == 3 else prompts[None]
        hidden = self.distilbert(inputs_embeds=self.widen(sequences)).last_hidden_state
        return prompts + self.narrow(hidden).view_as(prompts)
