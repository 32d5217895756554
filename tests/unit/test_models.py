"""The models' parts against plain formulations, and what each ablation switch changes."""

import math
import re

import numpy as np
import pytest
import torch
from small_anomalyclip import TERMS
from tiny import skip_without_packages, small_options
from torch import nn

from clipfusionvad import create_model
from clipfusionvad.io.errors import UserError
from clipfusionvad.models import method_names
from clipfusionvad.models.layers.dual_branch import DistanceAdjacency, similarity_adjacency
from clipfusionvad.models.layers.transformer import WindowTransformer

PROMPTS = ["normal", "fighting", "car accident"]
DUAL_BRANCH = ["clipfusionvad", "vadclip"]
METHODS = pytest.mark.parametrize("method", DUAL_BRANCH)


def small_model(method, seed=0, **options):
    skip_without_packages(method)
    torch.manual_seed(seed)
    sizes = {"embed_dim": 64, "visual_width": 64, **small_options(method)}
    model = create_model(method, PROMPTS, clip="toy", **{**sizes, **options})
    model.set_normal_centroid([np.linspace(-1, 1, 3 * 64).reshape(3, 64)])
    return model.eval()


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


BEFORE, ESTIMATES = "temporal video text_features", "image_mu event_mu image_logvar event_logvar"
# method, switch, pattern of the parameters that are no longer there, what stays as it is
SWITCHES = [
    ("clipfusionvad", {"gam": False}, "gam_attention", BEFORE),
    ("clipfusionvad", {"aggregator": False}, None, BEFORE),
    *(
        (method, *row)
        for method in DUAL_BRANCH
        for row in (
            ({"product": False}, "mlp1", f"{BEFORE} coarse_logits"),
            ({"graph": False}, "gc", "temporal text_features"),
            ({"similarity_graph": False}, "gc[12]", "temporal text_features"),
            ({"distance_graph": False}, "gc[34]", "temporal text_features"),
            ({"prompts": "fixed"}, "text_prompt", "temporal video coarse_logits"),
        )
    ),
    *(("iefvad", {"fusion": fusion}, None, ESTIMATES) for fusion in ("mean", "rgb", "event")),
    ("iefvad", {"num_refinement_steps": 0}, ".*refinement", f"{ESTIMATES} image_weight event_weight"),
    ("iefvad", {"lambda_ref": 0.0}, None, f"{ESTIMATES} image_weight event_weight"),
    ("iefvad", {"visual_layers": 0}, ".*(attn_layers|norms)", ""),
    ("anomalyclip", {"recentre": False}, "ncentroid", "text_features"),
    ("anomalyclip", {"learn_projection": False}, None, "text_features coarse_logits fine_logits similarity"),
    ("anomalyclip", {"selection": "magnitude"}, None, "text_features coarse_logits fine_logits similarity"),
    *(("anomalyclip", {"prompts": kind}, "prompt_learner", "coarse_logits") for kind in ("fixed", "direct")),
    *(
        ("anomalyclip", {"temporal": kind}, ".*axial_attn", "text_features similarity")
        for kind in ("mlp", "short", "long", "mtn")
    ),
    ("reflipvad", {"fim": False}, "temporal.fim", "text_features"),
    ("reflipvad", {"glimpse": False}, "temporal.(glimpse|project)", "text_features"),
    ("reflipvad", {"emphasize": False}, "temporal.emphasize", "text_features"),
    ("reflipvad", {"reparameterise": False}, "prompt_encoder", "text_features coarse_logits magnitudes fine_logits"),
    ("reflipvad", {"product": False}, "prompt_ffn", "text_features coarse_logits magnitudes"),
    ("reflipvad", {"prompts": "fixed"}, "prompt_e", "coarse_logits magnitudes"),
    ("reflipvad", {"temperature": 0.1}, None, "text_features coarse_logits magnitudes"),
    ("reflipvad", {"fim_alpha": 0.5}, None, "text_features"),
    ("reflipvad", {"glimpse_window": 4}, None, "text_features"),
    ("reflipvad", {"glimpse_scale": True}, None, "text_features"),
    ("reflipvad", {"sam_mean": False}, None, "text_features"),
    ("reflipvad", {"block_residual": False}, None, "text_features"),
]


