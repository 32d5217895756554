"""DSANet (AAAI 2026, arXiv 2511.10334): VadCLIP's visual branch, adapters in CLIP's text tower, a normality branch.

B videos, T snippets, D feature width, C classes (0 is *normal*), W width of the text tower, P prototypes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad import losses
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option, layers, non_negative, size
from clipfusionvad.models.base import (
    EmbedDim,
    Probabilities,
    VADOutput,
    VisualLength,
    VisualWidth,
    isolated_rng,
    register_method,
)
from clipfusionvad.models.clip import ClipWeights
from clipfusionvad.models.layers.dual_branch import (
    TEMPERATURE,
    AttentionWindow,
    DualBranch,
    VisualHead,
    VisualLayers,
)
from clipfusionvad.models.layers.transformer import MLP

HEADS = 8
_LABEL_SMOOTHING = 0.1
# Of each anomalous class in the background's target, where the normal one has 1.
_BACKGROUND = 0.01


@dataclass(frozen=True, kw_only=True)
class DSAOutput(VADOutput):
    """Besides the logits: those of event and background (B, C); of the normality branch, which only a training has,
    the error of each reconstructed snippet (B, T) and the distance of normal snippets from the prototypes (B,)."""

    event_logits: Tensor
    background_logits: Tensor
    error: Tensor | None = None
    distance: Tensor | None = None


class TextAdapter(nn.Module):
    """Mix a token with its adapted copy of equal norm: (P, W) → (P, W)."""

    def __init__(self, width: int, out_width: int, share: float):
        super().__init__()
        self.share = share
        linear = nn.Linear(width, out_width, bias=False)
        nn.init.xavier_uniform_(linear.weight)
        self.fc = nn.Sequential(linear, nn.LeakyReLU())

    def forward(self, x: Tensor) -> Tensor:
        adapted = self.fc(x)
        adapted = adapted * (x.norm(dim=-1, keepdim=True) / (adapted.norm(dim=-1, keepdim=True) + 1e-6))
        return self.share * adapted + (1 - self.share) * x


class TextAdapters(nn.Module):
    """The adapters of the first blocks and, last, the layer that replaces CLIP's projection."""

    def __init__(self, width: int, out_width: int, blocks: int, share: float):
        super().__init__()
        widths = [width] * blocks + [out_width]
        self.text_adapter = nn.ModuleList(TextAdapter(width, out, share) for out in widths)


class PatternAttention(nn.Module):
    """Queries (B, N, D) read keys (B, M, D): by a softmax, or by learned scales of clipped cosines."""

    def __init__(self, width: int, by_cosine: bool):
        super().__init__()
        self.by_cosine = by_cosine
        if by_cosine:
            self.learn_scale = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        parts = (self.q(queries), *self.kv(keys).chunk(2, dim=-1))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        if self.by_cosine:
            similarity = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            mixed = F.relu(similarity * self.learn_scale) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PatternBlock(nn.Module):
    """Pre-norm attention and perceptron. As released, one LayerNorm serves queries and keys, and a decoding block has
    no connection around its attention, so that only mixtures of the keys pass."""

    def __init__(self, width: int, decodes: bool):
        super().__init__()
        self.decodes = decodes
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-8) for _ in range(2))
        self.attn, self.mlp = PatternAttention(width, by_cosine=decodes), Perceptron(width)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        read = self.attn(self.norm1(x), self.norm1(keys))
        x = read if self.decodes else x + read
        return x + self.mlp(self.norm2(x))


