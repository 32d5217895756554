"""Prompts packed into one row, their common beginning computed once, against each prompt by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad.models.clip import ClipWeights, toy_state
from clipfusionvad.models.layers.text import ClipTextTower, PromptLayout
from clipfusionvad.models.layers.transformer import split_heads


@pytest.fixture(scope="module")
def tower():
    return ClipTextTower(ClipWeights(toy_state(64), "toy")).double()


def causal(qkv, heads):
    q, k, v = split_heads(qkv, heads)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2).flatten(-2)


def one_by_one(tower, embeddings, ends):
    """Each prompt at its full length, padding and all."""
    rows = []
    for words, end in zip(embeddings, ends, strict=True):
        x = tower.transformer((words + tower.positional_embedding[: len(words)])[None], causal)
        rows.append(tower.ln_final(x[0, end]) @ tower.text_projection)
    return torch.stack(rows)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 12), st.integers(0, 3))
def test_packed_prompts_equal_single_ones(tower, ends, shared, padding):
    layout = PromptLayout(torch.tensor(ends), shared)
    length = max(ends) + 1
    draw = torch.Generator().manual_seed(sum(ends))
    beginning = torch.randn(layout.shared, 64, generator=draw, dtype=torch.float64)
    rest = torch.randn(len(ends), length - layout.shared, 64, generator=draw, dtype=torch.float64)
    direction = torch.randn(len(ends), tower.text_projection.shape[1], generator=draw, dtype=torch.float64)
    found = []
    for encode in (lambda x: tower(x, layout), lambda x: one_by_one(tower, F.pad(x, (0, 0, 0, padding)), ends)):
        parts = [part.clone().requires_grad_() for part in (beginning, rest)]
        text = encode(torch.cat([parts[0].expand(len(ends), -1, -1), parts[1]], dim=1))
        found.append([text, *torch.autograd.grad((text * direction).sum(), parts, allow_unused=True)])
    for ours, expected in zip(*found, strict=True):
        if ours is not None and expected is not None:
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("ends", "shared", "tokens"), [([5, 5], 0, 12), ([5, 5], 3, 9), ([2, 7], 6, 9), ([4], 9, 5)])
def test_no_token_is_computed_that_nothing_sees(ends, shared, tokens):
    layout = PromptLayout(torch.tensor(ends), shared)
    assert len(layout.pack(torch.zeros(len(ends), max(ends) + 1, 1))) == tokens
