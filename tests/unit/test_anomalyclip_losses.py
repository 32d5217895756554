"""AnomalyCLIP's losses against loops over videos, segments and frames."""

import math

import numpy as np
import pytest
import torch
from small_anomalyclip import FRAMES, TARGETS, TERMS, S, small_batch, small_model
from torch import nn

from clipfusionvad.models.anomalyclip import SegmentOutput


def random_output(seed, videos):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randn(videos, S * FRAMES, 4, generator=generator, dtype=torch.float64)
    coarse = torch.randn(videos, S * FRAMES, 1, generator=generator, dtype=torch.float64)
    s = torch.sigmoid(coarse)
    fine = torch.cat([1 - s, s * similarity.softmax(-1)], dim=-1).log()
    return SegmentOutput(coarse.float(), fine.float(), similarity=similarity.float())


def plain_losses(out, targets, top_k, bottom_k, kept=None):
    """The seven unweighted terms, video by video, segment by segment, frame by frame."""
    sums = {term: [] for term in TERMS}
    flat = []
    for b, target in enumerate(targets):
        L, p = out.similarity[b].double(), out.fine_logits[b].double().exp()
        score = torch.sigmoid(out.coarse_logits[b, :, 0].double())
        classes = [c for c in range(1, 5) if target[c]] or [1, 2, 3, 4]
        segments = [sum(float(L[k * FRAMES + f, c - 1]) for f in range(FRAMES) for c in classes) for k in range(S)]
        up, down = ([True] * S, [True] * S) if kept is None else (kept[0][b], kept[1][b])
        top = np.argsort([-value if ok else 1e6 for value, ok in zip(segments, up, strict=True)])[:top_k]
        bottom = np.argsort([value if ok else 1e6 for value, ok in zip(segments, down, strict=True)])[:bottom_k]
        top, bottom = ([k * FRAMES + f for k in chosen for f in range(FRAMES)] for chosen in (top, bottom))
        if target[0]:
            sums["dir_nor"] += [float(L[t].max()) for t in range(S * FRAMES)]
            sums["topk_nor"] += [-math.log(p[t, 0]) for t in top]
            continue
        sums["dir_abn"] += [-sum(float(L[t, c - 1]) for c in classes) / len(classes) for t in top]
        sums["topk_abn"] += [-sum(math.log(p[t, c]) for c in classes) / len(classes) for t in top]
        sums["bottomk_abn"] += [-math.log(p[t, 0]) for t in bottom]
        sums["sparse"] += score.tolist()
        flat += score.tolist()
    terms = {term: sum(values) / len(values) if values else 0.0 for term, values in sums.items()}
    terms["smooth"] = sum((a - b) ** 2 for a, b in zip(flat[1:], flat[:-1], strict=True))
    return terms