class NormalityBranch(nn.Module):
    """Reconstruct snippets from prototypes that gather what is normal in a video."""

    def __init__(self, width: int, prototypes: int, depth: int, share: float):
        super().__init__()
        self.share = share
        self.video_prototypes = nn.Parameter(torch.randn(prototypes, width))
        self.dnp_extractor = nn.ModuleList([PatternBlock(width, decodes=False)])
        self.bottleneck = MLP(width)
        self.decoder = nn.ModuleList(PatternBlock(width, decodes=True) for _ in range(depth))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.01, a=-0.03, b=0.03)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D), anomaly scores (B, T) → error of each snippet (B, T), distance from the prototypes (B,)."""
        count = int(x.shape[1] * self.share)
        chosen = scores.detach().topk(count, dim=1, largest=False).indices
        # As released, prototypes learn from the chosen snippets, not these from the prototypes.
        normal = x.detach().gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))
        patterns = self.video_prototypes.expand(len(x), -1, -1)
        for block in self.dnp_extractor:
            patterns = block(patterns, normal)
        cosines = F.normalize(normal, dim=-1) @ F.normalize(patterns, dim=-1).transpose(1, 2)
        distance = (1 - cosines).amin(dim=-1).mean(dim=1)
        rebuilt = self.bottleneck(x)
        for block in self.decoder:
            rebuilt = block(rebuilt, patterns)
        return (1 - F.cosine_similarity(x, rebuilt, dim=-1)) / 2, distance


@register_method
class DSANet(DualBranch):
    """Two branches aligned with adapted class texts; event and background features; a normality branch in training."""

    name = "dsanet"
    stable_branch = "video_anomaly_refiner."

    def __init__(
        self,
        class_prompts: list[str],
        clip: ClipWeights | None,
        *,
        embed_dim: EmbedDim = 512,
        visual_length: VisualLength = 256,
        visual_width: VisualWidth = 512,
        visual_head: VisualHead = 1,
        visual_layers: VisualLayers = 2,
        attn_window: AttentionWindow = 8,
        text_adapt_until: Annotated[int, layers("blocks of the text tower with an adapter")] = 3,
        adapter_share: Annotated[float, Option("share of the adapted token", minimum=0, maximum=1)] = 0.1,
        normality: Annotated[bool, Option("normality branch in training")] = True,
        num_prototypes: Annotated[int, size("normal prototypes")] = 16,
        normal_share: Annotated[float, Option("share of the snippets that count as normal", above=0, maximum=1)] = 0.8,
        decoder_depth: Annotated[int, layers("decoding blocks of the normality branch")] = 8,
        refiner_steps: Annotated[int, size("steps over which the normality branch's rate falls")] = 2510,
        score_temperature: Annotated[float, Option("temperature of branch 2 and of the classes", minimum=1e-6)] = 5.0,
        fine_weight: Annotated[float, non_negative("weight of the alignment loss")] = 1.1,
        separation_weight: Annotated[float, non_negative("weight of the text separation loss")] = 1.0,
        event_weight: Annotated[float, non_negative("weight of the event loss")] = 1.0,
        background_weight: Annotated[float, non_negative("weight of the background loss")] = 1.0,
        consistency_weight: Annotated[float, non_negative("weight of scores against reconstruction errors")] = 1.0,
        gather_weight: Annotated[float, non_negative("weight of the distance from the prototypes")] = 1.0,
    ):
        super().__init__(
            class_prompts,
            clip,
            embed_dim=embed_dim,
            visual_length=visual_length,
            visual_width=visual_width,
            visual_head=visual_head,
            visual_layers=visual_layers,
            attn_window=attn_window,
            prompts="fixed",
            separation_weight=separation_weight,
        )
        if visual_width % HEADS:
            raise UserError(
                f"--visual-width {visual_width} must be a multiple of {HEADS}, the normality branch's heads"
            )
        if normality and int(visual_length * normal_share) < 1:
            raise UserError(f"--normal-share {normal_share} of {visual_length} snippets is none: raise it")
        self.stable_steps, self.score_temperature, self.fine_weight = refiner_steps, score_temperature, fine_weight
        self.event_weight, self.background_weight = event_weight, background_weight
        self.consistency_weight, self.gather_weight = consistency_weight, gather_weight
        if clip:
            self.clip_adapter = TextAdapters(clip.text_width, visual_width, text_adapt_until, adapter_share)
        self.video_anomaly_refiner = None
        if normality:
            with isolated_rng("normality"):
                self.video_anomaly_refiner = NormalityBranch(visual_width, num_prototypes, decoder_depth, normal_share)

    def encode_text(self) -> Tensor:
        """Return the text features (C, D), of norm 1."""
        *adapters, last = cast(list[TextAdapter], list(self.clip_adapter.text_adapter))
        hidden = self.clipmodel.hidden(self.prompts.embed(self.clipmodel), self.prompts.layout, adapters)
        return F.normalize(last.fc(hidden), dim=-1)

    def forward(self, visual: Tensor, lengths: Tensor | None = None, text: Tensor | None = None) -> DSAOutput:
        text = self.encode_once() if text is None else text
        x = self.encode_video(visual, lengths)
        coarse = self.classifier(x + self.mlp2(x))
        fine = self.align(x, self.fuse(text, F.normalize(coarse.transpose(1, 2) @ x, dim=-1)))
        logits = coarse.squeeze(-1)
        pooled = (losses.score_weighted_mean(x, part) for part in (logits, -logits))
        event, background = (F.normalize(part, dim=-1) @ text.T / TEMPERATURE for part in pooled)
        # An evaluation needs no gradients, and its scores do not depend on the branch.
        error = distance = None
        if self.video_anomaly_refiner is not None and torch.is_grad_enabled():
            error, distance = self.video_anomaly_refiner(x, torch.sigmoid(logits.float()))
        return DSAOutput(
            coarse, fine, text, event_logits=event, background_logits=background, error=error, distance=distance
        )

    def losses(self, output: DSAOutput, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        terms = super().losses(output, targets, lengths)
        terms["fine"] = self.fine_weight * terms["fine"]
        shares = targets.to(output.event_logits.dtype).float()
        shares = shares / shares.sum(dim=1, keepdim=True)
        background = torch.full_like(shares, _BACKGROUND)
        background[:, 0] = 1
        background = background / background.sum(dim=1, keepdim=True)
        for name, weight, logits, target in (
            ("event", self.event_weight, output.event_logits, shares),
            ("background", self.background_weight, output.background_logits, background),
        ):
            terms[name] = weight * F.cross_entropy(logits.float(), target, label_smoothing=_LABEL_SMOOTHING)
        if output.error is not None and output.distance is not None:
            valid = losses.valid_mask(lengths, output.error.shape[1])
            gap = (torch.sigmoid(output.coarse_logits.float()).squeeze(-1) - output.error.float()).square()
            terms["consistency"] = self.consistency_weight * (gap * valid).sum() / valid.sum()
            terms["gather"] = self.gather_weight * output.distance.float().mean()
        return terms

    def scores(self, output: VADOutput) -> Probabilities:
        """Branch 2 is a monotone function of branch 1, as released: both have the same AUC and AP."""
        logits = output.coarse_logits.float().squeeze(-1)
        tempered = torch.sigmoid(logits / self.score_temperature)
        shares = (output.fine_logits.float() / self.score_temperature).softmax(dim=-1)[..., 1:]
        anomalous = tempered[..., None] * shares / (shares.sum(dim=-1, keepdim=True) + 1e-12)
        return Probabilities((torch.sigmoid(logits), tempered), torch.cat([1 - tempered[..., None], anomalous], dim=-1))

    @classmethod
    def matches_state_dict(cls, state: Mapping[str, Tensor]) -> bool:
        return any(key.startswith("clip_adapter.text_adapter.") for key in state)

    @classmethod
    def from_released(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # CLIP is in the file twice.
        return {key: value for key, value in state.items() if not key.startswith("clip_adapter.clipmodel.")}
