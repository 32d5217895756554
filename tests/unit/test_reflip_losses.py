"""Losses of ReFLIP-VAD's paper against plain loops over videos, snippets and pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad import losses


@st.composite
def batches(draw, max_videos=5):
    videos, steps, classes = draw(st.integers(1, max_videos)), draw(st.integers(1, 40)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    lengths = torch.randint(1, steps + 1, (videos,), generator=generator)
    logits = torch.randn(videos, steps, classes, generator=generator, dtype=torch.float64)
    normal = torch.rand(videos, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    targets = (torch.rand(videos, classes, generator=generator) < 0.5).double()
    targets[torch.arange(videos), torch.randint(1, classes, (videos,), generator=generator)] = 1
    targets[:, 0] = 0
    targets[normal] = torch.eye(classes, dtype=torch.float64)[0]
    return logits, targets, lengths


both = pytest.mark.parametrize("single", [True, False])


def plain_top(column, length, normal, single):
    k = 1 if single and normal else length // 16 + 1
    return sorted(column[:length].tolist(), reverse=True)[:k]


def mean(values):
    return sum(values) / len(values)


@both
@given(batches())
def test_coarse_loss(single, batch):
    logits, targets, lengths = batch
    total = 0.0
    for video, target, length in zip(logits, targets, lengths.tolist(), strict=True):
        score = mean(plain_top(torch.sigmoid(video[:, 0]), length, bool(target[0]), single))
        total -= math.log(1 - score if target[0] else score)
    ours = losses.coarse_mil_loss(logits[..., :1], targets, lengths, single)
    assert ours.item() == pytest.approx(total / len(logits), rel=1e-4, abs=1e-5)


@both
@given(batches())
def test_fine_loss(single, batch):
    logits, targets, lengths = batch
    total = 0.0
    for video, target, length in zip(logits, targets, lengths.tolist(), strict=True):
        means = [mean(plain_top(column, length, bool(target[0]), single)) for column in video.T]
        logs = [value - math.log(sum(map(math.exp, means))) for value in means]
        total -= sum(share * log for share, log in zip((target / target.sum()).tolist(), logs, strict=True))
    ours = losses.alignment_loss(logits, targets, lengths, single)
    assert ours.item() == pytest.approx(total / len(logits), rel=1e-4, abs=1e-5)


def plain_magnitude(magnitudes, targets, lengths, single, margin, distance):
    tops = [
        plain_top(row, length, bool(target[0]), single)
        for row, target, length in zip(magnitudes, targets, lengths.tolist(), strict=True)
    ]
    terms = {"normal": [], "anomalous": [], "mixed": []}
    for p, q in itertools.combinations(range(len(tops)), 2):
        gaps = [abs(u - v) for u in tops[p] for v in tops[q]]
        near = far = abs(mean(tops[p]) - mean(tops[q]))
        if distance == "minmax":
            near, far = min(gaps), max(gaps)
        kinds = {bool(targets[p, 0]), bool(targets[q, 0])}
        if len(kinds) == 2:
            terms["mixed"].append(max(0.0, margin - far))
        else:
            terms["normal" if kinds == {True} else "anomalous"].append(near)
    return sum(mean(values) for values in terms.values() if values)


@both
@pytest.mark.parametrize("distance", ["mean_topk", "minmax"])
@given(batches(max_videos=6), st.floats(0, 3))
def test_magnitude_loss(single, distance, batch, margin):
    logits, targets, lengths = batch
    magnitudes = logits[..., 0].abs()
    ours = losses.magnitude_loss(magnitudes, targets, lengths, single, margin, distance)
    expected = plain_magnitude(magnitudes, targets, lengths, single, margin, distance)
    assert ours.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("distance", ["mean_topk", "minmax"])
def test_beyond_the_margin_nothing_pulls(distance):
    magnitudes = torch.tensor([[1.0, 0.5], [3.0, 2.5]], requires_grad=True)
    targets, lengths = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([2, 2])
    for margin, pulls in ((1.0, False), (4.0, True)):
        (grad,) = torch.autograd.grad(
            losses.magnitude_loss(magnitudes, targets, lengths, True, margin, distance), magnitudes
        )
        assert grad.any() == pulls
    # Nearer to each other only where they are of one kind.
    (grad,) = torch.autograd.grad(
        losses.magnitude_loss(magnitudes, targets[[0, 0]], lengths, True, 1.0, distance), magnitudes
    )
    assert grad[0, 0] < 0 < grad[1, 0]