# All different, so that no two can be confused.
WEIGHTS = {f"{term}_weight": 0.5 + 0.25 * number for number, term in enumerate(TERMS)}
KINDS = {
    "both": TARGETS,
    "released order": torch.cat([TARGETS[[0, 4]], TARGETS[[1, 3]]]),
    "permuted": TARGETS[[1, 4, 0, 3, 2]],
    "abnormal only": TARGETS[[0, 2, 4]],
    "normal only": TARGETS[[1, 3]],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ks", [(2, 1), (3, 3), (1, 4)])
def test_losses_equal_the_loops(kind, ks):
    targets = KINDS[kind]
    model = small_model(num_topk=ks[0], num_bottomk=ks[1], **WEIGHTS)
    out = random_output(len(kind), len(targets))
    losses = model.losses(out, targets, torch.full((len(targets),), S * FRAMES))
    expected = plain_losses(out, targets, *ks)
    assert losses.keys() == expected.keys() == set(TERMS)
    for term, value in losses.items():
        assert value.item() == pytest.approx(WEIGHTS[f"{term}_weight"] * expected[term], rel=1e-4, abs=1e-6), term


def test_only_the_smooth_term_knows_the_order_of_the_videos():
    model, out = small_model(**WEIGHTS), random_output(0, 5)
    order = [3, 4, 1, 0, 2]
    shuffled = SegmentOutput(out.coarse_logits[order], out.fine_logits[order], similarity=out.similarity[order])
    before, after = model.losses(out, TARGETS, None), model.losses(shuffled, TARGETS[order], None)
    for term in TERMS:
        assert math.isclose(before[term], after[term], rel_tol=1e-5) == (term != "smooth"), term


def draws(rates, seed):
    """Masks of the top and the bottom selection as lists; the second draw serves for both at equal rates."""
    torch.manual_seed(seed)
    first, second = (torch.bernoulli(torch.full((5, S), 1 - rate)).bool() for rate in rates)
    return (second if rates[0] == rates[1] else first).tolist(), second.tolist()


@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.6, 0.3)])
def test_segments_are_dropped_in_training_only(rates):
    # Of dropped segments it is anybody's guess which fills a gap, so one is left in every video.
    seed = next(seed for seed in range(100) if all(map(any, sum(draws(rates, seed), []))))
    top_rate, bottom_rate = rates
    options = {"select_idx_dropout_topk": top_rate, "select_idx_dropout_bottomk": bottom_rate, "num_topk": 1}
    model, out = small_model(**WEIGHTS, **options), random_output(1, 5)
    with_all = plain_losses(out, TARGETS, 1, 1)
    dropped = plain_losses(out, TARGETS, 1, 1, draws(rates, seed))
    assert dropped["topk_abn"] != pytest.approx(with_all["topk_abn"])
    for training, expected in ((True, dropped), (False, with_all)):
        torch.manual_seed(seed)
        losses = model.train(training).losses(out, TARGETS, None)
        for term, value in losses.items():
            assert value.item() == pytest.approx(WEIGHTS[f"{term}_weight"] * expected[term], rel=1e-4), term


def test_dropped_segments_fill_the_gap_where_too_few_are_left():
    model, out = small_model(num_topk=S, num_bottomk=S).train(), random_output(1, 5)
    for chosen in model.choose_segments(out.similarity, torch.ones(5, 4)):
        assert torch.equal(chosen.sort().values, torch.arange(S).expand(5, S))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_what_the_paper_trains(kind):
    visual = small_batch()
    model = small_model(concat_features=True).train()
    targets = KINDS[kind]
    sum(model.losses(model(visual[: len(targets)]), targets, None).values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("clipmodel."), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    per_class = model.prompt_learner.ctx.grad.abs().sum((1, 2))
    assert per_class[model.rank[0]] == 0 and (per_class[model.rank[1:]] > 0).all()


def test_weight_zero_removes_a_term():
    for term in TERMS:
        losses = small_model(**{f"{term}_weight": 0.0}).losses(random_output(0, 5), TARGETS, None)
        assert losses.keys() == set(TERMS) - {term}


def test_saturated_scores_have_finite_losses():
    model = small_model()
    coarse = torch.full((5, S * FRAMES, 1), 200.0, requires_grad=True)
    with torch.no_grad():
        out = model(torch.zeros(5, S * FRAMES, 64))
    fine = torch.cat([nn.functional.logsigmoid(-coarse), nn.functional.logsigmoid(coarse).expand(-1, -1, 4)], -1)
    total = sum(model.losses(SegmentOutput(coarse, fine, similarity=out.similarity), TARGETS, None).values())
    total.backward()
    assert total.isfinite() and coarse.grad.isfinite().all()


def test_segments_are_selected_by_magnitude_where_that_is_wanted():
    """The largest and the smallest norms of the centred frames, whatever the class says."""
    model, visual = small_model(selection="magnitude"), small_batch()
    with torch.no_grad():
        out = model(visual)
    top, bottom = model.choose_segments(out.similarity, torch.ones(5, 4), out.magnitudes)
    for row, video in enumerate(visual):
        norms = [float((frame - model.ncentroid).norm()) for frame in video]
        order = np.argsort([sum(norms[k * FRAMES : (k + 1) * FRAMES]) for k in range(S)]).tolist()
        assert top[row].tolist() == order[:-3:-1] and bottom[row].tolist() == order[:1]
    losses = model.losses(out, TARGETS, None)
    rows = [(0, [2]), (2, [1, 3]), (4, [4])]
    chosen = [out.fine_logits[row][:, classes].mean(1).view(S, FRAMES)[top[row]] for row, classes in rows]
    torch.testing.assert_close(losses["topk_abn"], -torch.stack(chosen).mean())
