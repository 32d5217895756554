"""VadCLIP's two branches, from which other methods are built: visual encoder, text branch, fusion, losses, options.

Parameter names are those of the released checkpoints.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad import losses
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option, layers, non_negative, size
from clipfusionvad.models.base import EmbedDim, Scores, TextMethod, VADOutput, VisualLength, VisualWidth, isolated_rng
from clipfusionvad.models.clip import CONTEXT_LENGTH, ClipWeights
from clipfusionvad.models.layers.graph import DistanceAdjacency, GraphConvolution, similarity_adjacency
from clipfusionvad.models.layers.text import ClipTextTower, FixedPrompts, LearnedPrompts
from clipfusionvad.models.layers.transformer import MLP, QuickGELU, WindowTransformer

TEMPERATURE = 0.07
EMBEDDING_STD = 0.01
PROMPTS = ("learned", "fixed")


class DualBranch(TextMethod):
    """A coarse (binary) and a fine (class alignment) branch.

    Coarse logits are computed from the visual features. Weighted by them, these sum to a visual prompt, which is added
    to the class text with which the visual features are aligned. Padded snippets are not masked in attention, distance
    graph and convolutions, as in the released code.
    """

    branches = 2

    def __init__(
        self,
        class_prompts: list[str],
        clip: ClipWeights,
        *,
        embed_dim: EmbedDim = 512,
        visual_length: VisualLength = 256,
        visual_width: VisualWidth = 512,
        visual_head: Annotated[int, size("attention heads of the temporal transformer")] = 1,
        visual_layers: Annotated[int, layers("layers of the temporal transformer")] = 2,
        attn_window: Annotated[int, size("snippets that attend to each other; divides --visual-length")] = 8,
        prompt_prefix: Annotated[int, layers("learned tokens before the class name")] = 10,
        prompt_postfix: Annotated[int, layers("learned tokens after the class name")] = 10,
        prompts: Annotated[
            str, Option("learned context around the class name, or a hand-written template", choices=PROMPTS)
        ] = "learned",
        prompt_template: Annotated[str, Option("with --prompts fixed, e.g. 'a video of {}'")] = "{}",
        graph: Annotated[bool, Option("both graph branches")] = True,
        similarity_graph: Annotated[bool, Option("graph of similar snippets")] = True,
        distance_graph: Annotated[bool, Option("graph of neighbouring snippets")] = True,
        product: Annotated[bool, Option("visual prompt added to the text features")] = True,
        separation_weight: Annotated[float, non_negative("weight of the text separation loss")] = 0.1,
    ):
        super().__init__()
        clip.check_widths(embed_dim, visual_width)
        _check_shapes(visual_length, visual_width, visual_head, attn_window)
        self.visual_length, self.visual_width = visual_length, visual_width
        self.separation_weight = separation_weight
        self.product = product

        self.frame_position_embeddings = nn.Embedding(visual_length, visual_width)
        nn.init.normal_(self.frame_position_embeddings.weight, std=EMBEDDING_STD)
        with isolated_rng("temporal"):
            self.temporal = WindowTransformer(visual_width, visual_layers, visual_head, attn_window)
        self.similarity_graph = graph and similarity_graph
        self.distance_graph = graph and distance_graph
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

        self.clipmodel = ClipTextTower(clip)
        self.prompts: LearnedPrompts | FixedPrompts
        self.text_prompt_embeddings: nn.Embedding | None = None
        if prompts == "learned":
            self.prompts = LearnedPrompts(class_prompts, prompt_prefix, prompt_postfix)
            with isolated_rng("prompts"):
                self.text_prompt_embeddings = nn.Embedding(CONTEXT_LENGTH, embed_dim)
                nn.init.normal_(self.text_prompt_embeddings.weight, std=EMBEDDING_STD)
        else:
            self.prompts = FixedPrompts(class_prompts, prompt_template)

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
        x = self.encode_temporal(visual)
        if self.similarity_graph or self.distance_graph:
            x = torch.cat([self._similar(x, lengths), self._close(x)], dim=-1)
        return self.linear(x)

    def _similar(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        if not self.similarity_graph:
            return torch.zeros_like(x[..., : x.shape[-1] // 2])
        if lengths is None:
            lengths = torch.full((len(x),), x.shape[1], device=x.device)
        adjacency = similarity_adjacency(x, lengths)
        return self.gelu(self.gc2(self.gelu(self.gc1(x, adjacency)), adjacency))

    def _close(self, x: Tensor) -> Tensor:
        if not self.distance_graph:
            return torch.zeros_like(x[..., : x.shape[-1] // 2])
        adjacency = self.disAdj(x.shape[1]).to(x.dtype)
        return self.gelu(self.gc4(self.gelu(self.gc3(x, adjacency)), adjacency))

    def encode_text(self) -> Tensor:
        """Return the text features of the class prompts, not normalised: (C, E)."""
        return self.prompts(self.clipmodel, self.context_table)

    @property
    def context_table(self) -> Tensor | None:
        """The learned tokens (77, W), or None for hand-written prompts."""
        return None if self.text_prompt_embeddings is None else self.text_prompt_embeddings.weight

    def context_vectors(self) -> Tensor | None:
        """Return the rows of the learned table that are in the prompt of any class."""
        if self.context_table is None or not isinstance(self.prompts, LearnedPrompts):
            return None
        seen = self.prompts.seen
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

    def scores(self, output: VADOutput) -> Scores:
        return two_branch_scores(output)


def two_branch_scores(output: VADOutput) -> Scores:
    """The sigmoid of the coarse logits, and 1 − P(normal) of the softmax over classes."""
    classes = output.fine_logits.float().softmax(dim=-1)
    return Scores((torch.sigmoid(output.coarse_logits.float()).squeeze(-1), 1 - classes[..., 0]), classes)


def _check_shapes(visual_length: int, visual_width: int, visual_head: int, attn_window: int) -> None:
    if visual_length % attn_window:
        raise UserError(f"--visual-length {visual_length} is not a multiple of --attn-window {attn_window}")
    if visual_width % visual_head or visual_width % 4:
        raise UserError(f"--visual-width {visual_width} must be a multiple of 4 and of --visual-head {visual_head}")
