"""Parts of the baselines as their original programs compute them, to be put in the place of the package's."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain.model import block_mask
from clipfusionvad.models import bnwvad, cliptsa, pel4vad
from clipfusionvad.models.layers import global_local, magnitude, text, transformer


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Let all models compute as the original programs do; the results are the same up to rounding."""
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (magnitude.NonLocal, "forward", non_local),
            (global_local.GlobalLocalAttention, "forward", global_local_attention),
            (cliptsa.HardAttention, "forward", hard_attention),
            (bnwvad.BNWVAD, "pair_loss", pair_loss),
            (pel4vad.TwoRangeAttention, "in_window", in_window),
            (pel4vad.PEL4VAD, "text_loss", text_loss),
            (transformer.WindowTransformer, "encode", encode_masked),
            (text.ClipTextTower, "hidden", encode_all_tokens),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def non_local(self: magnitude.NonLocal, x: Tensor) -> Tensor:
    g, theta, phi = (conv(x).transpose(1, 2) for conv in (self.g, self.theta, self.phi))
    weights = theta @ phi.transpose(1, 2) / x.shape[2]
    return x + self.W((weights @ g).transpose(1, 2).contiguous())


def global_local_attention(self: global_local.GlobalLocalAttention, x: Tensor, _: Tensor) -> Tensor:
    q, k, v, t = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.to_qkv(x).chunk(4, dim=-1))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    steps = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
    local = torch.exp(-torch.abs(steps[:, None] - steps) / math.e)
    local = (local / local.sum(dim=-1))[None, None].repeat(len(x), self.heads, 1, 1)
    return self.to_out(torch.cat([weights @ v, local @ t], dim=-1).transpose(1, 2).flatten(2))


class _OneHot(torch.autograd.Function):
    """Perturbed top-k with a row for each slot of each sample, and the released gradient."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, noise: Tensor, sigma: float, k: int) -> Tensor:
        order = (scores[:, None] + sigma * noise).topk(k, dim=-1).indices.sort(dim=-1).values
        slots = F.one_hot(order, scores.shape[1]).float()
        ctx.save_for_backward(slots, noise)
        ctx.sigma = sigma
        return slots.mean(dim=1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        slots, noise = ctx.saved_tensors
        gradient = torch.einsum("bskd,bse->bkde", slots, noise) / (noise.shape[1] * ctx.sigma)
        return torch.einsum("bkde,bke->bd", gradient, upstream), None, None, None


def hard_attention(self: cliptsa.HardAttention, x: Tensor) -> Tensor:
    scores = torch.sigmoid(self.scorer["fc2"](F.relu(self.scorer["fc1"](x)))).squeeze(-1)
    indicator = _OneHot.apply(scores, self.noise(scores), self.sigma, max(1, int(self.share * x.shape[1])))
    return torch.einsum("bkt,btd->btd", indicator, x)


def pair_loss(self: bnwvad.BNWVAD, distances: Tensor) -> Tensor:
    normal, anomalous = distances.chunk(2)
    selected = self.select(anomalous.detach())
    count = int(selected.sum())
    chosen = torch.stack([anomalous[row, at] for row, at in selected.nonzero().tolist()])
    depth = count // len(normal) + 1
    ranked = torch.stack([video.topk(min(depth, len(video))).values for video in normal], dim=1).flatten()[:count]
    return F.relu(ranked - chosen + 1).mean()


def in_window(self: pel4vad.TwoRangeAttention, steps: int, device: torch.device) -> Tensor:
    inside = torch.zeros(steps, steps, dtype=torch.bool, device=device)
    for row in range(steps):
        for offset in range(self.window):
            inside[row, min(max(row - self.window // 2 + offset, 0), steps - 1)] = True
    return inside


def text_loss(self: pel4vad.PEL4VAD, output: pel4vad.ContextOutput, targets: Tensor, lengths: Tensor) -> Tensor:
    scores, videos, labels = torch.sigmoid(output.coarse_logits).squeeze(-1), [], []
    longest = int(lengths.max())
    for context, score, target in zip(output.context[:, :longest], scores[:, :longest], targets, strict=True):
        label = int(target[1:].argmax()) + 1 if target[1:].any() else 0
        for part, own in ((score, label), (1 - score, 0))[: 2 if label else 1]:
            weights = torch.exp(10 * part) - 1
            videos.append((weights / weights.sum()) @ context)
            labels.append(own)
    pooled = F.normalize(torch.stack(videos), dim=-1)
    similarity = self.logit_scale.exp() * pooled @ torch.stack([self.texts[label] for label in labels]).T
    match = torch.tensor([[float(one == other) for other in labels] for one in labels], device=pooled.device)
    target = (10 * match).softmax(dim=1)
    return F.kl_div(similarity.softmax(dim=1).log(), target, reduction="batchmean")


def encode_masked(self: transformer.WindowTransformer, visual: Tensor, positions: Tensor) -> Tensor:
    mask = block_mask(visual.shape[1], self.window).to(visual.device)

    def attend(qkv: Tensor, heads: int) -> Tensor:
        q, k, v = transformer.split_heads(qkv, heads)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask).softmax(dim=-1)
        return (weights @ v).transpose(-3, -2).flatten(-2)

    x = visual + positions
    for block in self.resblocks:
        x = block(x, attend)
    return x


def encode_all_tokens(self: text.ClipTextTower, embeddings: Tensor, layout: Any, adapters: Any = ()) -> Tensor:
    """Every prompt at all 77 tokens."""
    count, tokens, width = embeddings.shape
    padded = F.pad(embeddings, (0, 0, 0, len(self.positional_embedding) - tokens))
    x = padded + self.positional_embedding
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, device=x.device).triu(1)

    def attend(qkv: Tensor, heads: int) -> Tensor:
        q, k, v = transformer.split_heads(qkv, heads)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask).softmax(dim=-1)
        return (weights @ v).transpose(-3, -2).flatten(-2)

    for number, block in enumerate(self.transformer.resblocks):
        x = block(x, attend)
        x = adapters[number](x) if number < len(adapters) else x
    return self.ln_final(x[torch.arange(count, device=x.device), layout.ends])
