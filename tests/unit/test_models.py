"""The models' parts against plain formulations, and what each ablation switch changes."""

import math

import numpy as np
import pytest
import torch
from tiny import skip_without_packages, small_options
from torch import nn

from clipfusionvad import create_model
from clipfusionvad.io.errors import UserError
from clipfusionvad.models import find_method, method_names
from clipfusionvad.models.layers.dual_branch import DistanceAdjacency, similarity_adjacency
from clipfusionvad.models.layers.transformer import WindowTransformer

PROMPTS = ["normal", "fighting", "car accident"]
SMALL = {"embed_dim": 64, "visual_width": 64, "visual_length": 32, "attn_window": 8}
DUAL_BRANCH = ["clipfusionvad", "vadclip"]
METHODS = pytest.mark.parametrize("method", DUAL_BRANCH)


def small_model(method, seed=0, **options):
    torch.manual_seed(seed)
    return create_model(method, PROMPTS, clip="toy", **{**SMALL, **options})


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 32, 64, generator=generator), torch.tensor([32, 1, 17, 8])


@pytest.mark.parametrize("heads", [1, 4])
def test_windows_equal_a_block_diagonal_mask(heads):
    torch.manual_seed(0)
    ours = WindowTransformer(16, layers=2, heads=heads, window=4).double()
    x = torch.randn(3, 12, 16, dtype=torch.float64)
    blocks = torch.arange(12) // 4
    mask = torch.zeros(12, 12, dtype=torch.float64).masked_fill(blocks[:, None] != blocks, -torch.inf)
    expected = x
    for block in ours.resblocks:
        attention = nn.MultiheadAttention(16, heads, batch_first=True, dtype=torch.float64)
        attention.load_state_dict(block.attn.state_dict())
        normed = block.ln_1(expected)
        expected = expected + attention(normed, normed, normed, attn_mask=mask)[0]
        hidden = block.mlp.c_fc(block.ln_2(expected))
        expected = expected + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
    torch.testing.assert_close(ours(x), expected)


def test_similarity_adjacency_equals_the_loop_over_videos(batch):
    x, lengths = batch
    x = x + 2 * x[:, :1]  # some pairs above the threshold, some below
    ours = similarity_adjacency(x, lengths)
    for video, length, adjacency in zip(x, lengths.tolist(), ours, strict=True):
        rows = video[:length]
        cosine = torch.tensor([[float(a @ b / (a.norm() * b.norm())) for b in rows] for a in rows])
        cosine[cosine <= 0.7] = 0
        expected = torch.zeros(32, 32)
        expected[:length, :length] = cosine.softmax(dim=1)
        torch.testing.assert_close(adjacency, expected, atol=1e-5, rtol=1e-4)


def test_distance_adjacency():
    expected = [[math.exp(-abs(i - j) / math.e) for j in range(5)] for i in range(5)]
    torch.testing.assert_close(DistanceAdjacency()(5), torch.tensor(expected))


def plain_heads(model, x, text):
    """The fusion of both papers, a video at a time."""
    coarse, fine = [], []
    for video in x:
        if model.name == "vadclip":
            v = u = video
            logits = model.classifier(video + model.mlp2(video))
        else:
            v = model.head_video(video) / model.head_video(video).norm(dim=1, keepdim=True)
            u = model.u_head_video(video) / model.u_head_video(video).norm(dim=1, keepdim=True)
            logits = model.classifier(video + model.mlp2(v + u))
        prompt = (logits * u).sum(0)
        classes = text if model.name == "vadclip" else text / text.norm(dim=1, keepdim=True)
        fused = classes + prompt / prompt.norm()
        fused = fused + model.mlp1(fused)
        fine.append(torch.stack([torch.cosine_similarity(v, row[None], dim=1) for row in fused], dim=1) / 0.07)
        coarse.append(logits)
    return torch.stack(coarse), torch.stack(fine)


@METHODS
def test_forward_equals_the_plain_formulation(method, batch):
    model = small_model(method).eval()
    with torch.no_grad():
        out = model(*batch)
        x = model.encode_video(*batch)
        if method == "clipfusionvad":
            x = model.gam_attention(x)
        coarse, fine = plain_heads(model, x, model.encode_text())
    torch.testing.assert_close(out.coarse_logits, coarse, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.fine_logits, fine, atol=1e-4, rtol=1e-4)


SWITCHES = {
    # switch: (parameters that are no longer there, stages that stay as they are)
    "gam": (("gam_attention.",), ("temporal", "encode_video", "text")),
    "aggregator": ((), ("temporal", "encode_video", "text")),
    "product": (("mlp1.",), ("temporal", "encode_video", "text", "coarse")),
    "graph": (("gc1.", "gc2.", "gc3.", "gc4."), ("temporal", "text")),
    "similarity_graph": (("gc1.", "gc2."), ("temporal", "text")),
    "distance_graph": (("gc3.", "gc4."), ("temporal", "text")),
    "prompts": (("text_prompt_embeddings.",), ("temporal", "encode_video", "coarse")),
}
CASES = [
    (method, switch) for method in DUAL_BRANCH for switch in SWITCHES if switch in find_method(method).option_names()
]


