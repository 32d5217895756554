"""VadCLIP's two branches, from which other methods are built, with the released checkpoints' parameter names."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad import losses
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option, layers, non_negative, size
from clipfusionvad.models.base import EmbedDim, TextMethod, VADOutput, VisualLength, VisualWidth, isolated_rng
from clipfusionvad.models.clip import CONTEXT_LENGTH, ClipWeights
from clipfusionvad.models.layers.text import ClipTextTower, FixedPrompts, LearnedPrompts, PromptKind, PromptTemplate
from clipfusionvad.models.layers.transformer import MLP, QuickGELU, WindowTransformer

# Options that methods of this visual branch have.
VisualHead = Annotated[int, size("attention heads of the temporal transformer")]
VisualLayers = Annotated[int, layers("layers of the temporal transformer")]
AttentionWindow = Annotated[int, size("snippets that attend to each other; divides --visual-length")]

TEMPERATURE = 0.07
EMBEDDING_STD = 0.01
SIMILARITY_THRESHOLD = 0.7


class GraphConvolution(nn.Module):
    """adjacency · (x · W) + residual; the residual is a Conv1d of kernel 5 where widths differ, else x."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_width, out_width))
        nn.init.xavier_uniform_(self.weight)
        self.residual = None if in_width == out_width else nn.Conv1d(in_width, out_width, kernel_size=5, padding=2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """x (B, T, in), adjacency (B, T, T) or (T, T) → (B, T, out)."""
        residual = x if self.residual is None else self.residual(x.transpose(1, 2)).transpose(1, 2)
        return adjacency @ (x @ self.weight) + residual


def similarity_adjacency(x: Tensor, lengths: Tensor) -> Tensor:
    """Row-softmax of the thresholded cosine similarities on each video's valid L×L corner, zero elsewhere.

    x (B, T, D), lengths (B,) → (B, T, T). Cosines up to 0.7 count as 0 but stay in the softmax (released VadCLIP).
    """
    norms = x.norm(dim=-1, keepdim=True)
    cosine = x @ x.transpose(1, 2) / (norms @ norms.transpose(1, 2) + 1e-20)
    kept = torch.where(cosine > SIMILARITY_THRESHOLD, cosine, 0)
    valid = losses.valid_mask(lengths, x.shape[1])
    weights = kept.masked_fill(~valid[:, None, :], -torch.inf).softmax(dim=-1)
    return weights * valid[:, :, None]


class DistanceAdjacency(nn.Module):
    """exp(−|i − j| / e) for all T×T. The released code does not read ``sigma`` either, but its checkpoints hold it."""

    sigma: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sigma", torch.full((1,), 0.1))

    def forward(self, length: int) -> Tensor:
        steps = torch.arange(length, device=self.sigma.device, dtype=torch.float32)
        return torch.exp(-(steps[:, None] - steps).abs() / math.e)


class GlobalAttentionModule(nn.Module):
    """GAM of ClipFusionVAD: a channel gate per snippet, then a gate along time, each multiplied onto its input.

    Padded snippets take part in the convolutions and in BatchNorm (released code).
    """

    def __init__(self, width: int, rate: int = 4):
        super().__init__()
        hidden = width // rate
        self.channel_attention = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.spatial_attention = nn.Sequential(
            nn.Conv1d(width, hidden, kernel_size=7, padding=3),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Conv1d(hidden, width, kernel_size=7, padding=3),
            nn.BatchNorm1d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        x = x * torch.sigmoid(self.channel_attention(x))
        gate = torch.sigmoid(self.spatial_attention(x.transpose(1, 2)))
        return x * gate.transpose(1, 2)


class DualBranch(TextMethod):
    """A coarse (binary) and a fine (class alignment) branch.

    Visual features, summed with their coarse logits as weights, are a visual prompt, which is added to the class text
    with which they are aligned. As released, padding is not masked in attention, distance graph and convolutions.
    """

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
        prompt_prefix: Annotated[int, layers("learned tokens before the class name")] = 10,
        prompt_postfix: Annotated[int, layers("learned tokens after the class name")] = 10,
        prompts: PromptKind = "learned",
        prompt_template: PromptTemplate = "{}",
        graph: Annotated[bool, Option("both graph branches")] = True,
        similarity_graph: Annotated[bool, Option("graph of similar snippets")] = True,
        distance_graph: Annotated[bool, Option("graph of neighbouring snippets")] = True,
        product: Annotated[bool, Option("visual prompt added to the text features")] = True,
        separation_weight: Annotated[float, non_negative("weight of the text separation loss")] = 0.1,
    ):
        super().__init__()
        if visual_length % attn_window:
            raise UserError(f"--visual-length {visual_length} is not a multiple of --attn-window {attn_window}")
        if visual_width % visual_head or visual_width % 4:
            raise UserError(f"--visual-width {visual_width} must be a multiple of 4 and of --visual-head {visual_head}")
        self.visual_length, self.visual_width = visual_length, visual_width
        self.separation_weight, self.product = separation_weight, product

        self.frame_position_embeddings = nn.Embedding(visual_length, visual_width)
        nn.init.normal_(self.frame_position_embeddings.weight, std=EMBEDDING_STD)
        with isolated_rng("temporal"):
            self.temporal = WindowTransformer(visual_width, visual_layers, visual_head, attn_window)
        self.similarity_graph, self.distance_graph = graph and similarity_graph, graph and distance_graph
        half = visual_width // 2
        if self.similarity_graph:
            with isolated_rng("similarity graph"):
                self.gc1, self.gc2 = GraphConvolution(visual_width, half), GraphConvolution(half, half)
        if self.distance_graph:
            with isolated_rng("distance graph"):
                self.gc3, self.gc4 = GraphConvolution(visual_width, half), GraphConvolution(half, half)
        self.disAdj = DistanceAdjacency()
        self.gelu = QuickGELU()
        self.linear = nn.Linear(visual_width, visual_width)

        if product:
            with isolated_rng("product"):
                self.mlp1 = MLP(visual_width)
        self.mlp2 = MLP(visual_width)
        self.classifier = nn.Linear(visual_width, 1)

        self.prompts: FixedPrompts | LearnedPrompts
        self.text_prompt_embeddings: nn.Embedding | None = None
        if clip is None:
            return
        clip.check_widths(embed_dim, visual_width)
        self.clipmodel = ClipTextTower(clip)
        if prompts == "fixed":
            self.prompts = FixedPrompts(class_prompts, prompt_template)
            return
        self.prompts = LearnedPrompts(class_prompts, prompt_prefix, prompt_postfix)
        with isolated_rng("prompts"):
            self.text_prompt_embeddings = nn.Embedding(CONTEXT_LENGTH, embed_dim)
            nn.init.normal_(self.text_prompt_embeddings.weight, std=EMBEDDING_STD)

    def forward(self, visual: Tensor, lengths: Tensor | None = None, text: Tensor | None = None) -> VADOutput:
        text = self.encode_once() if text is None else text
        x = self.encode_video(visual, lengths)
        coarse = self.classifier(x + self.mlp2(x))
        classes = self.fuse(text, F.normalize(coarse.transpose(1, 2) @ x, dim=-1)) if self.product else text
        return VADOutput(coarse, self.align(x, classes), text)

    def encode_temporal(self, visual: Tensor) -> Tensor:
        """Position embedding and windowed transformer: (B, T, D) → (B, T, D)."""
        return self.temporal.encode(visual, self.frame_position_embeddings.weight)

    def encode_video(self, visual: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The visual branch up to the fusion: (B, T, D) → (B, T, D)."""
        self.check_visual(visual)
        x = self.encode_temporal(visual)
        if not (self.similarity_graph or self.distance_graph):
            return self.linear(x)
        similar = close = x.new_zeros(()).expand(*x.shape[:2], x.shape[2] // 2)
        if self.similarity_graph:
            if lengths is None:
                lengths = torch.full((len(x),), x.shape[1], device=x.device)
            adjacency = similarity_adjacency(x, lengths)
            similar = self.gelu(self.gc2(self.gelu(self.gc1(x, adjacency)), adjacency))
        if self.distance_graph:
            adjacency = self.disAdj(x.shape[1]).to(x.dtype)
            close = self.gelu(self.gc4(self.gelu(self.gc3(x, adjacency)), adjacency))
        return self.linear(torch.cat([similar, close], dim=-1))

    def encode_text(self) -> Tensor:
        """Return the text features of the class prompts, not normalised: (C, E)."""
        return self.prompts(self.clipmodel, self.context_table)

    @property
    def context_table(self) -> Tensor | None:
        """The learned tokens (77, W), or None for hand-written prompts."""
        return None if self.text_prompt_embeddings is None else self.text_prompt_embeddings.weight

    def context_vectors(self) -> Tensor | None:
        """Return the rows of the learned table that are in the prompt of any class, before EOT."""
        if self.context_table is None:
            return None
        before = losses.valid_mask(self.prompts.layout.ends, self.prompts.learned.shape[1])
        seen = (self.prompts.learned.squeeze(-1) & before).any(dim=0)
        return self.context_table[: len(seen)][seen]

    def fuse(self, text: Tensor, prompt: Tensor) -> Tensor:
        """Add the visual prompt (B, 1, D) of each video to the text features (C, D): (B, C, D)."""
        fused = text + prompt
        return fused + self.mlp1(fused)

    def align(self, visual: Tensor, text: Tensor) -> Tensor:
        """Cosine similarity over the temperature: (B, T, D) with (B, C, D) or (C, D) → (B, T, C)."""
        return F.normalize(visual, dim=-1) @ F.normalize(text, dim=-1).transpose(-1, -2) / TEMPERATURE

    def losses(self, output: VADOutput, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        return {
            "coarse": losses.coarse_mil_loss(output.coarse_logits, targets, lengths),
            "fine": losses.fine_mil_loss(output.fine_logits, targets, lengths),
            "separation": losses.text_separation_loss(output.text_features, self.separation_weight),
        }