@pytest.mark.parametrize(("method", "switch", "gone", "untouched"), SWITCHES, ids=str)
def test_a_switch_changes_what_it_says_and_nothing_else(method, switch, gone, untouched, batch):
    full, without = small_model(method), small_model(method, **switch)
    ours, theirs = full.state_dict(), without.state_dict()
    assert ours.keys() - theirs.keys() == {name for name in ours if gone and re.match(gone, name)}
    # Without Emphasize the layer after it has another width.
    for name in ours.keys() & theirs.keys() - {"temporal.output.weight", "temporal.output.bias"}:
        assert torch.equal(theirs[name], ours[name]), f"with {switch}, {name} starts from other weights"
    before, after = stages(full, batch), stages(without, batch)
    assert {name for name in before if torch.allclose(before[name], after[name], atol=1e-6)} == set(untouched.split())


def stages(model, batch):
    visual, lengths = torch.cat([batch[0]] + [batch[0].flip(1)] * (len(model.streams) - 1), dim=-1), batch[1]
    with torch.no_grad():
        found = {name: value for name, value in vars(model(visual, lengths)).items() if value is not None}
        if model.name in DUAL_BRANCH:
            found |= {"temporal": model.encode_temporal(visual), "video": model.encode_video(visual, lengths)}
    return found


# Terms that go from one video to the next, or that pair snippets of several videos or draw noise, as released.
ORDERED = {"anomalyclip": {"smooth"}, "rtfm": {"smoothness"}, "cliptsa": {"smoothness"}, "bnwvad": {"first", "second"}}
ORDERED |= {"urdmu": {"coarse", "triplet", "distance"}}


@pytest.fixture(params=method_names())
def any_model(request):
    return small_model(request.param)


