"""RTFM's network and losses, from which CLIP-TSA is built too, with the released checkpoints' parameter names.

B normal and B anomalous videos, the normal first; c crops, T snippets, D feature width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad.data.sampling import SegmentSampling
from clipfusionvad.io.option import Option, non_negative, size
from clipfusionvad.losses import binary_cross_entropy
from clipfusionvad.models.base import Method, Probabilities, VADOutput, VisualLength, VisualWidth


class NonLocal(nn.Module):
    """x + W(A g(x)) with A = theta(x) · phi(x) / T, not a softmax; at first the identity. (B, C, T) → (B, C, T)."""

    def __init__(self, width: int):
        super().__init__()
        inner = width // 2
        self.g, self.theta, self.phi = (nn.Conv1d(width, inner, kernel_size=1) for _ in range(3))
        self.W = nn.Sequential(nn.Conv1d(inner, width, kernel_size=1), nn.BatchNorm1d(width))
        # The block is the identity until it has learned.
        nn.init.zeros_(cast(nn.BatchNorm1d, self.W[1]).weight)

    def forward(self, x: Tensor) -> Tensor:
        # Without a softmax, the T×T matrix is not needed: this is linear in T.
        context = self.phi(x) @ self.g(x).transpose(1, 2) / x.shape[2]
        return x + self.W((self.theta(x).transpose(1, 2) @ context).transpose(1, 2))


def dilated(width: int, branch_width: int, dilation: int) -> nn.Sequential:
    conv = nn.Conv1d(width, branch_width, kernel_size=3, padding=dilation, dilation=dilation)
    return nn.Sequential(conv, nn.ReLU(), nn.BatchNorm1d(branch_width))


class MultiScale(nn.Module):
    """Three dilated convolutions and a non-local block over time, added to the input: (B, T, D) → (B, T, D)."""

    def __init__(self, width: int, branch_width: int, non_local: bool):
        super().__init__()
        self.conv_1, self.conv_2, self.conv_3 = (dilated(width, branch_width, dilation) for dilation in (1, 2, 4))
        self.conv_4 = nn.Sequential(nn.Conv1d(width, branch_width, kernel_size=1, bias=False), nn.ReLU())
        self.non_local = NonLocal(branch_width) if non_local else nn.Identity()
        conv = nn.Conv1d(4 * branch_width, width, kernel_size=3, padding=1, bias=False)
        self.conv_5 = nn.Sequential(conv, nn.ReLU(), nn.BatchNorm1d(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        branches = [self.conv_1(x), self.conv_2(x), self.conv_3(x), self.non_local(self.conv_4(x))]
        return (self.conv_5(torch.cat(branches, dim=1)) + x).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class MagnitudeOutput(VADOutput):
    """Besides the logits: ``scores`` and ``magnitudes`` (B, T), means over crops, ``features`` (B, c, T, D)."""

    scores: Tensor
    magnitudes: Tensor
    features: Tensor


class MagnitudeMethod(Method):
    """Snippets of large feature magnitude carry the losses: the k = T // 10 largest of each video."""

    paired = True

    def __init__(
        self,
        classes: int,
        *,
        visual_length: VisualLength = 32,
        visual_width: VisualWidth = 512,
        branch_width: Annotated[int | None, size("width of a temporal branch (default: --visual-width / 4)")] = None,
        first_width: Annotated[int | None, size("width of the first hidden layer (default: the method's)")] = None,
        second_width: Annotated[int | None, size("width of the second hidden layer (default: the method's)")] = None,
        dropout: Annotated[float, Option("dropout of features, layers and selection", minimum=0, below=1)] = 0.7,
        multiscale: Annotated[bool, Option("convolutions and non-local block over time")] = True,
        non_local: Annotated[bool, Option("non-local block")] = True,
        margin: Annotated[float, non_negative("magnitude that anomalous videos are drawn to")] = 100.0,
        magnitude_weight: Annotated[float, non_negative("weight of the magnitude loss")] = 1e-4,
        smoothness_weight: Annotated[float, non_negative("weight of the squared differences of neighbours")] = 8e-4,
        sparsity_weight: Annotated[float, non_negative("weight of the norm of the anomalous scores")] = 8e-3,
        across_videos: Annotated[
            bool, Option("smoothness runs across video borders and sparsity is one norm of the batch, as released")
        ] = True,
    ):
        super().__init__()
        self.visual_length, self.visual_width, self.margin = visual_length, visual_width, margin
        self.magnitude_weight, self.across_videos = magnitude_weight, across_videos
        self.smoothness_weight, self.sparsity_weight = smoothness_weight, sparsity_weight
        branch_width, (first, second) = branch_width or max(visual_width // 4, 2), self.hidden_widths(visual_width)
        first, second = first_width or first, second_width or second
        self.Aggregate = MultiScale(visual_width, branch_width, non_local) if multiscale else nn.Identity()
        self.fc1, self.fc2, self.fc3 = nn.Linear(visual_width, first), nn.Linear(first, second), nn.Linear(second, 1)
        self.dropout = nn.Dropout(dropout)
        self.apply(initialise)

    @staticmethod
    def hidden_widths(width: int) -> tuple[int, int]:
        """Return the released widths of the hidden layers for features of a width."""
        return 512, 128

    @classmethod
    def sampling_of(cls, options: Mapping[str, Any]) -> SegmentSampling:
        return SegmentSampling(options["visual_length"])

    def attend(self, visual: Tensor) -> Tensor:
        """What precedes the temporal block: (B, T, D) → (B, T, D)."""
        return visual

    def forward(self, visual: Tensor, lengths: Tensor | None = None) -> MagnitudeOutput:
        """visual (B, T, D), or (B, c, T, D) with crops, over which scores and magnitudes are averaged."""
        crops = visual.unsqueeze(1) if visual.dim() == 3 else visual
        flat = crops.flatten(0, 1)
        self.check_visual(flat, any_length=True)
        features = self.dropout(self.Aggregate(self.attend(flat)))
        hidden = self.dropout(F.relu(self.fc1(features)))
        logits = self.fc3(self.dropout(F.relu(self.fc2(hidden)))).squeeze(-1).unflatten(0, crops.shape[:2])
        features = features.unflatten(0, crops.shape[:2])
        scores, magnitudes = torch.sigmoid(logits.float()).mean(dim=1), features.float().norm(dim=-1).mean(dim=1)
        return MagnitudeOutput(
            logits.mean(dim=1).unsqueeze(-1), scores=scores, magnitudes=magnitudes, features=features
        )

    def scores(self, output: VADOutput) -> Probabilities:
        assert isinstance(output, MagnitudeOutput)
        return Probabilities((output.scores,))

    def losses(self, output: MagnitudeOutput, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        half = len(output.scores) // 2
        # Drawn in the released order.
        chosen_anomalous = self.select(output.magnitudes[half:])
        chosen = torch.cat([self.select(output.magnitudes[:half]), chosen_anomalous])
        bags = output.scores.gather(1, chosen).mean(dim=1)
        anomalous = output.scores[half:]
        if self.across_videos:
            smoothness, sparsity = anomalous.flatten().diff().square().sum(), anomalous.norm()
        else:
            smoothness = anomalous.diff(dim=1).square().sum(dim=1).mean()
            sparsity = anomalous.norm(dim=1).mean()
        normal, abnormal = self.mean_features(output.features, chosen).float().norm(dim=-1).chunk(2)
        return {
            "bce": binary_cross_entropy(bags, 1 - targets[:, 0].to(bags.dtype)),
            "magnitude": self.magnitude_weight * ((self.margin - abnormal).abs() + normal).square().mean(),
            "smoothness": self.smoothness_weight * smoothness,
            "sparsity": self.sparsity_weight * sparsity,
        }

    def select(self, magnitudes: Tensor) -> Tensor:
        """Return the k snippets of largest magnitude after dropout, (B, T) → (B, k)."""
        kept = self.dropout(torch.ones_like(magnitudes))
        return (magnitudes.detach() * kept).topk(max(magnitudes.shape[1] // 10, 1), dim=1).indices

    @staticmethod
    def mean_features(features: Tensor, chosen: Tensor) -> Tensor:
        """Return the mean of the chosen snippets (B, k) of each crop: (B, c, T, D) → (B, c, D)."""
        index = chosen[:, None, :, None].expand(-1, features.shape[1], -1, features.shape[3])
        return features.gather(2, index).mean(dim=2)


def initialise(module: nn.Module) -> None:
    """Xavier-uniform weights and biases of 0 for convolutions and linear layers."""
    if isinstance(module, nn.Conv1d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
