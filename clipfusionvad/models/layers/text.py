"""Class prompts, hand-written or with learned context, and CLIP's frozen text tower that encodes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option
from clipfusionvad.models.clip import CONTEXT_LENGTH, ClipWeights, tokenize
from clipfusionvad.models.layers.transformer import Transformer, split_heads

PromptKind = Annotated[str, Option("learned context around the name, or a template", choices=("learned", "fixed"))]
PromptTemplate = Annotated[str, Option("template of fixed prompts, e.g. 'a video of {}'")]


class ClipTextTower(nn.Module):
    """CLIP's text transformer with OpenAI's parameter names, frozen, in float32."""

    def __init__(self, clip: ClipWeights):
        super().__init__()
        state, width = clip.state, clip.text_width
        numbers = (re.match(r"transformer\.resblocks\.(\d+)\.", key) for key in state)
        layers = 1 + max((int(number[1]) for number in numbers if number), default=0)
        self.token_embedding = nn.Embedding(*state["token_embedding.weight"].shape)
        self.positional_embedding = nn.Parameter(torch.empty_like(state["positional_embedding"], dtype=torch.float32))
        self.transformer = Transformer(width, layers, heads=max(1, width // 64))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty_like(state["text_projection"], dtype=torch.float32))
        own = self.state_dict()
        missing = [key for key in own if key not in state or state[key].shape != own[key].shape]
        if missing:
            raise UserError(f"CLIP {clip.source} does not fit OpenAI's layout at {missing[0]}")
        self.load_state_dict({key: state[key] for key in own})
        self.requires_grad_(False)

    def forward(self, embeddings: Tensor, layout: PromptLayout, projection: Tensor | None = None) -> Tensor:
        """Token embeddings of prompts (C, n, W) → text features (C, E); ``projection`` (W, E) replaces CLIP's own."""
        return self.hidden(embeddings, layout) @ (self.text_projection if projection is None else projection)

    def hidden(self, embeddings: Tensor, layout: PromptLayout, adapters: Sequence[nn.Module] = ()) -> Tensor:
        """Return what is projected, (C, W). The output (P, W) of each of the first blocks passes its adapter."""
        x = (embeddings + self.positional_embedding[: embeddings.shape[1]]).flatten(0, 1).index_select(0, layout.taken)
        for number, block in enumerate(self.transformer.resblocks):
            x = block(x, layout.attend)
            x = adapters[number](x) if number < len(adapters) else x
        return self.ln_final(x[layout.last])


class PromptLayout(nn.Module):
    """Which tokens of C prompts are computed, as one row of P tokens.

    CLIP's text attention is causal, so tokens after a prompt's EOT change nothing, and the first ``shared`` tokens, the
    same in all prompts, are computed once. The row holds them first, then the others of each prompt up to its EOT.
    """

    ends: Tensor
    taken: Tensor
    last: Tensor
    places: Tensor
    kept: Tensor
    visible: Tensor

    def __init__(self, ends: Tensor, shared: int = 0):
        """ends (C,): position of each EOT. At most the tokens before the first EOT can be shared."""
        super().__init__()
        self.shared = min(shared, int(ends.min()))
        columns = torch.arange(int(ends.max()) + 1)
        own = columns[self.shared :] <= ends[:, None]
        taken = (columns <= ends[:, None]) & (columns >= self.shared)
        taken[0, : self.shared] = True
        counts = own.sum(dim=1)
        # Padding may be any token: it comes after EOT, to which nothing attends.
        places = torch.zeros(own.shape, dtype=torch.long)
        places[own] = torch.arange(int(counts.sum()))
        self.register_buffer("ends", ends, persistent=False)
        self.register_buffer("taken", taken.flatten().nonzero().squeeze(1), persistent=False)
        self.register_buffer("last", self.shared + counts.cumsum(0) - 1, persistent=False)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("kept", own.flatten().nonzero().squeeze(1), persistent=False)
        self.register_buffer("visible", columns <= columns[self.shared :, None], persistent=False)

    def attend(self, qkv: Tensor, heads: int) -> Tensor:
        """Causal attention of each prompt to itself: (P, 3W) → (P, W)."""
        first = qkv[: self.shared]
        own = qkv[self.shared :].index_select(0, self.places.flatten()).view(*self.places.shape, -1)
        q, k, v = split_heads(first, heads)
        own_q, own_k, own_v = split_heads(own, heads)
        seen_k, seen_v = (torch.cat([a.expand(len(b), -1, -1, -1), b], dim=2) for a, b in ((k, own_k), (v, own_v)))
        own = F.scaled_dot_product_attention(own_q, seen_k, seen_v, attn_mask=self.visible)
        own = own.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, self.kept)
        if not self.shared:
            return own
        first = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.cat([first.transpose(0, 1).flatten(1), own])


