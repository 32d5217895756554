"""BN-WVAD (arXiv 2311.15367): how far features lie from BatchNorm's running mean is the anomaly score.

B normal and B anomalous videos, the normal first; T snippets, H hidden width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad.data.sampling import SegmentSampling
from clipfusionvad.io.errors import UserError
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
class DistanceOutput(VADOutput):
    """Besides the logits: ``scores`` (B, T) of the classifier, ``first`` and ``second`` distance (B, T)."""

    scores: Tensor
    first: Tensor
    second: Tensor


class NormalityHead(nn.Module):
    """Three convolutions over time, two BatchNorms between them: (B, H, T) → scores and two distances (B, T)."""

    def __init__(self, width: int, first: int, second: int, kernels: tuple[int, int, int]):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm1d(first), nn.BatchNorm1d(second)
        widths = (width, first, second, 1)
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv1d(before, after, kernel, padding=kernel // 2)
            for before, after, kernel in zip(widths[:-1], widths[1:], kernels, strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.conv1(x)
        second = self.conv2(F.relu(self.bn1(first)))
        scores = torch.sigmoid(self.conv3(F.relu(self.bn2(second))).float()).squeeze(1)
        # After the forward: in training, the running statistics already contain this batch, as released.
        return scores, self.distance(first, self.bn1), self.distance(second, self.bn2)

    @staticmethod
    def distance(x: Tensor, norm: nn.BatchNorm1d) -> Tensor:
        """Mahalanobis distance from the running mean by the running variance, without epsilon: (B, C, T) → (B, T)."""
        assert norm.running_mean is not None and norm.running_var is not None
        mean, variance = norm.running_mean[:, None].clone(), norm.running_var[:, None].clone()
        return ((x.float() - mean).square() / variance).sum(dim=1).sqrt()


@register_method
class BNWVAD(Method):
    """A transformer and a head whose BatchNorm statistics describe normality."""

    name = "bnwvad"
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
        first_ratio: Annotated[int, size("--hidden-width over the channels of the first BatchNorm")] = 16,
        second_ratio: Annotated[int, size("--hidden-width over the channels of the second BatchNorm")] = 32,
        kernels: Annotated[tuple[int, int, int], Option("snippets of the three convolutions, odd", minimum=1)] = (
            1,
            1,
            1,
        ),
        sample_ratio: Annotated[float, Option("selected share of each video", minimum=0, maximum=1)] = 0.2,
        batch_ratio: Annotated[float, Option("selected share of the anomalous half", minimum=0, maximum=1)] = 0.4,
        first_weight: Annotated[float, non_negative("weight of the ranking by the first distance")] = 5.0,
        second_weight: Annotated[float, non_negative("weight of the ranking by the second distance")] = 20.0,
        normal_weight: Annotated[float, non_negative("weight of the norm of normal scores")] = 1.0,
    ):
        super().__init__()
        if max(first_ratio, second_ratio) > hidden_width:
            raise UserError(f"--first-ratio and --second-ratio must be at most --hidden-width, {hidden_width}")
        if not all(kernel % 2 for kernel in kernels):
            raise UserError(f"--kernels must be odd, so that every snippet keeps its place, not {kernels}")
        self.visual_length, self.visual_width = visual_length, visual_width
        self.sample_ratio, self.batch_ratio, self.normal_weight = sample_ratio, batch_ratio, normal_weight
        self.first_weight, self.second_weight = first_weight, second_weight
        channels = hidden_width // first_ratio, hidden_width // second_ratio
        self.normal_head = NormalityHead(hidden_width, *channels, kernels)
        self.embedding = Embedding(visual_width, hidden_width)
        self.selfatt = GlobalLocalTransformer(hidden_width, visual_layers, visual_head, head_width, mlp_width, 0.0)

    @classmethod
    def sampling_of(cls, options: Mapping[str, Any]) -> SegmentSampling:
        return SegmentSampling(options["visual_length"])

    def forward(self, visual: Tensor, lengths: Tensor | None = None) -> DistanceOutput:
        """The logit is the log of the released score x = (distance + distance) · score: its sigmoid is x / (1 + x)."""
        self.check_visual(visual, any_length=True)
        hidden = self.selfatt(self.embedding(visual))
        scores, first, second = self.normal_head(hidden.transpose(1, 2))
        logits = ((first + second) * scores).log().unsqueeze(-1)
        return DistanceOutput(logits, scores=scores, first=first, second=second)

    def losses(self, output: DistanceOutput, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        return {
            "normal": self.normal_weight * output.scores.chunk(2)[0].norm(dim=1).mean(),
            "first": self.first_weight * self.pair_loss(output.first),
            "second": self.second_weight * self.pair_loss(output.second),
        }

    def pair_loss(self, distances: Tensor) -> Tensor:
        """Mean of max(0, d_normal − d_anomalous + 1) over pairs of selected snippets; distances (2B, T).

        Selected of the anomalous half are the largest of each video and those of the half, listed by video and time.
        The i-th is paired with the i-th of the largest normal ones, listed by rank, then by video. The lists have the
        length of the most that may be selected: to know how many are, a GPU would have to wait.
        """
        normal, anomalous = distances.chunk(2)
        selected = self.select(anomalous.detach())
        most = min(anomalous.numel(), self._per_video(anomalous) * len(anomalous) + self._per_batch(anomalous))
        if not most:
            raise UserError(
                f"--sample-ratio {self.sample_ratio:g} and --batch-ratio {self.batch_ratio:g} select none of "
                f"{len(anomalous)} × {anomalous.shape[1]} snippets (--batch-size × --visual-length): raise one of them"
            )
        # A stable sort lists the selected ones first, in their order.
        chosen = selected.flatten().logical_not().sort(stable=True).indices[:most]
        ranked = normal.gather(1, normal.detach().sort(dim=1, descending=True).indices).T.flatten()[:most]
        count = selected.sum()
        valid = torch.arange(most, device=distances.device) < count
        hinges = F.relu(ranked - anomalous.flatten()[chosen] + 1)
        return torch.where(valid, hinges, 0).sum() / count

    def select(self, anomalous: Tensor) -> Tensor:
        """Mark the largest distances of each video and of all, (B, T) → bool."""
        selected = torch.zeros_like(anomalous, dtype=torch.bool)
        selected.scatter_(1, anomalous.topk(self._per_video(anomalous), dim=1).indices, True)
        return (
            selected.flatten()
            .scatter(0, anomalous.flatten().topk(self._per_batch(anomalous)).indices, True)
            .view_as(selected)
        )

    def _per_video(self, anomalous: Tensor) -> int:
        return int(anomalous.shape[1] * self.sample_ratio)

    def _per_batch(self, anomalous: Tensor) -> int:
        return int(anomalous.numel() * self.batch_ratio)

    @classmethod
    def matches_state_dict(cls, state: Mapping[str, Tensor]) -> bool:
        return "normal_head.bn1.running_mean" in state
