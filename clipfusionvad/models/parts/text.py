"""Class prompts: learned context around class names, encoded by CLIP's frozen text tower."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipfusionvad.clip import CONTEXT_LENGTH, ClipWeights, tokenize
from clipfusionvad.errors import UserError
from clipfusionvad.models.parts.transformer import Transformer


class ClipTextTower(nn.Module):
    """CLIP's text transformer with OpenAI's parameter names, frozen, in float32."""

    def __init__(self, clip: ClipWeights):
        super().__init__()
        state = clip.state
        width, layers = (
            clip.text_width,
            1 + max(int(key.split(".")[2]) for key in state if key.startswith("transformer.resblocks.")),
        )
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

    def forward(self, embeddings: Tensor, ends: Tensor, projection: Tensor | None = None) -> Tensor:
        """Token embeddings (C, n, W) and the position of each EOT (C,) → text features (C, E).

        n may be shorter than CLIP's 77 as long as it reaches every EOT: attention is causal, so what comes
        after it changes nothing. A ``projection`` (W, E) takes the place of CLIP's own.
        """
        x = embeddings + self.positional_embedding[: embeddings.shape[1]]
        x = self.transformer(x, causal=True)
        x = x[torch.arange(len(x), device=x.device), ends]
        return self.ln_final(x) @ (self.text_projection if projection is None else projection)


class FixedPrompts(nn.Module):
    """Hand-written prompts: the class text put into a template such as ``a video of {}``."""

    def __init__(self, class_prompts: list[str], template: str):
        super().__init__()
        if "{}" not in template:
            raise UserError(f"--prompt-template {template!r} has no {{}} where the class text goes")
        tokens = tokenize([template.replace("{}", text) for text in class_prompts])
        ends = tokens.argmax(dim=1)
        self.register_buffer("tokens", tokens[:, : int(ends.max()) + 1], persistent=False)
        self.register_buffer("ends", ends, persistent=False)

    def forward(self, tower: ClipTextTower) -> Tensor:
        """Text features (C, E)."""
        return tower(tower.token_embedding(self.tokens), self.ends)


class LearnedPrompts(nn.Module):
    """Learned context around each class name.

    A class whose tokens are [SOT, w1 … wk, EOT at i] becomes: SOT at 0, the words at prefix+1 … prefix+k, EOT
    at prefix+i+postfix, and rows of the learned table (one for all classes) everywhere else.
    Source: released code of VadCLIP.
    """

    def __init__(self, class_prompts: list[str], prefix: int, postfix: int):
        super().__init__()
        tokens = tokenize(class_prompts)
        ends = tokens.argmax(dim=1)
        longest = prefix + int(ends.max()) + postfix + 1
        if longest > CONTEXT_LENGTH:
            raise UserError(
                f"--prompt-prefix {prefix} and --prompt-postfix {postfix} make a prompt of {longest} tokens; "
                f"CLIP reads {CONTEXT_LENGTH}"
            )
        placed = torch.full((len(tokens), longest), -1)
        for row, end in enumerate(ends.tolist()):
            placed[row, 0] = tokens[row, 0]
            placed[row, prefix + 1 : prefix + end] = tokens[row, 1:end]
            placed[row, prefix + end + postfix] = tokens[row, end]
        self.register_buffer("learned", (placed < 0).unsqueeze(-1), persistent=False)
        self.register_buffer("tokens", placed.clamp(min=0), persistent=False)
        self.register_buffer("ends", prefix + ends + postfix, persistent=False)

    def forward(self, tower: ClipTextTower, context: Tensor) -> Tensor:
        """context (77, W), the learned table → text features (C, E)."""
        words = tower.token_embedding(self.tokens)
        return tower(torch.where(self.learned, context[: words.shape[1]], words), self.ends)
