"""ReFLIP-VAD's temporal network: Feature Intensify Module, Glimpse (along time), Emphasize (across channels).

B videos, T snippets, D feature width; ``valid`` (B, T) marks the snippets that are not padding. Padding is zero where
a convolution along time reads it, and it is not attended to, so that it changes nothing in evaluation.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option, layers, non_negative, size
from clipfusionvad.models.base import isolated_rng

# Factors by which the channel squeezers reduce the features (paper: D/32 and D/16).
GLIMPSE_SQUEEZE, EMPHASIZE_SQUEEZE = 32, 16
EMPHASIZE_INPUTS = ("full", "squeezed")


@dataclass(frozen=True)
class TemporalOptions:
    """Which modules the network has, and how we read what the paper leaves open (docs/methods.md)."""

    fim: Annotated[bool, Option("feature intensify module")] = True
    fim_alpha: Annotated[float, non_negative("its factor (not published)")] = 0.1
    fim_kernel: Annotated[int, size("snippets that its convolution sees (not published)")] = 3
    glimpse: Annotated[bool, Option("attention along time")] = True
    glimpse_window: Annotated[int, layers("snippets that attend to each other in Glimpse, our reading; 0: all")] = 64
    glimpse_scale: Annotated[bool, Option("scale the dot products (the paper's equation does not)")] = False
    emphasize: Annotated[bool, Option("self product of the channels")] = True
    emphasize_input: Annotated[
        str,
        Option("input of Emphasize: Glimpse added to its own input, or its D/32 channels", choices=EMPHASIZE_INPUTS),
    ] = "full"
    sam_mean: Annotated[bool, Option("self product with the mean channel, or with their sum")] = True
    squeeze_kernel: Annotated[int, size("kernel of both squeezers (not published)")] = 3
    ffn_expansion: Annotated[int, size("hidden over outer width of feed-forward layers (not published)")] = 4
    block_residual: Annotated[bool, Option("residuals in Glimpse and Emphasize (not stated in the paper)")] = True


class FeedForward(nn.Sequential):
    """Linear D → expansion · D, GELU, Linear back."""

    def __init__(self, width: int, expansion: int):
        super().__init__(nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width))


class SegmentAttention(nn.Module):
    """Single-head attention along time within windows, of which the last may be shorter."""

    def __init__(self, channels: int, window: int, scaled: bool):
        super().__init__()
        self.window, self.scaled = window, scaled
        self.qkv = nn.Conv1d(channels, 3 * channels, kernel_size=1)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x (B, T, c), valid (B, T) → (B, T, c)."""
        batch, steps, channels = x.shape
        window = min(self.window or steps, steps)
        padding = -steps % window
        qkv = F.pad(self.qkv(x.transpose(1, 2)), (0, padding)).transpose(1, 2)
        q, k, v = qkv.reshape(-1, 1, window, 3 * channels).chunk(3, dim=-1)
        seen = F.pad(valid, (0, padding)).view(-1, 1, window)
        # Padding attends to everything: a row of the softmax must not be empty.
        mask = seen[:, :, None, :] | ~seen[:, :, :, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=None if self.scaled else 1.0)
        return attended.reshape(batch, -1, channels)[:, :steps]


class Glimpse(nn.Module):
    """Channel squeezer, then attention within segments and a feed-forward layer, both after a LayerNorm."""

    def __init__(self, width: int, channels: int, options: TemporalOptions):
        super().__init__()
        self.residual = options.block_residual
        self.squeeze = _same_length(width, channels, options.squeeze_kernel)
        self.attention_norm, self.ffn_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = SegmentAttention(channels, options.glimpse_window, options.glimpse_scale)
        self.ffn = FeedForward(channels, options.ffn_expansion)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x (B, T, D), valid (B, T) → (B, T, channels)."""
        x = self.squeeze(x.transpose(1, 2)).transpose(1, 2)
        x = self.attention(self.attention_norm(x), valid) + self.residual * x
        return self.ffn(self.ffn_norm(x)) + self.residual * x


class Emphasize(nn.Module):
    """BatchNorm (which counts padding), channel squeezer, self product (SAM) and feed-forward layer.

    The self product of channels a is a_l · Σ_m a_m, as printed but for the sum over l, which would leave one channel.
    """

    def __init__(self, width: int, channels: int, options: TemporalOptions):
        super().__init__()
        self.residual, self.mean = options.block_residual, options.sam_mean
        self.norm = nn.BatchNorm1d(width)
        self.squeeze = _same_length(width, channels, options.squeeze_kernel)
        self.ffn_norm = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels, options.ffn_expansion)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x (B, T, width), valid (B, T) → (B, T, channels)."""
        x = self.squeeze(self.norm(x.transpose(1, 2)) * valid[:, None]).transpose(1, 2)
        others = x.mean(dim=-1, keepdim=True) if self.mean else x.sum(dim=-1, keepdim=True)
        x = x * others + self.residual * x
        return self.ffn(self.ffn_norm(x)) + self.residual * x


class GlimpseEmphasize(nn.Module):
    """The three modules in sequence, each optional, and a linear layer back to D.

    Feature Intensify is g + α · Conv1d(‖g‖₂): the norm of every snippet, spread over its D channels.
    Raises ``UserError`` where D is not a multiple of 32, or a kernel is even.
    """

    def __init__(self, width: int, options: TemporalOptions):
        super().__init__()
        self.alpha = options.fim_alpha
        if width % GLIMPSE_SQUEEZE:
            raise UserError(f"--visual-width {width} must be a multiple of {GLIMPSE_SQUEEZE}")
        for flag, kernel in (("--fim-kernel", options.fim_kernel), ("--squeeze-kernel", options.squeeze_kernel)):
            if kernel % 2 == 0:
                raise UserError(f"{flag} {kernel} must be odd, so that the length does not change")
        squeezed, emphasized = width // GLIMPSE_SQUEEZE, width // EMPHASIZE_SQUEEZE
        full = options.emphasize_input == "full" or not options.glimpse
        self.fim = self.glimpse = self.project = self.emphasize = None
        if options.fim:
            with isolated_rng("fim"):
                self.fim = nn.ModuleDict({"conv": _same_length(1, width, options.fim_kernel)})
        if options.glimpse:
            with isolated_rng("glimpse"):
                self.glimpse = Glimpse(width, squeezed, options)
                self.project = nn.Linear(squeezed, width) if full else None
        channels = width if full else squeezed
        if options.emphasize:
            with isolated_rng("emphasize"):
                self.emphasize = Emphasize(channels, emphasized, options)
        with isolated_rng("output"):
            self.output = nn.Linear(emphasized if options.emphasize else channels, width)

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D), valid (B, T) → features (B, T, D), and the norms (B, T) of the last layer's input."""
        kept = valid[..., None]
        x = x * kept
        if self.fim is not None:
            spread = self.fim["conv"](x.norm(dim=-1)[:, None]).transpose(1, 2)
            x = (x + self.alpha * spread) * kept
        if self.glimpse is not None:
            seen = self.glimpse(x, valid)
            x = seen if self.project is None else x + self.project(seen)
        if self.emphasize is not None:
            x = self.emphasize(x, valid)
        return self.output(x), torch.linalg.vector_norm(x, dim=-1)


def _same_length(width: int, channels: int, kernel: int) -> nn.Conv1d:
    return nn.Conv1d(width, channels, kernel, padding=kernel // 2)
