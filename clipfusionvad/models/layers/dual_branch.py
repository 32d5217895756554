"""VadCLIP's two branches, which others build on: visual encoder, text branch, fusion, losses and options.

Parameter names are those of the released checkpoints.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad import losses
from clipfusionvad.io.argtypes import layers, non_negative_float, size
from clipfusionvad.io.errors import UserError
from clipfusionvad.models.base import Method, Scores, VADOutput, own_stream
from clipfusionvad.models.clip import CONTEXT_LENGTH, ClipWeights
from clipfusionvad.models.layers.graph import DistanceAdjacency, GraphConvolution, similarity_adjacency
from clipfusionvad.models.layers.text import ClipTextTower, FixedPrompts, LearnedPrompts
from clipfusionvad.models.layers.transformer import MLP, QuickGELU, WindowTransformer

TEMPERATURE = 0.07
EMBEDDING_STD = 0.01


class DualBranch(Method):
    """A coarse (binary) and a fine (class alignment) branch.

    Coarse logits come from the visual features. They weigh these into a visual prompt, which is added to the class
    text that the visual features are aligned with. Padded snippets are not masked in attention, distance graph and
    convolutions, as in the released code.
    """

    branches = 2

    def __init__(
        self,
        class_prompts: list[str],
        clip: ClipWeights,
        *,
        embed_dim: int = 512,
        visual_length: int = 256,
        visual_width: int = 512,
        visual_head: int = 1,
        visual_layers: int = 2,
        attn_window: int = 8,
        prompt_prefix: int = 10,
        prompt_postfix: int = 10,
        prompts: str = "learned",
        prompt_template: str = "{}",
        similarity_graph: bool = True,
        distance_graph: bool = True,
        graph: bool = True,
        product: bool = True,
        separation_weight: float = 0.1,
    ):
        super().__init__()
        clip.check_widths(embed_dim, visual_width)
        _check_shapes(visual_length, visual_width, visual_head, attn_window)
        self.visual_length, self.visual_width = visual_length, visual_width
        self.separation_weight = separation_weight
        self.product = product

        self.frame_position_embeddings = nn.Embedding(visual_length, visual_width)
        nn.init.normal_(self.frame_position_embeddings.weight, std=EMBEDDING_STD)
        with own_stream("temporal"):
            self.temporal = WindowTransformer(visual_width, visual_layers, visual_head, attn_window)
        self.similarity_graph = graph and similarity_graph
        self.distance_graph = graph and distance_graph
        half = visual_width // 2
        if self.similarity_graph:
            with own_stream("similarity graph"):
                self.gc1, self.gc2 = GraphConvolution(visual_width, half), GraphConvolution(half, half)
        if self.distance_graph:
            with own_stream("distance graph"):
                self.gc3, self.gc4 = GraphConvolution(visual_width, half), GraphConvolution(half, half)
        self.disAdj = DistanceAdjacency()
        self.gelu = QuickGELU()
        self.linear = nn.Linear(visual_width, visual_width)

        if product:
            with own_stream("product"):
                self.mlp1 = MLP(visual_width)
        self.mlp2 = MLP(visual_width)
        self.classifier = nn.Linear(visual_width, 1)

        self.clipmodel = ClipTextTower(clip)
        self.prompts: LearnedPrompts | FixedPrompts
        self.text_prompt_embeddings: nn.Embedding | None = None
        if prompts == "learned":
            self.prompts = LearnedPrompts(class_prompts, prompt_prefix, prompt_postfix)
            with own_stream("prompts"):
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
        """Text features of the class prompts, not normalised: (C, E)."""
        if self.text_prompt_embeddings is None:
            return self.prompts(self.clipmodel)
        return self.prompts(self.clipmodel, self.text_prompt_embeddings.weight)

    def context_vectors(self) -> Tensor | None:
        """The rows of the learned table that are in the prompt of any class."""
        learned = self.text_prompt_embeddings
        if learned is None or not isinstance(self.prompts, LearnedPrompts):
            return None
        seen = self.prompts.seen
        return learned.weight[: len(seen)][seen]

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
        classes = output.fine_logits.float().softmax(dim=-1)
        return Scores((torch.sigmoid(output.coarse_logits.float()).squeeze(-1), 1 - classes[..., 0]), classes)

    @classmethod
    def add_options(cls, group: argparse._ArgumentGroup) -> None:
        switch = argparse.BooleanOptionalAction
        group.add_argument("--visual-head", type=size, help="attention heads of the temporal transformer")
        group.add_argument("--visual-layers", type=layers, help="layers of the temporal transformer")
        group.add_argument("--attn-window", type=size, help="snippets that see each other; divides --visual-length")
        group.add_argument("--prompt-prefix", type=layers, help="learned tokens before the class name")
        group.add_argument("--prompt-postfix", type=layers, help="learned tokens after the class name")
        group.add_argument(
            "--prompts",
            choices=["learned", "fixed"],
            default="learned",
            help="learned context around the class name, or a hand-written template",
        )
        group.add_argument("--prompt-template", default="{}", help="with --prompts fixed, e.g. 'a video of {}'")
        group.add_argument("--graph", action=switch, default=True, help="both graph branches")
        group.add_argument("--similarity-graph", action=switch, default=True, help="graph of similar snippets")
        group.add_argument("--distance-graph", action=switch, default=True, help="graph of neighbouring snippets")
        group.add_argument("--product", action=switch, default=True, help="visual prompt added to the text features")
        group.add_argument("--separation-weight", type=non_negative_float, help="weight of the text separation loss")


def _check_shapes(visual_length: int, visual_width: int, visual_head: int, attn_window: int) -> None:
    if visual_length % attn_window:
        raise UserError(f"--visual-length {visual_length} is not a multiple of --attn-window {attn_window}")
    if visual_width % visual_head or visual_width % 4:
        raise UserError(f"--visual-width {visual_width} must be a multiple of 4 and of --visual-head {visual_head}")
