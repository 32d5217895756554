"""Learned class prompts as in CoOp: vectors replace the words before a class name, or the whole text."""

import torch
from torch import Tensor, nn

from clipfusionvad.models.clip import CONTEXT_LENGTH, tokenize
from clipfusionvad.models.layers.text import ClipTextTower, FixedPrompts, PromptLayout

CONTEXT_STD = 0.02


class ContextPrompts(FixedPrompts):
    """``[SOT | context | name . EOT]`` of each class; the context is the parameter ``ctx``.

    ``ctx`` is (C, n, W), or (n, W) where all classes share it. With ``ctx_init``, words joined by "_" or " ",
    n is the number of their tokens and learning starts at their embeddings. Source: CoOp, as AnomalyCLIP uses it.
    """

    def __init__(self, class_names: list[str], tower: ClipTextTower, n_ctx: int, ctx_init: str, shared: bool):
        words = ctx_init.replace("_", " ").strip()
        tokens = tokenize([words])[0]
        n_ctx = int(tokens.argmax()) - 1 if words else n_ctx
        super().__init__(class_names, f"{words or ' '.join(['X'] * n_ctx)} {{}}.")
        ctx = torch.empty(n_ctx, tower.token_embedding.embedding_dim)
        if words:
            ctx.copy_(tower.token_embedding.weight[tokens[1 : n_ctx + 1]])
        if not shared:
            ctx = ctx.repeat(len(class_names), 1, 1)
            self.layout = PromptLayout(self.layout.ends, shared=1)
        self.ctx = nn.Parameter(ctx if words else nn.init.normal_(ctx, std=CONTEXT_STD))

    def embed(self, tower: ClipTextTower, context: Tensor | None = None) -> Tensor:
        words = super().embed(tower)
        first, rest = words[:, :1], words[:, 1 + self.ctx.shape[-2] :]
        return torch.cat([first, self.ctx.expand(len(words), -1, -1), rest], dim=1)

    def around(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings, of all 77, before and after the context, given CLIP's whole table (V, W)."""
        padded = nn.functional.pad(self.tokens, (0, CONTEXT_LENGTH - self.tokens.shape[1]))
        words = embedding[padded.to(embedding.device)]
        return words[:, :1], words[:, 1 + self.ctx.shape[-2] :]


class ClassVectors(nn.Module):
    """No text: a direction ``vectors`` (C, E) for each class is learned in CLIP's space, from a random start."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.vectors = nn.Parameter(nn.init.normal_(torch.empty(classes, width), std=CONTEXT_STD))
