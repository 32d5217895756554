"""Losses against plain loops over videos and classes, and their invariants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad.losses import coarse_mil_loss, fine_mil_loss, text_separation_loss, topk_mean


@st.composite
def batches(draw):
    videos, steps, classes = draw(st.integers(1, 5)), draw(st.integers(1, 70)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    lengths = torch.randint(1, steps + 1, (videos,), generator=generator)
    # Moderate logits: the losses work in float32, where 1 − σ of a large one has few digits left.
    logits = torch.randn(videos, steps, classes, generator=generator, dtype=torch.float64)
    targets = (torch.rand(videos, classes, generator=generator) < 0.5).double()
    targets[torch.arange(videos), torch.randint(classes, (videos,), generator=generator)] = 1
    return logits, targets, lengths


def plain_topk(column, length):
    k = int(length / 16 + 1)
    return sum(sorted(column[:length].tolist(), reverse=True)[:k]) / k


def plain_coarse(logits, targets, lengths):
    total = 0.0
    for video, target, length in zip(logits, targets, lengths.tolist(), strict=True):
        score = plain_topk(torch.sigmoid(video), length)
        label = 1 - float(target[0])
        total -= label * math.log(score) + (1 - label) * math.log(1 - score)
    return total / len(logits)


def plain_fine(logits, targets, lengths):
    total = 0.0
    for video, target, length in zip(logits, targets, lengths.tolist(), strict=True):
        means = [plain_topk(video[:, c], length) for c in range(video.shape[1])]
        log_sum = math.log(sum(math.exp(mean) for mean in means))
        share = target / target.sum()
        total -= sum(float(share[c]) * (means[c] - log_sum) for c in range(len(means)))
    return total / len(logits)


@given(batches())
def test_coarse_loss_equals_the_plain_formula(batch):
    logits, targets, lengths = batch
    ours = coarse_mil_loss(logits[..., :1], targets, lengths)
    assert ours.item() == pytest.approx(plain_coarse(logits[..., 0], targets, lengths), rel=1e-4, abs=1e-5)


@given(batches())
def test_fine_loss_equals_the_plain_formula(batch):
    logits, targets, lengths = batch
    ours = fine_mil_loss(logits, targets, lengths)
    assert ours.item() == pytest.approx(plain_fine(logits, targets, lengths), rel=1e-4, abs=1e-5)


@given(batches())
def test_padded_snippets_change_nothing_and_get_no_gradient(batch):
    logits, targets, lengths = batch
    padded = torch.arange(logits.shape[1]) >= lengths[:, None]
    logits.requires_grad_()
    loss = fine_mil_loss(logits, targets, lengths) + coarse_mil_loss(logits[..., :1], targets, lengths)
    loss.backward()
    assert not logits.grad[padded].any()
    with torch.no_grad():
        changed = logits + 100 * padded[..., None]
        assert torch.equal(fine_mil_loss(changed, targets, lengths), fine_mil_loss(logits, targets, lengths))
        assert torch.equal(
            coarse_mil_loss(changed[..., :1], targets, lengths), coarse_mil_loss(logits[..., :1], targets, lengths)
        )


@pytest.mark.parametrize(("length", "k"), [(1, 1), (15, 1), (16, 2), (31, 2), (32, 3), (64, 5)])
def test_k_is_a_sixteenth_of_the_length_plus_one(length, k):
    values = torch.arange(64.0)[None]
    expected = values[0, :length].topk(k).values.mean()
    assert topk_mean(values, torch.tensor([length])).item() == expected


def test_a_video_without_snippets_is_refused():
    with pytest.raises(ValueError, match="at least one valid snippet"):
        topk_mean(torch.zeros(2, 8), torch.tensor([3, 0]))


@given(st.integers(2, 14), st.integers(0, 1000), st.floats(0, 1))
def test_separation_equals_the_plain_formula(classes, seed, weight):
    text = torch.randn(classes, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain = 0.0
    for other in text[1:]:
        plain += abs(float(text[0] @ other / (text[0].norm() * other.norm())))
    expected = weight * plain / (classes - 1)
    assert text_separation_loss(text, weight).item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
