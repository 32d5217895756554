"""ReFLIP-VAD as its paper reads, module by module against plain loops; as its code computes; and its files."""

import sys

import pytest
import torch
import torch.nn.functional as F
import yaml

from clipfusionvad import create_model, load_weights
from clipfusionvad.cli.options import option_file_of
from clipfusionvad.datasets import find_dataset
from clipfusionvad.engine.checkpoint import model_content, read_model_file, released_state, state_without_clip
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import write_torch
from clipfusionvad.losses import valid_mask
from clipfusionvad.models import find_method
from clipfusionvad.models.clip import load_clip, tokenize
from clipfusionvad.models.layers.glimpse import GlimpseEmphasize, SegmentAttention, TemporalOptions
from clipfusionvad.models.layers.text import PromptLayout

pytest.importorskip("transformers", reason="ReFLIP-VAD's prompt encoder needs: pip install transformers")

PROMPTS = ["normal", "fighting", "car accident"]
SMALL = {"embed_dim": 64, "visual_width": 64, "visual_length": 32}
TARGETS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1]])


def small_model(method="reflipvad", seed=0, **options):
    torch.manual_seed(seed)
    return create_model(method, PROMPTS, clip="toy", **{**SMALL, **options})


@pytest.fixture
def batch():
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
    return F.conv1d(x.T, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2).T


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


@pytest.mark.parametrize("window", [0, 1, 4, 5, 64])
@pytest.mark.parametrize("scaled", [False, True])
def test_segment_attention_equals_the_loop_over_snippets(window, scaled):
    torch.manual_seed(0)
    attention = SegmentAttention(6, window, scaled)
    x, lengths = torch.randn(3, 12, 6), [12, 1, 7]
    ours = attention(x, valid_mask(torch.tensor(lengths), 12))
    for video, length, given in zip(x, lengths, ours, strict=True):
        expected = plain_attention(video[:length], attention, window, scaled)
        torch.testing.assert_close(given[:length], expected, atol=1e-5, rtol=1e-4)


CHOICES = [
    {},
    {"fim": False},
    {"fim_alpha": 0.7, "fim_kernel": 5, "squeeze_kernel": 1},
    {"glimpse": False},
    {"glimpse_window": 0, "glimpse_scale": True},
    {"glimpse_window": 8, "block_residual": False},
    {"emphasize": False},
    {"emphasize_input": "squeezed", "ffn_expansion": 2},
    {"emphasize_input": "squeezed", "emphasize": False},
    {"emphasize_input": "squeezed", "glimpse": False},
    {"sam_mean": False},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(map(str, choice)) or "as read")
