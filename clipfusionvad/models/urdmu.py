"""UR-DMU (AAAI 2023, arXiv 2302.05160): dual memory units with uncertainty regulation.

B normal and B anomalous videos, the normal first; T snippets, H hidden width, K memory slots.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad import losses
from clipfusionvad.data.sampling import SegmentSampling
from clipfusionvad.io.option import Option, non_negative, size
from clipfusionvad.models.base import Method, VADOutput, VisualLength, VisualWidth, register_method
from clipfusionvad.models.layers.global_local import (
    Embedding,
    GlobalLocalTransformer,
    Heads,
    HeadWidth,
    HiddenWidth,
    Layers,
    MLPWidth,
)


@dataclass(frozen=True, kw_only=True)
class MemoryOutput(VADOutput):
    """Besides the logits: hidden features (B, T, H); of both memories the match (B, T) and latent mean (B, T, H)."""

    hidden: Tensor
    anomaly_match: Tensor
    normal_match: Tensor
    anomaly_mu: Tensor
    normal_mu: Tensor
    normal_logvar: Tensor


class Memory(nn.Module):
    """K learned slots: (B, T, H) → how well the best K // 16 + 1 match (B, T), the matched slots' sum (B, T, H)."""

    def __init__(self, slots: int, width: int):
        super().__init__()
        self.memory_block = nn.Parameter(torch.empty(slots, width).uniform_(-1, 1) / math.sqrt(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        slots, width = self.memory_block.shape
        match = torch.sigmoid(x @ self.memory_block.T / math.sqrt(width))
        return match.topk(slots // 16 + 1, dim=-1).values.mean(dim=-1), match @ self.memory_block


class ScoreHead(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


@register_method
class URDMU(Method):
    """Two memories, one of normal and one of anomalous patterns, whose matches extend the features of a transformer."""

    name = "urdmu"
    paired = True

    def __init__(
        self,
        classes: int,
        *,
        visual_length: VisualLength = 200,
        visual_width: VisualWidth = 512,
        hidden_width: HiddenWidth = 512,
        visual_layers: Layers = 2,
        visual_head: Heads = 4,
        head_width: HeadWidth = 128,
        mlp_width: MLPWidth = 512,
        classifier_width: Annotated[int, size("hidden width of the classifier")] = 128,
        anomaly_slots: Annotated[int, size("slots of the anomaly memory")] = 60,
        normal_slots: Annotated[int, size("slots of the normal memory")] = 60,
        dropout: Annotated[float, Option("dropout of the transformer", minimum=0, below=1)] = 0.5,
        uncertainty: Annotated[bool, Option("noise in the normal latent in training, and its KL divergence")] = True,
        memory_weight: Annotated[float, non_negative("weight of each of four losses of the matches")] = 0.1,
        triplet_weight: Annotated[float, non_negative("weight of the triplet loss")] = 0.1,
        kl_weight: Annotated[float, non_negative("weight of the KL divergence")] = 1e-3,
        distance_weight: Annotated[float, non_negative("weight of the loss of the latents' magnitudes")] = 1e-4,
    ):
        super().__init__()
        self.visual_length, self.visual_width, self.uncertainty = visual_length, visual_width, uncertainty
        self.memory_weight, self.triplet_weight = memory_weight, triplet_weight
        self.kl_weight, self.distance_weight = kl_weight, distance_weight
        self.embedding = Embedding(visual_width, hidden_width)
        self.selfatt = GlobalLocalTransformer(hidden_width, visual_layers, visual_head, head_width, mlp_width, dropout)
        self.Amemory, self.Nmemory = Memory(anomaly_slots, hidden_width), Memory(normal_slots, hidden_width)
        self.encoder_mu, self.encoder_var = (nn.Sequential(nn.Linear(hidden_width, hidden_width)) for _ in range(2))
        self.cls_head = ScoreHead(2 * hidden_width, classifier_width)

    @classmethod
    def sampling_of(cls, options: Mapping[str, Any]) -> SegmentSampling:
        return SegmentSampling(options["visual_length"])

    def forward(self, visual: Tensor, lengths: Tensor | None = None) -> MemoryOutput:
        self.check_visual(visual, any_length=True)
        hidden = self.selfatt(self.embedding(visual))
        anomaly_match, anomaly = self.Amemory(hidden)
        normal_match, normal = self.Nmemory(hidden)
        anomaly_mu, normal_mu = self.encoder_mu(anomaly), self.encoder_mu(normal)
        return MemoryOutput(
            self.cls_head(torch.cat([hidden, anomaly_mu + normal_mu], dim=-1)),
            hidden=hidden,
            anomaly_match=anomaly_match,
            normal_match=normal_match,
            anomaly_mu=anomaly_mu,
            normal_mu=normal_mu,
            normal_logvar=self.encoder_var(normal),
        )

    def losses(self, output: MemoryOutput, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        hidden_n, hidden_a = output.hidden.float().chunk(2)
        anomaly_on_n, anomaly_on_a = output.anomaly_match.float().chunk(2)
        normal_on_n, normal_on_a = output.normal_match.float().chunk(2)
        anomaly_mu_n, anomaly_mu_a = output.anomaly_mu.float().chunk(2)
        mu, logvar = (part.float().chunk(2)[0] for part in (output.normal_mu, output.normal_logvar))
        latent = mu + self.noise(mu) * (0.5 * logvar).exp() if self.uncertainty else mu
        # The noise reaches the scores of normal videos only.
        logits_n = self.cls_head(torch.cat([hidden_n, latent + anomaly_mu_n], dim=-1))
        logits = torch.cat([logits_n, output.coarse_logits.float().chunk(2)[1]]).squeeze(-1)
        k = logits.shape[1] // 16 + 1

        top_a, top_n, top_p = (match.topk(k, dim=1).indices for match in (anomaly_on_a, normal_on_n, normal_on_a))
        anchor, positive, negative = _pool(hidden_n, top_n), _pool(hidden_a, top_p), _pool(hidden_a, top_a)
        triplet = F.triplet_margin_loss(*(x / x.norm(dim=-1, keepdim=True) for x in (anchor, positive, negative)))
        far, near = _pool(anomaly_mu_a, top_a).norm(dim=-1), _pool(latent, top_n).norm(dim=-1)

        terms = {
            "coarse": losses.binary_cross_entropy(
                _largest_mean(torch.sigmoid(logits), k), 1 - targets[:, 0].to(logits.dtype)
            ),
            "anomaly_on_anomalous": self.memory_weight * _bce(_largest_mean(anomaly_on_a, k), 1),
            "normal_on_anomalous": self.memory_weight * _bce(_largest_mean(1 - normal_on_a, k), 1),
            "normal_on_normal": self.memory_weight * _bce(normal_on_n, 1),
            "anomaly_on_normal": self.memory_weight * _bce(anomaly_on_n, 0),
            "triplet": self.triplet_weight * triplet,
            "distance": self.distance_weight * losses.ranking_loss(near, far, margin=100.0),
        }
        if self.uncertainty:
            # Summed over time, as released: a usual KL divergence sums over the latent's dims.
            terms["kl"] = self.kl_weight * mu.shape[1] * losses.gaussian_kl(mu, logvar)
        return terms

    @staticmethod
    def noise(mu: Tensor) -> Tensor:
        """Return the noise of the latents of the normal videos, (B, T, H)."""
        return torch.randn_like(mu)

    @classmethod
    def matches_state_dict(cls, state: Mapping[str, Tensor]) -> bool:
        return "Amemory.memory_block" in state


def _pool(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of chosen snippets (B, k): (B, T, H) → (B, H)."""
    return values.gather(1, chosen[..., None].expand(-1, -1, values.shape[2])).mean(dim=1)


def _largest_mean(values: Tensor, k: int) -> Tensor:
    return values.topk(k, dim=1).values.mean(dim=1)


def _bce(values: Tensor, target: float) -> Tensor:
    return losses.binary_cross_entropy(values, torch.full_like(values, target))