@pytest.mark.parametrize(("method", "switch"), CASES)
def test_a_switch_changes_what_it_says_and_nothing_else(method, switch, batch):
    gone, untouched = SWITCHES[switch]
    full = small_model(method).eval()
    value = "fixed" if switch == "prompts" else False
    without = small_model(method, **{switch: value}).eval()
    names = dict(full.named_parameters()).keys() - dict(without.named_parameters()).keys()
    assert names == {name for name in dict(full.named_parameters()) if name.startswith(gone or ("-",))}
    for name, value in without.state_dict().items():
        assert torch.equal(value, full.state_dict()[name]), f"without {switch}, {name} starts from other weights"
    before, after = stages(full, batch), stages(without, batch)
    changed = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-6)}
    assert "fine" in changed and not changed & set(untouched)


def stages(model, batch):
    with torch.no_grad():
        out = model(*batch)
        return {
            "temporal": model.encode_temporal(batch[0]),
            "encode_video": model.encode_video(*batch),
            "text": out.text_features,
            "coarse": out.coarse_logits,
            "fine": out.fine_logits,
        }


@pytest.fixture(params=method_names())
def any_model(request):
    skip_without_packages(request.param)
    torch.manual_seed(0)
    model = create_model(request.param, PROMPTS, "toy", embed_dim=64, visual_width=64, **small_options(request.param))
    model.set_normal_centroid([np.linspace(-1, 1, 3 * 64).reshape(3, 64)])
    return model.eval()


def test_videos_do_not_depend_on_each_other_and_scores_are_probabilities(any_model):
    steps, order = any_model.sampling.length, torch.tensor([3, 0, 4, 2, 1])
    visual = torch.randn(5, steps, 64 * len(any_model.streams))
    lengths = torch.tensor([steps, 1, steps // 2, 8, steps - 2])
    targets = torch.eye(3)[[0, 1, 2, 0, 1]]
    with torch.no_grad():
        out, permuted = any_model(visual, lengths), any_model(visual[order], lengths[order])
        whole, shuffled, alone = (any_model.scores(x) for x in (out, permuted, any_model(visual[2:3], lengths[2:3])))
        losses = any_model.losses(out, targets, lengths)
        after = any_model.losses(permuted, targets[order], lengths[order])
    branches = [*whole.anomaly] + [whole.classes] * (whole.classes is not None)
    assert len(whole.anomaly) == any_model.branches
    for number, values in enumerate(branches):
        assert ((values >= 0) & (values <= 1)).all()
        for other, rows in ((shuffled, order), (alone, slice(2, 3))):
            moved = [*other.anomaly, other.classes][number]
            torch.testing.assert_close(moved, values[rows], atol=1e-5, rtol=1e-4)
    if whole.classes is not None:
        torch.testing.assert_close(whole.classes.sum(-1), torch.ones(5, steps))
    # AnomalyCLIP's smooth term goes from one video to the next, as in the released code.
    for name in losses.keys() - {"smooth"}:
        torch.testing.assert_close(losses[name], after[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_score_video_of_any_length(any_model, count):
    rng = np.random.default_rng(count)
    streams = [rng.standard_normal((count, 64)).astype(np.float16) for _ in any_model.streams]
    anomaly, classes = any_model.train().score_video(streams if len(streams) > 1 else streams[0])
    assert any_model.training
    joined = np.concatenate(streams, axis=1)
    np.testing.assert_array_equal(anomaly, any_model.score_video(joined)[0])
    windows, lengths = any_model.sampling.windows(joined)
    with torch.no_grad():
        scores = any_model.eval().scores(any_model(torch.from_numpy(windows).float(), torch.from_numpy(lengths)))
    expected = any_model.sampling.restore(scores.anomaly[0].flatten().numpy(), count)
    assert anomaly.shape == (count,)
    np.testing.assert_allclose(anomaly, expected, atol=1e-6)
    if classes is not None:
        assert classes.shape == (count, 3)
        np.testing.assert_allclose(classes.sum(1), 1, atol=1e-5)


def test_windows_of_padding_computed_once_change_nothing():
    """Whole and partial padding, a blank window before filled ones, and a batch of nothing but zeros."""
    torch.manual_seed(0)
    transformer = WindowTransformer(16, layers=2, heads=2, window=4).double()
    positions = torch.randn(20, 16, dtype=torch.float64, requires_grad=True)
    visual = torch.randn(5, 20, 16, dtype=torch.float64)
    for video, length in enumerate((20, 9, 4, 0)):
        visual[video, length:] = 0
    visual[4, :8] = 0
    trained = [positions, *transformer.parameters()]
    for chosen in (slice(0, 5), slice(0, 1), slice(3, 4), slice(1, 3)):
        ours, expected = transformer.encode(visual[chosen], positions), transformer(visual[chosen] + positions)
        torch.testing.assert_close(ours, expected)
        direction = torch.randn_like(expected)
        gradients = (torch.autograd.grad((output * direction).sum(), trained) for output in (ours, expected))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("vadclap", {}, "unknown method 'vadclap'.*did you mean 'vadclip'"),
        ("vadclip", {"visual_layer": 2}, "no option 'visual_layer'.*did you mean 'visual_layers'"),
        ("vadclip", {"attn_window": 5}, "not a multiple of --attn-window 5"),
        ("vadclip", {"prompt_prefix": 80}, "a prompt of 94 tokens; CLIP reads 77"),
    ],
)
def test_errors_name_what_is_wrong(method, options, message):
    with pytest.raises(UserError, match=message):
        small_model(method, **options)
