"""DeepMIL of Sultani et al. (CVPR 2018, arXiv 1801.04264): a perceptron that ranks anomalous above normal videos.

Two PyTorch versions circulate, which differ from each other and from the Keras original. The defaults are those of
Roc-Ng/DeepMIL; ``configs/variants/deepmil_port_ucf.yaml`` has those of ekosman's port.
"""

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

INITS = {"uniform": nn.init.xavier_uniform_, "normal": nn.init.xavier_normal_}


@dataclass(frozen=True, kw_only=True)
class ScoredOutput(VADOutput):
    """Besides the logits, the scores (B, T) that the losses read: in training after dropout."""

    scores: Tensor


@register_method
class DeepMIL(Method):
    """Three linear layers on each segment; the best segment of an anomalous video outranks that of a normal one."""

    name = "deepmil"
    paired = True

    def __init__(
        self,
        classes: int,
        *,
        visual_length: VisualLength = 32,
        visual_width: VisualWidth = 512,
        hidden_width: Annotated[int, size("width of the first hidden layer")] = 512,
        second_width: Annotated[int, size("width of the second hidden layer")] = 32,
        dropout: Annotated[float, Option("dropout of hidden layers", minimum=0, below=1)] = 0.6,
        score_dropout: Annotated[bool, Option("dropout of the score as well, as in Roc-Ng's code")] = True,
        second_relu: Annotated[bool, Option("ReLU after the second layer, as in Roc-Ng's code")] = True,
        init: Annotated[str, Option("distribution of Xavier's initial weights", choices=tuple(INITS))] = "uniform",
        margin: Annotated[float, non_negative("margin of the ranking")] = 1.0,
        smoothness_weight: Annotated[float, non_negative("weight of the squared differences of neighbours")] = 8e-5,
        sparsity_weight: Annotated[float, non_negative("weight of the sum of an anomalous video's scores")] = 8e-5,
        norm_weight: Annotated[float, non_negative("weight of the layers' norms, 0.001 in ekosman's code")] = 0.0,
    ):
        super().__init__()
        self.visual_length, self.visual_width, self.margin = visual_length, visual_width, margin
        self.smoothness_weight, self.sparsity_weight = smoothness_weight, sparsity_weight
        self.norm_weight, self.second_relu, self.score_dropout = norm_weight, second_relu, score_dropout
        self.fc1, self.fc2 = nn.Linear(visual_width, hidden_width), nn.Linear(hidden_width, second_width)
        self.fc3 = nn.Linear(second_width, 1)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.fc1, self.fc2, self.fc3):
            INITS[init](layer.weight)
            if init == "uniform":
                nn.init.zeros_(layer.bias)

    @classmethod
    def sampling_of(cls, options: Mapping[str, Any]) -> SegmentSampling:
        return SegmentSampling(options["visual_length"])

    def forward(self, visual: Tensor, lengths: Tensor | None = None) -> ScoredOutput:
        self.check_visual(visual, any_length=True)
        hidden = self.fc2(self.dropout(F.relu(self.fc1(visual))))
        logits = self.fc3(self.dropout(F.relu(hidden) if self.second_relu else hidden))
        scores = torch.sigmoid(logits.float()).squeeze(-1)
        return ScoredOutput(logits, scores=self.dropout(scores) if self.score_dropout else scores)

    def losses(self, output: ScoredOutput, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        normal, anomalous = output.scores.chunk(2)
        terms = {
            "ranking": losses.ranking_loss(normal.amax(dim=1), anomalous.amax(dim=1), self.margin),
            "smoothness": self.smoothness_weight * anomalous.diff(dim=1).square().sum(dim=1).mean(),
            "sparsity": self.sparsity_weight * anomalous.sum(dim=1).mean(),
        }
        if self.norm_weight:
            layers = (torch.cat([p.flatten() for p in layer.parameters()]) for layer in (self.fc1, self.fc2, self.fc3))
            terms["norms"] = self.norm_weight * torch.stack([layer.norm() for layer in layers]).sum()
        return terms

    @classmethod
    def matches_state_dict(cls, state: Mapping[str, Tensor]) -> bool:
        return state.keys() == {f"fc{layer}.{kind}" for layer in (1, 2, 3) for kind in ("weight", "bias")}