def test_videos_do_not_depend_on_each_other_and_scores_are_probabilities(any_model):
    if any_model.name == "pel4vad":
        any_model.mask_padding = True  # As released, padding counts up to the longest video of the batch.
    # The normal half first; its i-th video is paired with the i-th of the other half before and after.
    steps, order = any_model.sampling.length, torch.tensor([2, 0, 1, 5, 3, 4])
    visual = torch.randn(6, steps, 64 * len(any_model.streams))
    lengths = torch.tensor([steps, 1, steps // 2, 8, steps - 2, 3])
    targets = torch.eye(3)[[0, 0, 0, 1, 2, 1]]
    losses, after = {}, {}
    with torch.no_grad():
        out, permuted = any_model(visual, lengths), any_model(visual[order], lengths[order])
        whole, shuffled, alone = (any_model.scores(x) for x in (out, permuted, any_model(visual[2:3], lengths[2:3])))
        if any_model.trained:
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
        torch.testing.assert_close(whole.classes.sum(-1), torch.ones(6, steps))
    for name in losses.keys() - ORDERED.get(any_model.name, set()):
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


def changed(features, row, value):
    features = features.copy()
    features[row, 1] = value
    return features


WHAT = "scores rgb (snippets, 64)"
BAD_FEATURES = {
    "NaN": (lambda x: changed(x, 3, np.nan), "snippet 3 (counted from 0) of the rgb features holds NaN or infinity"),
    "infinity": (lambda x: changed(x, 39, np.inf), "snippet 39 (counted from 0) of the rgb features"),
    "beyond float32": (lambda x: changed(x.astype(float), 2, 1e39), "snippet 2 (counted from 0) of the rgb features"),
    "a tensor with NaN": (lambda x: torch.from_numpy(changed(x, 0, np.nan)), "snippet 0 (counted from 0)"),
    "one snippet": (lambda x: x[0], WHAT),
    "a batch": (lambda x: x[None], WHAT),
    "no snippets": (lambda x: x[:0], "not (0, "),
    "a column less": (lambda x: x[:, 1:], WHAT),
    "lists of numbers": (lambda x: x.tolist(), WHAT),
    "nothing": (lambda x: [], WHAT),
    "streams of other lengths": (lambda x: [x[:, :64], x[:3, :64]], "(40, 64), (3, 64)"),
    "whole numbers": (lambda x: x.astype(int), "float16, float32 or float64, not int64"),
    "text": (lambda x: x.astype(str), "not <U"),
    "objects": (lambda x: x.astype(object), "not object"),
    "complex numbers": (lambda x: torch.from_numpy(x).to(torch.complex64), "not complex64"),
}


@pytest.mark.filterwarnings("error")
def test_features_that_cannot_be_scored_are_one_line(any_model):
    features = np.random.default_rng(0).standard_normal((40, 64 * len(any_model.streams))).astype(np.float32)
    for change, says in BAD_FEATURES.values():
        with pytest.raises(UserError, match=re.escape(says)):
            any_model.score_video(change(features))


def test_features_of_any_precision_are_scored(any_model):
    features = torch.randn(40, 64 * len(any_model.streams), generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = any_model.score_video(features.float().numpy())[0]
    for same in (
        features,
        features.double(),
        features.float().numpy().astype(">f4"),
        features.float().requires_grad_(),
    ):
        np.testing.assert_array_equal(any_model.score_video(same)[0], expected)


def test_missing_rows_of_a_further_stream_are_zeros_as_in_files():
    model, features = small_model("iefvad"), np.ones((40, 128), np.float32)
    features[5:9, 64:] = 0
    expected = model.score_video(features)[0]
    features[5:9, 64:] = np.nan
    np.testing.assert_array_equal(model.score_video(features)[0], expected)
    np.testing.assert_array_equal(model.score_video((features[:, :64], features[:, 64:]))[0], expected)
    features[5, 64] = 0
    with pytest.raises(UserError, match="snippet 5 .* of the event features"):
        model.score_video(features)


def test_inputs_of_another_shape_are_named(any_model):
    length, width = any_model.sampling.length, 64 * len(any_model.streams)
    fitting = torch.randn(2, length, width)
    others = [fitting[..., 1:]]
    if not any_model.sampling.is_whole and any_model.name not in ("iefvad", "reflipvad"):
        others += [torch.randn(2, length + 5, width), torch.randn(2, 2 * length, width), fitting[0]]
    for visual in others:
        with pytest.raises(UserError, match=rf"{any_model.name} takes .*, not {re.escape(str(tuple(visual.shape)))}"):
            any_model(visual, torch.tensor([3, 3]))


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
        ("vadclip", {"prompt_prefix": 80}, "a prompt of 86 tokens; CLIP reads 77"),
        ("iefvad", {"noise_model": "student-t"}, "--noise-model 'student-t' .did you mean 'student_t'"),
        ("iefvad", {"kl_noise_model": "laplace"}, "--kl-noise-model 'laplace': choose from student_t, gaussian"),
        ("iefvad", {"fusion": "max"}, "--fusion 'max'.*uncertainty, mean, rgb, event"),
        ("iefvad", {"visual_head": 5}, "--visual-width 64 is not a multiple of --visual-head 5"),
        ("anomalyclip", {"visual_width": 512}, "--visual-width 512, but CLIP toy embeds into 64"),
        ("anomalyclip", {"heads": 3}, "--emb-size 16 is not a multiple of --heads 3"),
        ("anomalyclip", {"num_topk": 9}, "--num-topk 9 is more than the --num-segments 8"),
        ("anomalyclip", {"select_idx_dropout_bottomk": 1.0}, "--select-idx-dropout-bottomk must be a number from 0 to"),
        ("anomalyclip", {"n_ctx": 80}, "too long for CLIP"),
        ("anomalyclip", {"temporal": "rnn"}, "--temporal 'rnn': choose from axial, short, long, mtn, mlp"),
        ("anomalyclip", {"temporal": "mtn", "emb_size": 20}, "takes an --emb-size that is a multiple of 8, not 20"),
        ("anomalyclip", {"selection": "chance"}, "--selection 'chance': choose from similarity, magnitude"),
        ("anomalyclip", {f"{term}_weight": 0.0 for term in TERMS}, "nothing to train on"),
        ("reflipvad", {"embed_dim": 48, "visual_width": 48}, "--visual-width 48 must be a multiple of 32"),
        ("reflipvad", {"squeeze_kernel": 4}, "--squeeze-kernel 4 must be odd"),
        ("reflipvad", {"emphasize_input": "half"}, "--emphasize-input 'half': choose from full, squeezed"),
        ("reflipvad", {"magnitude_distance": "max"}, "--magnitude-distance 'max'.*: choose from mean_topk, minmax"),
        ("reflipvad", {"prompt_length": 80}, "--prompt-length 80, but beside the class names CLIP has room for 7"),
    ],
)
def test_errors_name_what_is_wrong(method, options, message):
    with pytest.raises(UserError, match=message):
        small_model(method, **options)