class Prompts(nn.Module):
    """Class prompts: token embeddings (``embed``) and where they end (``layout``)."""

    layout: PromptLayout
    tokens: Tensor
    #: Which tokens are learned, (C, n, 1).
    learned: Tensor

    def embed(self, tower: ClipTextTower, context: Tensor | None = None) -> Tensor:
        """Return the token embeddings (C, n, W) up to the last EOT; ``context`` are learned tokens."""
        return tower.token_embedding(self.tokens)

    def forward(self, tower: ClipTextTower, context: Tensor | None = None) -> Tensor:
        """Return the text features (C, E)."""
        return tower(self.embed(tower, context), self.layout)


class FixedPrompts(Prompts):
    """Hand-written prompts: the class text in a template such as ``a video of {}``."""

    def __init__(self, class_prompts: list[str], template: str):
        super().__init__()
        if "{}" not in template:
            raise UserError(f"the prompt template {template!r} has no {{}} where the class text goes")
        tokens = tokenize([template.replace("{}", text) for text in class_prompts])
        ends = tokens.argmax(dim=1)
        alike = (tokens == tokens[0]).all(dim=0).long()
        self.layout = PromptLayout(ends, shared=int(alike.cumprod(0).sum()))
        self.register_buffer("tokens", tokens[:, : int(ends.max()) + 1], persistent=False)


class LearnedPrompts(Prompts):
    """Learned context around each class name.

    The prompt of a class with the tokens [SOT, w1 … wk, EOT at i] has SOT at 0, the words at prefix+1 … prefix+k, EOT
    at prefix+i+postfix, and rows of the context (77, W) everywhere else. Source: released code of VadCLIP.
    """

    def __init__(self, class_prompts: list[str], prefix: int, postfix: int, shared: bool = True):
        """``shared``: the learned tokens before the class name are the same for all classes."""
        super().__init__()
        tokens = tokenize(class_prompts)
        ends = tokens.argmax(dim=1)
        longest = prefix + int(ends.max()) + postfix + 1
        if longest > CONTEXT_LENGTH:
            flags = f"--prompt-prefix {prefix} and --prompt-postfix {postfix}"
            raise UserError(f"{flags} make a prompt of {longest} tokens; CLIP reads {CONTEXT_LENGTH}")
        placed = torch.full((len(tokens), longest), -1)
        for row, end in enumerate(ends.tolist()):
            placed[row, 0] = tokens[row, 0]
            placed[row, prefix + 1 : prefix + end] = tokens[row, 1:end]
            placed[row, prefix + end + postfix] = tokens[row, end]
        self.register_buffer("learned", (placed < 0).unsqueeze(-1), persistent=False)
        self.register_buffer("tokens", placed.clamp(min=0), persistent=False)
        self.layout = PromptLayout(prefix + ends + postfix, shared=1 + prefix * shared)

    def embed(self, tower: ClipTextTower, context: Tensor | None = None) -> Tensor:
        assert context is not None
        return torch.where(self.learned, self.place(context), super().embed(tower))

    def place(self, context: Tensor) -> Tensor:
        """Return the learned token of each position of each prompt, to be broadcast to (C, n, W)."""
        return context[: self.learned.shape[1]]
