"""PEL4VAD (IEEE TIP 2024, arXiv 2306.14451): one attention with two softmaxes, and class texts as a teacher.

B videos, T snippets, D feature width, C classes (0 is *normal*), E text width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad import losses
from clipfusionvad.data.sampling import SegmentSampling
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option, non_negative, size
from clipfusionvad.models.base import (
    EmbedDim,
    Method,
    Probabilities,
    VADOutput,
    VisualLength,
    VisualWidth,
    register_method,
)
from clipfusionvad.models.clip import ClipWeights
from clipfusionvad.models.layers.text import ClipTextTower, FixedPrompts, PromptTemplate

# Scale of the targets of the text loss.
_SHARPNESS = 10


@dataclass(frozen=True, kw_only=True)
class ContextOutput(VADOutput):
    """Besides the logits, ``context`` (B, T, E), which the text loss pools."""

    context: Tensor


class PositionTerm(nn.Module):
    """exp(−|w·(i−j)² − b|) with learned w and b, (T, T): 1 where w·(i−j)² = b, so not only a decay."""

    def __init__(self, gamma: float, bias: float):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor([gamma])), nn.Parameter(torch.tensor([bias]))

    def forward(self, steps: int) -> Tensor:
        at = torch.arange(steps, device=self.w.device, dtype=self.w.dtype)
        return torch.exp(-(self.w * (at[:, None] - at).square() - self.b).abs())


class TwoRangeAttention(nn.Module):
    """A mixture of a softmax over all snippets and one over a window, from one similarity matrix."""

    def __init__(self, width: int, inner: int, window: int, normed: str):
        super().__init__()
        self.inner, self.window, self.normed = inner, window, normed
        self.alpha = nn.Parameter(torch.tensor(0.0))
        self.q, self.k, self.v = (nn.Linear(width, inner) for _ in range(3))
        self.o = nn.Linear(inner, width)

    def forward(self, x: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        """x (B, T, D), position (T, T), valid (B, T) bool → (B, T, D)."""
        similarity = self.q(x) @ self.k(x).transpose(1, 2) / math.sqrt(self.inner) + position
        similarity = similarity.masked_fill(~valid[:, None], -torch.inf)
        near = similarity.masked_fill(~self.in_window(x.shape[1], x.device), -1e9)
        share = torch.sigmoid(self.alpha)
        weights = share * similarity.softmax(dim=-1) + (1 - share) * near.softmax(dim=-1)
        z = weights @ self.v(x)
        if self.normed != "none":
            # Two square roots: where z is 0, the gradient of one root of |z| would be NaN.
            z = (F.relu(z).sqrt() - F.relu(-z).sqrt()) * valid[..., None]
            z = F.normalize(z, dim=1 if self.normed == "time" else 2)
        return self.o(z)

    def in_window(self, steps: int, device: torch.device) -> Tensor:
        """Which snippets j are in the window of snippet i, (T, T) bool; an even window reaches further to the left."""
        at = torch.arange(steps, device=device)
        offset = at - at[:, None] + self.window // 2
        return (offset >= 0) & (offset < self.window)


class ContextEncoder(nn.Module):
    """Attention, LayerNorm and two 1×1 convolutions: (B, T, D) → context (B, E, T) and features (B, O, T)."""

    def __init__(
        self,
        width: int,
        context: int,
        output: int,
        dropout: float,
        attention: TwoRangeAttention,
        position: PositionTerm,
    ):
        super().__init__()
        self.self_attn, self.norm, self.dropout = attention, nn.LayerNorm(width), nn.Dropout(dropout)
        self.linear1, self.linear2 = nn.Conv1d(width, context, 1), nn.Conv1d(context, output, 1)
        self.loc_adj = position

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x + self.self_attn(x, self.loc_adj(x.shape[1]), valid)).transpose(1, 2)
        context = self.dropout(F.gelu(self.linear1(x)))
        return context, self.dropout(F.gelu(self.linear2(context)))


@register_method
class PEL4VAD(Method):
    """Global and local attention, a causal convolution as classifier, and a contrastive loss with class texts."""

    name = "pel4vad"
    needs_clip = True

    texts: Tensor

    def __init__(
        self,
        class_prompts: list[str],
        clip: ClipWeights | None,
        *,
        embed_dim: EmbedDim = 512,
        visual_length: VisualLength = 200,
        visual_width: VisualWidth = 512,
        hidden_width: Annotated[int, size("width of the attention")] = 128,
        output_width: Annotated[int, size("width of the classifier's input")] = 300,
        attn_window: Annotated[int, size("snippets of the local softmax")] = 9,
        causal_width: Annotated[int, size("snippets that the classifier reads, up to the present one")] = 9,
        gamma: Annotated[float, Option("initial slope of the position term")] = 0.6,
        bias: Annotated[float, Option("initial offset of the position term")] = 0.2,
        attention_norm: Annotated[
            str,
            Option("square root and norm along time, as released, or channels", choices=("time", "channels", "none")),
        ] = "time",
        dropout: Annotated[float, Option("dropout of the convolutions", minimum=0, below=1)] = 0.1,
        prompt_template: PromptTemplate = "{}",
        temperature: Annotated[float, Option("initial temperature of the text loss", minimum=1e-6)] = 0.09,
        text_weight: Annotated[float, non_negative("weight of the text loss")] = 1.0,
        mask_padding: Annotated[bool, Option("keep padding out of attention, norm and pooling")] = False,
        score_smoothing: Annotated[
            str,
            Option(
                "smoothing of test scores, as released: mean of a score and those after it, or of blocks",
                choices=("none", "slide", "fixed"),
            ),
        ] = "none",
        kappa: Annotated[int, size("snippets of --score-smoothing")] = 7,
    ):
        super().__init__()
        self.visual_length, self.visual_width, self.causal_width = visual_length, visual_width, causal_width
        self.text_weight, self.mask_padding = text_weight, mask_padding
        self.score_smoothing, self.kappa = score_smoothing, kappa
        attention = TwoRangeAttention(visual_width, hidden_width, attn_window, attention_norm)
        position = PositionTerm(gamma, bias)
        self.self_attention = ContextEncoder(visual_width, embed_dim, output_width, dropout, attention, position)
        self.classifier = nn.Conv1d(output_width, 1, causal_width)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        if clip is None:
            # Only the loss reads texts.
            return
        if clip.embed_dim != embed_dim:
            raise UserError(f"--embed-dim {embed_dim}, but texts of CLIP {clip.source} have {clip.embed_dim} dims")
        with torch.no_grad():
            texts = FixedPrompts(class_prompts, prompt_template)(ClipTextTower(clip))
        self.register_buffer("texts", F.normalize(texts, dim=-1), persistent=False)

    @classmethod
    def sampling_of(cls, options: Mapping[str, Any]) -> SegmentSampling:
        return SegmentSampling(options["visual_length"], pick=True)

    def forward(self, visual: Tensor, lengths: Tensor | None = None) -> ContextOutput:
        self.check_visual(visual, any_length=True)
        context, features = self.self_attention(visual, self._valid(visual, lengths))
        logits = self.classifier(F.pad(features, (self.causal_width - 1, 0)))
        return ContextOutput(logits.transpose(1, 2), context=context.transpose(1, 2))

    def _valid(self, visual: Tensor, lengths: Tensor | None) -> Tensor:
        """Which snippets count, (B, T): those before the end of the batch's longest video or, masked, of their own."""
        if lengths is None:
            return torch.ones(visual.shape[:2], dtype=torch.bool, device=visual.device)
        if self.mask_padding:
            return losses.valid_mask(lengths, visual.shape[1])
        longest = lengths.max()
        if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
            # In training, each process holds some rows of the batch.
            dist.all_reduce(longest, dist.ReduceOp.MAX)
        return losses.valid_mask(longest.expand(len(visual)), visual.shape[1])

    def losses(self, output: ContextOutput, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        return {
            "coarse": losses.coarse_mil_loss(output.coarse_logits, targets, lengths, single_normal=True),
            "text": self.text_weight * self.text_loss(output, targets, lengths),
        }

    def text_loss(self, output: ContextOutput, targets: Tensor, lengths: Tensor) -> Tensor:
        """KL divergence from the videos' similarities with texts to which of them are of one class.

        A row is a video's foreground with the text of its class or, of an anomalous video, its background with the
        normal text. Of a video of several classes the first counts.
        """
        context, valid = output.context.float(), self._valid(output.context, lengths)
        logits = output.coarse_logits.squeeze(-1)
        pooled = [losses.score_weighted_mean(context, part, valid) for part in (logits, -logits)]
        classes = (targets[:, 1:] > 0).int()
        own = torch.where(classes.any(dim=1), classes.argmax(dim=1) + 1, 0)
        labels = torch.cat([own, torch.zeros_like(own)])
        counted = torch.cat([torch.ones_like(own), own.sign()]).bool()
        videos = F.normalize(torch.cat(pooled), dim=-1)
        similarity = self.logit_scale.exp() * videos @ self.texts[labels].T
        # Rows and columns of the backgrounds of normal videos stay out.
        left_out = ~counted
        log_p = similarity.masked_fill(left_out, -torch.inf).log_softmax(dim=1)
        match = (labels[:, None] == labels).float() * _SHARPNESS
        log_q = match.masked_fill(left_out, -torch.inf).log_softmax(dim=1)
        terms = (log_q.exp() * (log_q - log_p)).masked_fill(left_out | left_out[:, None], 0)
        return terms.sum() / counted.sum()

    def scores(self, output: VADOutput) -> Probabilities:
        scores = super().scores(output).anomaly[0]
        if self.score_smoothing == "slide":
            scores = F.avg_pool1d(F.pad(scores, (0, self.kappa - 1))[:, None], self.kappa, 1).squeeze(1)
        elif self.score_smoothing == "fixed":
            count = scores.shape[1]
            blocks = F.pad(scores, (0, -count % self.kappa)).unflatten(1, (-1, self.kappa)).mean(dim=2)
            scores = blocks.repeat_interleave(self.kappa, dim=1)[:, :count]
        return Probabilities((scores,))

    @classmethod
    def matches_state_dict(cls, state: Mapping[str, Tensor]) -> bool:
        return "self_attention.loc_adj.w" in state