def test_temporal_network_equals_plain_loops(choice, batch):
    options = TemporalOptions(**choice)
    torch.manual_seed(0)
    network = disturbed(GlimpseEmphasize(64, options)).eval()
    visual, lengths = batch
    with torch.no_grad():
        features, magnitudes = network(visual, valid_mask(lengths, 32))
        for row, length in enumerate(lengths.tolist()):
            x = visual[row, :length]
            if options.fim:
                x = plain_intensify(x, network.fim.conv, options.fim_alpha)
            if options.glimpse:
                seen = plain_glimpse(x, network.glimpse, options)
                full = options.emphasize_input == "full"
                x = x + network.project(seen) if full else seen
            if options.emphasize:
                x = plain_emphasize(x, network.emphasize, options)
            torch.testing.assert_close(features[row, :length], network.output(x), atol=1e-4, rtol=1e-3)
            norms = torch.tensor([sum(v * v for v in snippet.tolist()) ** 0.5 for snippet in x])
            torch.testing.assert_close(magnitudes[row, :length], norms, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("product", [True, False])
def test_heads_equal_the_loop_over_videos(product, batch):
    model = disturbed(small_model(product=product, temperature=0.3)).eval()
    visual, lengths = batch
    with torch.no_grad():
        out = model(visual, lengths)
        text = model.encode_text()
        features, magnitudes = model.temporal(visual, valid_mask(lengths, 32))
        torch.testing.assert_close(out.magnitudes, magnitudes)
        for row, length in enumerate(lengths.tolist()):
            g = features[row, :length]
            logits = model.classifier(model.coarse_ffn(g) + g)
            torch.testing.assert_close(out.coarse_logits[row, :length], logits, atol=1e-5, rtol=1e-4)
            classes = text
            if product:
                prompt = sum(torch.sigmoid(a) * snippet for a, snippet in zip(logits, g, strict=True))
                prompt = prompt / prompt.norm()
                classes = torch.stack([model.prompt_ffn(t + prompt) + t for t in text])
            for t, snippet in enumerate(g):
                cosines = [snippet @ c / (snippet.norm() * c.norm()) / 0.3 for c in classes]
                torch.testing.assert_close(out.fine_logits[row, t], torch.stack(cosines), atol=1e-4, rtol=1e-3)

        scores = model.scores(out)
    torch.testing.assert_close(scores.anomaly[0], torch.sigmoid(out.coarse_logits[..., 0]))
    torch.testing.assert_close(scores.anomaly[1], 1 - out.fine_logits.softmax(-1)[..., 0])


@pytest.mark.parametrize("length", [1, 5, 24])
@pytest.mark.parametrize("class_contexts", [False, True])
def test_class_name_stands_in_the_middle_of_the_reparameterised_prompt(length, class_contexts):
    model = disturbed(small_model(prompt_length=length, class_contexts=class_contexts)).eval()
    encoder, tower = model.prompt_encoder, model.clipmodel
    assert model.prompt_embeddings.shape == ((3, length, 64) if class_contexts else (length, 64))
    with torch.no_grad():
        ours = model.encode_text()
        for row, name in enumerate(PROMPTS):
            learned = model.prompt_embeddings[row] if class_contexts else model.prompt_embeddings
            hidden = encoder.distilbert(inputs_embeds=encoder.widen(learned)[None]).last_hidden_state[0]
            phi = learned + encoder.narrow(hidden)
            tokens = tokenize([name])[0]
            words = tower.token_embedding(tokens[: int(tokens.argmax()) + 1])
            half = length // 2
            prompt = torch.cat([words[:1], phi[:half], words[1:-1], phi[half:], words[-1:]])
            expected = tower(prompt[None], PromptLayout(torch.tensor([len(prompt) - 1])))[0]
            torch.testing.assert_close(ours[row], expected, atol=1e-3, rtol=1e-3)


def test_the_prompt_encoder_starts_as_the_identity():
    model = small_model().train()
    assert torch.equal(model.prompt_encoder(model.prompt_embeddings), model.prompt_embeddings)
    plain = small_model(reparameterise=False)
    assert torch.equal(plain.encode_text(), model.encode_text())


@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_distilbert_keeps_its_weights_and_works_without_dropout(trained, batch):
    model = disturbed(small_model(train_prompt_encoder=trained)).train()
    frozen = not trained
    assert torch.equal(model.encode_text(), model.encode_text()) == frozen
    sum(model.losses(model(*batch), TARGETS, batch[1]).values()).backward()
    for name, parameter in model.named_parameters():
        # DistilBERT's table of words is not read: its input are embeddings.
        still = name.startswith("clipmodel.") or name == "prompt_encoder.distilbert.embeddings.word_embeddings.weight"
        still |= frozen and name.startswith("prompt_encoder.distilbert.")
        assert (parameter.grad is None) == still, name


def test_loss_options_reach_the_losses(batch):
    def losses(**options):
        model = small_model(**options).eval()
        with torch.no_grad():
            return model.losses(model(*batch), TARGETS, batch[1])

    plain, weighted = losses(margin=2.0), losses(margin=2.0, fine_weight=0.5, magnitude_weight=0.25)
    assert plain.keys() == {"coarse", "fine", "magnitude"}
    torch.testing.assert_close(weighted["fine"], plain["fine"] * 50)
    torch.testing.assert_close(weighted["magnitude"], plain["magnitude"] * 250)
    assert torch.equal(weighted["coarse"], plain["coarse"])
    assert losses(margin=3.0)["magnitude"] > plain["magnitude"]
    assert losses(margin=2.0, magnitude_distance="minmax")["magnitude"] != plain["magnitude"]
    assert losses(margin=2.0, single_normal=False)["coarse"] < plain["coarse"]


def test_without_transformers_only_what_needs_it_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for method, options in (("reflipvad", {}), ("reflipvad_repo", {}), ("reflipvad", {"prompt_encoder": "a-model"})):
        with pytest.raises(UserError, match="^DistilBERT needs the Python module 'transformers'.*pip install [a-z]+$"):
            small_model(method, **options)
    small_model(reparameterise=False)
    small_model(prompts="fixed")
    create_model("vadclip", PROMPTS, clip="toy", **SMALL)


def test_labels_shift_all_their_prompt_embeddings():
    model = disturbed(small_model("reflipvad_repo")).eval()
    prompts, tower = model.prompts, model.clipmodel
    with torch.no_grad():
        ours = model.encode_text()
        words = torch.where(prompts.learned, model.text_prompt_embeddings.weight[: prompts.learned.shape[1]], 0)
        words = words + torch.where(prompts.learned, 0, tower.token_embedding(prompts.tokens))
        for row, ids in enumerate(model.label_ids):
            states = model.distilbert_model(ids[None]).last_hidden_state[0]
            mean = sum(states) / len(ids)
            expected = tower((words[row] + mean)[None], PromptLayout(prompts.layout.ends[row : row + 1]))[0]
            torch.testing.assert_close(ours[row], expected, atol=1e-3, rtol=1e-3)
        assert (model.label_ids == 0).any()  # padding, which counts in the mean


@pytest.mark.parametrize("product", [True, False])
def test_without_the_term_it_is_vadclip(product, batch):
    model = disturbed(small_model("reflipvad_repo", residual=False, product=product)).eval()
    other = create_model("vadclip", PROMPTS, clip="toy", **SMALL, product=product).eval()
    other.load_state_dict({key: value for key, value in model.state_dict().items() if "distilbert" not in key})
    with torch.no_grad():
        ours, theirs = model(*batch), other(*batch)
        assert torch.equal(ours.coarse_logits, theirs.coarse_logits)
        assert torch.equal(ours.fine_logits, theirs.fine_logits)
        assert model.losses(ours, TARGETS, batch[1]) == other.losses(theirs, TARGETS, batch[1])


def test_distilbert_is_trained_along_and_widened_where_needed(batch):
    model = small_model("reflipvad_repo", embed_dim=128, visual_width=128)
    assert model.distilbert_projection.weight.shape == (128, 64)
    wide = torch.cat([batch[0], batch[0]], dim=-1)
    sum(model.losses(model(wide, batch[1]), TARGETS, batch[1]).values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("clipmodel."), name
    assert not [key for key in small_model("reflipvad_repo").state_dict() if "projection" in key and "clip" not in key]


def test_released_names_and_back():
    model, clip = small_model("reflipvad_repo"), load_clip("toy", 64)
    released = released_state(model, clip)
    assert {key for key in released if "clip" in key.lower()} == set()
    assert {f"ReFLIPmodel.{key}" for key in clip.state} <= released.keys()
    cls = find_method("reflipvad_repo")
    assert cls.matches_state_dict(released) and not cls.matches_state_dict(small_model().state_dict())
    old = {**released, "distilbert_model.embeddings.position_ids": torch.arange(77)[None]}
    back = cls.from_released(old)
    own = state_without_clip(model)
    assert {key for key in back if not key.startswith("clipmodel.")} == own.keys()
    assert all(torch.equal(back[key], own[key]) for key in own)
    torch.testing.assert_close(back["clipmodel.text_projection"], clip.state["text_projection"])


@pytest.mark.parametrize(("variant", "method"), [("repo", "reflipvad_repo"), ("paper", "reflipvad")])
def test_older_records_of_variants_mean_a_method(variant, method, tmp_path):
    """Checkpoints, YAML files and flags of when both were one method, which had the options of both."""
    both = {name: find_method(name).declared_options() for name in ("reflipvad", "reflipvad_repo")}
    options = {key: option.default for declared in both.values() for key, option in declared.items()}
    options |= {"prompt_encoder": "toy", **SMALL}
    model = small_model(method)
    hparams = {"method": "reflipvad", "dataset": "ucf", "clip": None, "clip_fingerprint": None}
    hparams["options"] = {**options, "variant": variant}
    write_torch(tmp_path / "model.pth", model_content(hparams, state_without_clip(model)))
    file = read_model_file(tmp_path / "model.pth")
    assert file.method == method and file.hparams["options"].keys() == both[method].keys()
    load_weights(create_model("reflipvad", PROMPTS, clip="toy", **SMALL, variant=variant), tmp_path / "model.pth")

    record = {key: value for key, value in options.items() if value is not None}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({"method": "reflipvad", "variant": variant, **record}))
    parse = option_file_of(find_dataset("ucf")).parse_args
    for flags in (["--config", str(tmp_path / "options.yaml")], ["--method", "reflipvad", "--variant", variant]):
        args = parse(flags)
        assert args.method == method and not hasattr(args, "variant")
    with pytest.raises(UserError, match="--variant 'papr' .did you mean 'paper'"):
        small_model(variant="papr")
