"""AnomalyCLIP's losses, axial transformer and other temporal models, against their equations as loops."""

import math

import numpy as np
import pytest
import torch
from small_anomalyclip import FRAMES, TARGETS, TERMS, E, S, small_batch, small_model
from torch import nn

from clipfusionvad.models.anomalyclip import SegmentOutput
from clipfusionvad.models.layers.temporal import LINES, TEMPORAL_MODELS, AxialTransformer, MultiScale, TemporalModel

SEEN = {
    "mlp": lambda place: [place],
    "short": lambda place: [place // FRAMES * FRAMES + frame for frame in range(FRAMES)],
    "long": lambda place: [segment * FRAMES + place % FRAMES for segment in range(S)],
    "mtn": lambda place: range(S * FRAMES),
    "axial": lambda place: range(S * FRAMES),
}


def temporal_model(kind, depth=1):
    torch.manual_seed(0)
    return TemporalModel(E, kind, (S, FRAMES), emb_size=E, depth=depth, heads=2, dim_heads=None).eval()


@pytest.mark.parametrize("kind", TEMPORAL_MODELS)
@pytest.mark.parametrize("place", [0, 4, S * FRAMES - 1])
def test_a_frame_is_scored_by_those_that_its_model_sees(kind, place):
    model = temporal_model(kind, depth=2)
    if kind == "mtn":
        nn.init.ones_(model.mtn.everywhere.norm.weight)
    x = torch.randn(1, S * FRAMES, E, requires_grad=True)
    model(x, (S, FRAMES))[0, place].backward()
    reached = x.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert reached == sorted(SEEN[kind](place))


@pytest.mark.parametrize("kind", LINES)
def test_a_line_transformer_is_a_transformer_of_each_line(kind):
    """Line by line: attention and feed-forward of one line alone, with the position along it."""
    model = temporal_model(kind).line_attn
    grid = torch.randn(2, E, S, FRAMES)
    with torch.no_grad():
        found = model(grid)
        for video in range(2):
            for number in range(S if kind == "short" else FRAMES):
                cut = (video, slice(None), number) if kind == "short" else (video, ..., number)
                line = grid[cut] + model.position[0].flatten(1)
                fn = model.attention[0].fn
                line = line + fn["fn"](fn["norm"](line.T)[None])[0].T
                norm, up, act, down = model.feed_forward[0]
                hidden = up.weight[..., 0, 0] @ norm(line[None, ..., None])[0, ..., 0] + up.bias[:, None]
                line = line + down.weight[..., 0, 0] @ act(hidden) + down.bias[:, None]
                torch.testing.assert_close(found[cut], line)


def test_mtn_is_a_pyramid_and_a_self_attention_joined():
    torch.manual_seed(1)
    model, steps = MultiScale(E), 11
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm1d)):
        for values in (norm.weight, norm.running_mean):
            nn.init.normal_(values)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.randn(E, steps)

    def normed(values, norm):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return (values - norm.running_mean[:, None]) * scale[:, None] + norm.bias[:, None]

    with torch.no_grad():
        scales = []
        for (conv, _, norm), dilation in zip(model.pyramid, (1, 2, 4), strict=True):
            scale = nn.functional.conv1d(x, conv.weight, conv.bias, padding=dilation, dilation=dilation)
            scales.append(normed(scale.relu(), norm))
        squeezed = (model.squeeze[0].weight[..., 0] @ x).relu()
        block = model.everywhere
        theta, phi, g = (m.weight[..., 0] @ squeezed + m.bias[:, None] for m in (block.theta, block.phi, block.g))
        seen = torch.stack(
            [sum((theta[:, t] @ phi[:, u]) / steps * g[:, u] for u in range(steps)) for t in range(steps)], dim=1
        )
        back = block.back.weight[..., 0] @ seen + block.back.bias[:, None]
        joined = torch.cat([*scales, squeezed + normed(back, block.norm)])
        expected = x + normed(nn.functional.conv1d(joined, model.join[0].weight, padding=1).relu(), model.join[2])
        torch.testing.assert_close(model.eval()(x[None])[0], expected, atol=1e-5, rtol=1e-4)


def plain_attention(line, weights, heads):
    """Self-attention of one line (L, E), head by head and query by query."""
    normed = nn.functional.layer_norm(line, line.shape[1:], weights["norm.weight"], weights["norm.bias"])
    queries = normed @ weights["fn.to_q.weight"].T
    both = normed @ weights["fn.to_kv.weight"].T
    inner = queries.shape[1]
    keys, values = both[:, :inner], both[:, inner:]
    width = inner // heads
    rows = []
    for query in queries:
        parts = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            weight = torch.softmax(keys[:, own] @ query[own] / math.sqrt(width), dim=0)
            parts.append((weight[:, None] * values[:, own]).sum(0))
        rows.append(torch.cat(parts))
    return torch.stack(rows) @ weights["fn.to_out.weight"].T + weights["fn.to_out.bias"]


def plain_feed_forward(grid, weights):
    normed = torch.empty_like(grid)
    for y, x in np.ndindex(*grid.shape[1:]):
        place = grid[:, y, x]
        normed[:, y, x] = (place - place.mean()) / (place.std(correction=0) + 1e-5)
    normed = normed * weights["0.g"][0] + weights["0.b"][0]
    hidden = nn.functional.conv2d(normed, weights["1.weight"], weights["1.bias"], padding=1)
    hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    return nn.functional.conv2d(hidden, weights["3.weight"], weights["3.bias"], padding=1)


def plain_axial(grid, state, depth, heads):
    """One grid (E, S, F) through the released names of the weights."""

    def part(prefix):
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    x = grid + state["pos_emb.param_0"][0] + state["pos_emb.param_1"][0]
    first, second = x, x
    for unit in range(depth):
        block = f"layers.blocks.{2 * unit}."
        columns = [plain_attention(second[:, :, f].T, part(f"{block}f.net.fn."), heads).T for f in range(x.shape[2])]
        first = first + torch.stack(columns, dim=2)
        rows = [plain_attention(first[:, s].T, part(f"{block}g.net.fn."), heads).T for s in range(x.shape[1])]
        second = second + torch.stack(rows, dim=1)
        block = f"layers.blocks.{2 * unit + 1}."
        first = first + plain_feed_forward(second, part(f"{block}f.net."))
        second = second + plain_feed_forward(first, part(f"{block}g.net."))
    return (first + second) / 2


@pytest.mark.parametrize(("depth", "dim_heads"), [(1, None), (2, 5)])
def test_axial_transformer_equals_the_plain_equations(depth, dim_heads):
    torch.manual_seed(1)
    model = AxialTransformer(8, (4, 3), depth, heads=2, dim_heads=dim_heads).double()
    nn.init.normal_(model.layers["blocks"][1].f["net"][0].g)  # not the 1 that would hide it
    x = torch.randn(2, 8, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([plain_axial(grid, model.state_dict(), depth, heads=2) for grid in x])
        torch.testing.assert_close(model(x), expected)


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
    for chosen in model.choose_segments(out.similarity, torch.ones(5, 4), None):
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
