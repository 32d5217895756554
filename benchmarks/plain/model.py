"""ClipFusionVAD as its original program computes it: sequence-first, masked, one class and one video at a time.

Parameters have the names of the package's model, so that ``load_state_dict`` takes its weights as they are.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.distance import pdist, squareform
from torch import Tensor, nn

from clipfusionvad.models.clip import CONTEXT_LENGTH, ClipWeights, tokenize

TEMPERATURE = 0.07


class Output(NamedTuple):
    """text_features (C, E), coarse_logits (B, T, 1), fine_logits (B, T, C)."""

    text_features: Tensor
    coarse_logits: Tensor
    fine_logits: Tensor


class PlainClipFusionVAD(nn.Module):
    """The whole model. Each forward tokenises and encodes all prompts twice, at all 77 tokens."""

    def __init__(
        self,
        class_prompts: Sequence[str],
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
        separation_weight: float = 0.1,
    ):
        super().__init__()
        self.class_prompts, self.separation_weight = list(class_prompts), separation_weight
        self.prefix, self.postfix = prompt_prefix, prompt_postfix
        half = visual_width // 2
        self.frame_position_embeddings = nn.Embedding(visual_length, visual_width)
        self.temporal = Transformer(visual_width, visual_layers, visual_head, block_mask(visual_length, attn_window))
        self.gc1, self.gc2 = GraphConvolution(visual_width, half), GraphConvolution(half, half)
        self.gc3, self.gc4 = GraphConvolution(visual_width, half), GraphConvolution(half, half)
        self.disAdj = DistanceAdjacency()
        self.gelu = QuickGELU()
        self.linear = nn.Linear(visual_width, visual_width)
        self.gam_attention = GlobalAttention(visual_width)
        self.head_video = nn.Linear(visual_width, visual_width)
        self.u_head_video = nn.Linear(visual_width, visual_width)
        self.mlp1, self.mlp2 = mlp(visual_width), mlp(visual_width)
        self.classifier = nn.Linear(visual_width, 1)
        self.clipmodel = TextTower(clip)
        self.text_prompt_embeddings = nn.Embedding(CONTEXT_LENGTH, embed_dim)

    def forward(self, visual: Tensor, lengths: Tensor) -> Output:
        """visual (B, T, D), lengths (B,) valid snippets."""
        x = self.gam_attention(self.encode_video(visual, lengths))
        v, u = (head(x) for head in (self.head_video, self.u_head_video))
        v, u = v / v.norm(dim=-1, keepdim=True), u / u.norm(dim=-1, keepdim=True)
        coarse = self.classifier(x + self.mlp2(v + u))
        text_for_loss = self.encode_prompts()
        text = self.encode_prompts()
        text = text / text.norm(dim=-1, keepdim=True)
        weighed = coarse.permute(0, 2, 1) @ u
        prompt = weighed / weighed.norm(dim=-1, keepdim=True)
        fused = text.unsqueeze(0).expand(len(visual), -1, -1) + prompt.expand(-1, len(text), -1)
        fused = fused + self.mlp1(fused)
        fused = fused / fused.norm(dim=-1, keepdim=True)
        return Output(text_for_loss, coarse, v @ fused.permute(0, 2, 1) / TEMPERATURE)

    def encode_video(self, visual: Tensor, lengths: Tensor) -> Tensor:
        positions = torch.arange(visual.shape[1], device=visual.device).unsqueeze(0).expand(len(visual), -1)
        x = visual.permute(1, 0, 2) + self.frame_position_embeddings(positions).permute(1, 0, 2)
        x = self.temporal(x).permute(1, 0, 2)
        similar, close = similarity_adjacency(x, lengths), self.disAdj(*x.shape[:2])
        first = self.gelu(self.gc2(self.gelu(self.gc1(x, similar)), similar))
        second = self.gelu(self.gc4(self.gelu(self.gc3(x, close)), close))
        return self.linear(torch.cat([first, second], dim=2))

    def encode_prompts(self) -> Tensor:
        """Text features (C, E), the prompts put together class by class."""
        device = self.text_prompt_embeddings.weight.device
        words = tokenize(self.class_prompts).to(device)
        embedded = self.clipmodel.token_embedding(words)
        table = self.text_prompt_embeddings(torch.arange(CONTEXT_LENGTH, device=device))
        prompts = table.unsqueeze(0).repeat(len(words), 1, 1)
        tokens = torch.zeros_like(words)
        for row in range(len(words)):
            end = int(torch.argmax(words[row]))
            prompts[row, 0] = embedded[row, 0]
            prompts[row, self.prefix + 1 : self.prefix + end] = embedded[row, 1:end]
            prompts[row, self.prefix + end + self.postfix] = embedded[row, end]
            tokens[row, self.prefix + end + self.postfix] = words[row, end]
        return self.clipmodel(prompts, tokens)

    def losses(self, output: Output, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The three terms, video by video and class by class; targets (B, C) multi-hot."""
        coarse, fine = [], []
        for video, length in enumerate(lengths.tolist()):
            k = int(length / 16 + 1)
            coarse.append(torch.sigmoid(output.coarse_logits[video, :length, 0]).topk(k).values.mean())
            fine.append(output.fine_logits[video, :length].topk(k, dim=0).values.mean(dim=0))
        shares = targets / targets.sum(dim=1, keepdim=True)
        normal, *others = output.text_features / output.text_features.norm(dim=-1, keepdim=True)
        similar = sum(torch.abs(normal @ other) for other in others)
        return {
            "coarse": F.binary_cross_entropy(torch.stack(coarse), 1 - targets[:, 0]),
            "fine": -(shares * F.log_softmax(torch.stack(fine), dim=1)).sum(dim=1).mean(),
            "separation": similar / len(others) * self.separation_weight,
        }


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def mlp(width: int) -> nn.Sequential:
    parts = (("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width)))
    return nn.Sequential(OrderedDict(parts))


class Block(nn.Module):
    """CLIP's residual attention block over (S, N, D), every position against every other, under a mask."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, mask: Tensor):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(S, N, D) → (S, N, D)."""
        for block in self.resblocks:
            x = block(x, self.mask)
        return x


def block_mask(length: int, window: int) -> Tensor:
    """(T, T): 0 where two snippets are of one window, −inf elsewhere."""
    mask = torch.full((length, length), -torch.inf)
    for start in range(0, length, window):
        mask[start : start + window, start : start + window] = 0
    return mask


class TextTower(nn.Module):
    """CLIP's frozen text tower, over all 77 positions."""

    def __init__(self, clip: ClipWeights):
        super().__init__()
        state, width = clip.state, clip.text_width
        layers = len({key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")})
        causal = torch.full((CONTEXT_LENGTH, CONTEXT_LENGTH), -torch.inf).triu(1)
        self.token_embedding = nn.Embedding(*state["token_embedding.weight"].shape)
        self.positional_embedding = nn.Parameter(torch.empty(CONTEXT_LENGTH, width))
        self.transformer = Transformer(width, layers, max(1, width // 64), causal)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(state["text_projection"].shape))
        self.load_state_dict({key: state[key].float() for key in self.state_dict()})
        self.requires_grad_(False)

    def forward(self, embeddings: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings (C, 77, W) and tokens (C, 77), of which EOT is the largest → (C, E)."""
        x = (embeddings + self.positional_embedding).permute(1, 0, 2)
        x = self.ln_final(self.transformer(x).permute(1, 0, 2))
        return x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)] @ self.text_projection


class GraphConvolution(nn.Module):
    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_width, out_width))
        self.residual = None if in_width == out_width else nn.Conv1d(in_width, out_width, kernel_size=5, padding=2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """x (B, T, in), adjacency (B, T, T) → (B, T, out)."""
        residual = x if self.residual is None else self.residual(x.permute(0, 2, 1)).permute(0, 2, 1)
        return adjacency.matmul(x.matmul(self.weight)) + residual


def similarity_adjacency(x: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, D) → (B, T, T), each video's valid corner by itself."""
    norms = torch.norm(x, p=2, dim=2, keepdim=True)
    cosine = x.matmul(x.permute(0, 2, 1)) / (norms.matmul(norms.permute(0, 2, 1)) + 1e-20)
    adjacency = torch.zeros_like(cosine)
    for video, length in enumerate(lengths.tolist()):
        corner = F.threshold(cosine[video, :length, :length], 0.7, 0)
        adjacency[video, :length, :length] = F.softmax(corner, dim=1)
    return adjacency


class DistanceAdjacency(nn.Module):
    """exp(−|i − j| / e), computed on the CPU for every call and repeated for every video."""

    def __init__(self):
        super().__init__()
        self.sigma = nn.Parameter(torch.full((1,), 0.1), requires_grad=False)

    def forward(self, videos: int, length: int) -> Tensor:
        steps = np.arange(length, dtype=np.float64).reshape(-1, 1)
        distances = torch.from_numpy(squareform(pdist(steps, "cityblock"))).to(self.sigma)
        return torch.exp(-distances / np.e).unsqueeze(0).repeat(videos, 1, 1)


class GlobalAttention(nn.Module):
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
        x = x.permute(0, 2, 1)
        x = x * self.channel_attention(x.permute(0, 2, 1)).permute(0, 2, 1).sigmoid()
        return (x * self.spatial_attention(x).sigmoid()).permute(0, 2, 1)
