"""A small ReFLIP-VAD, and its modules as their formulas read, one video, snippet and channel at a time."""

import torch
import torch.nn.functional as F

from clipfusionvad import create_model

PROMPTS = ["normal", "fighting", "car accident"]
SMALL = {"embed_dim": 64, "visual_width": 64, "visual_length": 32}
TARGETS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1]])


def small_model(method="reflipvad", seed=0, **options):
    torch.manual_seed(seed)
    return create_model(method, PROMPTS, clip="toy", **{**SMALL, **options})


def small_batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 32, 64, generator=generator), torch.tensor([32, 1, 17, 8, 30])


def disturbed(module):
    """No parameter at a value that hides a mistake, such as the ones and zeros of norms."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, value in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                value += torch.rand(value.shape, generator=generator)
    return module


def plain_conv(x, conv):
    """A convolution along time of one video, (L, in) → (L, out), with zeros beyond its ends."""
    half = conv.kernel_size[0] // 2
    rows = []
    for t in range(len(x)):
        row = conv.bias.clone()
        for step in range(-half, half + 1):
            if 0 <= t + step < len(x):
                row += conv.weight[:, :, step + half] @ x[t + step]
        rows.append(row)
    return torch.stack(rows)


def plain_intensify(x, conv, alpha):
    norms = torch.tensor([sum(v * v for v in snippet.tolist()) ** 0.5 for snippet in x])
    return x + alpha * plain_conv(norms[:, None], conv)


def plain_ffn(x, ffn):
    first, _, second = ffn
    return F.linear(F.gelu(F.linear(x, first.weight, first.bias)), second.weight, second.bias)


def plain_attention(x, attention, window, scaled):
    q, k, v = F.linear(x, attention.qkv.weight[:, :, 0], attention.qkv.bias).chunk(3, dim=1)
    rows = []
    for t in range(len(x)):
        seen = [j for j in range(len(x)) if not window or j // window == t // window]
        weights = torch.stack([q[t] @ k[j] / (x.shape[1] ** 0.5 if scaled else 1) for j in seen]).softmax(0)
        rows.append(sum(weight * v[j] for weight, j in zip(weights, seen, strict=True)))
    return torch.stack(rows)


def plain_glimpse(x, glimpse, options):
    x = plain_conv(x, glimpse.squeeze)
    kept = 1 if options.block_residual else 0
    normed = F.layer_norm(x, x.shape[1:], glimpse.attention_norm.weight, glimpse.attention_norm.bias)
    x = kept * x + plain_attention(normed, glimpse.attention, options.glimpse_window, options.glimpse_scale)
    return kept * x + plain_ffn(
        F.layer_norm(x, x.shape[1:], glimpse.ffn_norm.weight, glimpse.ffn_norm.bias), glimpse.ffn
    )


def plain_emphasize(x, emphasize, options):
    norm = emphasize.norm
    x = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    x = plain_conv(x, emphasize.squeeze)
    kept = 1 if options.block_residual else 0
    rows = []
    for a in x:
        product = [sum(a[i] * a[j] for j in range(len(a))) / (len(a) if options.sam_mean else 1) for i in range(len(a))]
        rows.append(torch.stack(product) + kept * a)
    x = torch.stack(rows)
    return kept * x + plain_ffn(
        F.layer_norm(x, x.shape[1:], emphasize.ffn_norm.weight, emphasize.ffn_norm.bias), emphasize.ffn
    )
