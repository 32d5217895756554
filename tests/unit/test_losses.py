"""Losses of several methods against plain loops over videos, classes and pairs, and their invariants."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad.losses import alignment_loss, coarse_mil_loss, fine_mil_loss, magnitude_loss, text_separation_loss


@st.composite
def batches(draw):
    videos, steps, classes = draw(st.integers(1, 6)), draw(st.integers(1, 70)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    lengths = torch.randint(1, steps + 1, (videos,), generator=generator)
    # Moderate logits: the losses work in float32, where 1 − σ of a large one has few digits left.
    logits = torch.randn(videos, steps, classes, generator=generator, dtype=torch.float64)
    normal = torch.rand(videos, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    targets = (torch.rand(videos, classes, generator=generator) < 0.5).double()
    targets[torch.arange(videos), torch.randint(1, classes, (videos,), generator=generator)] = 1
    targets[:, 0] = 0
    targets[normal] = torch.eye(classes, dtype=torch.float64)[0]
    return logits, targets, lengths


single_normals = pytest.mark.parametrize("single", [False, True])
distances = pytest.mark.parametrize("distance", ["mean_topk", "minmax"])


def plain_top(column, length, normal, single):
    """The snippets that are pooled; with ``single`` only one of a normal video (paper of ReFLIP-VAD)."""
    k = 1 if single and normal else int(length / 16 + 1)
    return sorted(column[:length].tolist(), reverse=True)[:k]


def mean(values):
    return sum(values) / len(values)


def videos_of(batch):
    logits, targets, lengths = batch
    return zip(logits, targets, lengths.tolist(), strict=True)


@single_normals
@given(batches())
def test_coarse_loss_equals_the_plain_formula(single, batch):
    logits, targets, lengths = batch
    scores = [mean(plain_top(torch.sigmoid(v[:, 0]), n, bool(t[0]), single)) for v, t, n in videos_of(batch)]
    expected = mean([-math.log(1 - p if t[0] else p) for p, t in zip(scores, targets, strict=True)])
    ours = coarse_mil_loss(logits[..., :1], targets, lengths, single)
    assert ours.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@single_normals
@given(batches())
def test_fine_losses_equal_the_plain_formula(single, batch):
    logits, targets, lengths = batch
    terms = []
    for video, target, length in videos_of(batch):
        means = [mean(plain_top(column, length, bool(target[0]), single)) for column in video.T]
        log_sum = math.log(sum(map(math.exp, means)))
        share = (target / target.sum()).tolist()
        terms.append(-sum(part * (value - log_sum) for part, value in zip(share, means, strict=True)))
    expected = pytest.approx(mean(terms), rel=1e-4, abs=1e-5)
    assert alignment_loss(logits, targets, lengths, single).item() == expected
    assert single or fine_mil_loss(logits, targets, lengths).item() == expected


def test_a_video_without_snippets_is_refused():
    with pytest.raises(ValueError, match="at least one valid snippet"):
        coarse_mil_loss(torch.zeros(2, 8, 1), torch.eye(2), torch.tensor([3, 0]))


@given(st.integers(2, 14), st.integers(0, 1000), st.floats(0, 1))
def test_separation_equals_the_plain_formula(classes, seed, weight):
    text = torch.randn(classes, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cosines = [abs(float(text[0] @ other / (text[0].norm() * other.norm()))) for other in text[1:]]
    assert text_separation_loss(text, weight).item() == pytest.approx(weight * mean(cosines), rel=1e-5, abs=1e-7)


@single_normals
@distances
@given(batches(), st.floats(0, 3))
def test_magnitude_loss_equals_the_plain_formula(single, distance, batch, margin):
    logits, targets, lengths = batch
    magnitudes = logits[..., 0].abs()
    tops = [plain_top(row[:, 0].abs(), n, bool(t[0]), single) for row, t, n in videos_of(batch)]
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
    expected = sum(mean(values) for values in terms.values() if values)
    ours = magnitude_loss(magnitudes, targets, lengths, single, margin, distance)
    assert ours.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
