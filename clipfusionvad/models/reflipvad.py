"""ReFLIP-VAD (TCSVT 2024) as its paper describes it; ``reflipvad_repo`` is what its released code was to compute.

The authors published no weights, so no outputs can be compared. N prompt tokens, W text width of CLIP; see base.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad import losses
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Declared, Option, declared_options, non_negative, size
from clipfusionvad.models import register_method
from clipfusionvad.models.base import EmbedDim, TextMethod, VADOutput, VisualLength, VisualWidth, isolated_rng
from clipfusionvad.models.clip import CONTEXT_LENGTH, ClipWeights, tokenize
from clipfusionvad.models.layers.distilbert import DistilBert, DistilBertName
from clipfusionvad.models.layers.dual_branch import EMBEDDING_STD, TEMPERATURE
from clipfusionvad.models.layers.glimpse import FeedForward, GlimpseEmphasize, TemporalOptions
from clipfusionvad.models.layers.text import ClipTextTower, FixedPrompts, LearnedPrompts, PromptKind, PromptTemplate


@dataclass(frozen=True, kw_only=True)
class MagnitudeOutput(VADOutput):
    magnitudes: Tensor  # (B, T), norms of the Emphasize features


@register_method
class ReFLIPVAD(TextMethod):
    """The paper's method; every point that the paper leaves open is an option, with our reading as its default.

    Intensified, glimpsed and emphasized features G are scored per snippet: A. V, the sum of G weighted by A, is added
    to the class text with which G is aligned. Padded snippets change nothing in evaluation.
    """

    name = "reflipvad"

    def __init__(
        self,
        class_prompts: list[str],
        clip: ClipWeights | None,
        *,
        embed_dim: EmbedDim = 512,
        visual_length: VisualLength = 512,
        visual_width: VisualWidth = 512,
        prompts: PromptKind = "learned",
        prompt_template: PromptTemplate = "{}",
        prompt_length: Annotated[int, size("learned tokens around the class name")] = 24,
        class_contexts: Annotated[bool, Option("learned tokens for each class (not stated in the paper)")] = False,
        reparameterise: Annotated[bool, Option("send the learned tokens through DistilBERT")] = True,
        prompt_encoder: DistilBertName = None,
        train_prompt_encoder: Annotated[bool, Option("train DistilBERT (not stated in the paper)")] = False,
        product: Annotated[bool, Option("visual prompt added to the text features")] = True,
        temperature: Annotated[float, Option("temperature of the alignment", minimum=1e-6)] = TEMPERATURE,
        coarse_weight: Annotated[float, non_negative("weight of the coarse loss, 1 in the paper")] = 1.0,
        fine_weight: Annotated[float, non_negative("weight l1 of the alignment loss")] = 1e-2,
        magnitude_weight: Annotated[float, non_negative("weight l2 of the magnitude loss")] = 1e-3,
        margin: Annotated[float, non_negative("wanted difference of the two kinds' magnitudes (not published)")] = 1.0,
        magnitude_distance: Annotated[
            str, Option("between two videos' mean highest magnitudes, or as printed", choices=losses.DISTANCES)
        ] = "mean_topk",
        single_normal: Annotated[bool, Option("a normal video counts by its highest snippet only")] = True,
        **temporal: Any,
    ):
        super().__init__()
        self.visual_length, self.visual_width, self.temperature = visual_length, visual_width, temperature
        self.weights = {"coarse": coarse_weight, "fine": fine_weight, "magnitude": magnitude_weight}
        if not any(self.weights.values()):
            raise UserError("every loss weight is 0: there is nothing to train on")
        self.margin, self.magnitude_distance, self.single_normal = margin, magnitude_distance, single_normal

        settings = TemporalOptions(**temporal)
        self.temporal = GlimpseEmphasize(visual_width, settings)
        with isolated_rng("coarse"):
            self.coarse_ffn = FeedForward(visual_width, settings.ffn_expansion)
            self.classifier = nn.Linear(visual_width, 1)
        with isolated_rng("product"):
            self.prompt_ffn = FeedForward(visual_width, settings.ffn_expansion) if product else None

        self.prompt_embeddings = self.prompt_encoder = None
        self.prompts: nn.Module
        if clip is None:
            return
        clip.check_widths(embed_dim, visual_width)
        self.clipmodel = ClipTextTower(clip)
        if prompts == "fixed":
            self.prompts = FixedPrompts(class_prompts, prompt_template)
            return
        self.prompts = MiddlePrompts(class_prompts, prompt_length, shared=not class_contexts)
        shape = (len(class_prompts),) * class_contexts + (prompt_length, embed_dim)
        with isolated_rng("prompts"):
            self.prompt_embeddings = nn.Parameter(nn.init.normal_(torch.empty(shape), std=EMBEDDING_STD))
        if reparameterise:
            distilbert = DistilBert.find(prompt_encoder, clip)
            with isolated_rng("distilbert"):
                self.prompt_encoder = PromptEncoder(distilbert.build(), embed_dim, prompt_length, train_prompt_encoder)

    @classmethod
    def declared_options(cls) -> dict[str, Declared]:
        return super().declared_options() | declared_options(TemporalOptions)

    def encode_text(self) -> Tensor:
        """Return the text features of the class prompts, not normalised: (C, E)."""
        return self.prompts(self.clipmodel, self.context_vectors())

    def context_vectors(self) -> Tensor | None:
        """Return the prompt tokens after the prompt encoder."""
        learned = self.prompt_embeddings
        return learned if learned is None or self.prompt_encoder is None else self.prompt_encoder(learned)

    def forward(self, visual: Tensor, lengths: Tensor | None = None, text: Tensor | None = None) -> MagnitudeOutput:
        self.check_visual(visual, any_length=True)
        text = self.encode_once() if text is None else text
        if lengths is None:
            lengths = torch.full((len(visual),), visual.shape[1], device=visual.device)
        valid = losses.valid_mask(lengths, visual.shape[1])
        features, magnitudes = self.temporal(visual, valid)
        coarse = self.classifier(self.coarse_ffn(features) + features)
        classes = text
        if self.prompt_ffn is not None:
            weights = coarse.sigmoid() * valid[..., None]
            classes = self.prompt_ffn(text + F.normalize(weights.transpose(1, 2) @ features, dim=-1)) + text
        cosine = F.normalize(features, dim=-1) @ F.normalize(classes, dim=-1).transpose(-1, -2)
        return MagnitudeOutput(coarse, cosine / self.temperature, text, magnitudes=magnitudes)

    def losses(self, output: MagnitudeOutput, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        bag = (targets, lengths, self.single_normal)
        terms = {
            "coarse": losses.coarse_mil_loss(output.coarse_logits, *bag),
            "fine": losses.alignment_loss(output.fine_logits, *bag),
            "magnitude": losses.magnitude_loss(output.magnitudes, *bag, self.margin, self.magnitude_distance),
        }
        return {name: weight * terms[name] for name, weight in self.weights.items()}

    @classmethod
    def matches_state_dict(cls, state: Mapping[str, Tensor]) -> bool:
        return any(key.startswith("coarse_ffn.") for key in state)


class MiddlePrompts(LearnedPrompts):
    """N prompt tokens, of which floor(N / 2) come before the class name (paper, section "RL-prompt")."""

    order: Tensor

    def __init__(self, class_prompts: list[str], count: int, shared: bool):
        room = CONTEXT_LENGTH - 1 - int(tokenize(class_prompts).argmax(dim=1).max())
        if count > room:
            raise UserError(f"--prompt-length {count}, but beside the class names CLIP has room for {room} tokens")
        super().__init__(class_prompts, count // 2, count - count // 2, shared)
        # Positions after EOT have an index too, but nothing attends to them.
        order = self.learned.squeeze(-1).cumsum(dim=1) - 1
        self.register_buffer("order", order.clamp(0, max(count - 1, 0)), persistent=False)

    def place(self, context: Tensor) -> Tensor:
        """context (N, W), or (C, N, W) for prompts of each class → (C, n, W)."""
        rows = torch.arange(len(self.order), device=context.device)[:, None]
        return context.expand(len(rows), -1, -1)[rows, self.order]


class PromptEncoder(nn.Module):
    """φ(p) = p + θ(p), where θ is DistilBERT over the sequence of prompt tokens (paper, RL-prompt).

    Linear layers adapt the widths (not in the paper); the second starts at zero: φ starts as the identity.
    """

    def __init__(self, distilbert: Any, width: int, length: int, trained: bool):
        super().__init__()
        longest = distilbert.config.max_position_embeddings
        if length > longest:
            raise UserError(f"--prompt-length {length}, but --prompt-encoder reads {longest} tokens")
        self.trained = trained
        self.distilbert = distilbert.requires_grad_(trained)
        self.widen, self.narrow = nn.Linear(width, distilbert.config.dim), nn.Linear(distilbert.config.dim, width)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def train(self, mode: bool = True) -> "PromptEncoder":
        super().train(mode)
        self.distilbert.train(mode and self.trained)
        return self

    def forward(self, prompts: Tensor) -> Tensor:
        """(N, W) or (C, N, W) → the same shape."""
        sequences = prompts if prompts.dim() == 3 else prompts[None]
        hidden = self.distilbert(inputs_embeds=self.widen(sequences)).last_hidden_state
        return prompts + self.narrow(hidden).view_as(prompts)
