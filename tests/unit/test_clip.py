"""Where CLIP's weights come from, and prompts through its text tower: fixed, learned and packed into one row."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from clipfusionvad.io.errors import UserError
from clipfusionvad.models.clip import (
    ClipWeights,
    clip_in_checkpoint,
    image_tower,
    load_clip,
    openai_clip,
    tokenize,
    toy_state,
)
from clipfusionvad.models.layers.text import ClipTextTower, FixedPrompts, LearnedPrompts, PromptLayout
from clipfusionvad.models.layers.transformer import split_heads

TEXTS = ["normal", "roadAccidents", "car accident"]


@pytest.fixture(scope="module")
def state():
    return toy_state(64)


@pytest.fixture(scope="module")
def official(state):
    """The same weights in OpenAI's own model, which rounds them to half precision."""
    openai_clip()
    from clip.model import build_model

    return build_model(dict(state)).float()


@pytest.fixture(scope="module")
def tower(official):
    return ClipTextTower(ClipWeights(official.state_dict(), "official"))


def test_toy_is_the_same_every_time_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = toy_state(64)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, first[key]) for key, value in toy_state(64).items())
    assert load_clip("toy", 128).text_width == load_clip("toy", 128).embed_dim == 128


def test_fixed_prompts_equal_openais_encode_text(tower, official):
    with torch.no_grad():
        ours = FixedPrompts(TEXTS, "a video of {}")(tower)
        expected = official.encode_text(openai_clip().tokenize([f"a video of {text}" for text in TEXTS]))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("prefix", "postfix"), [(10, 10), (0, 0), (3, 0), (0, 5), (40, 30)])
def test_learned_prompts_equal_the_full_77_tokens(tower, official, prefix, postfix):
    context = torch.randn(77, 64, generator=torch.Generator().manual_seed(1))
    expected = []
    with torch.no_grad():
        for tokens in tokenize(TEXTS):
            end = int(tokens.argmax())
            sequence = context.clone()
            sequence[0] = official.token_embedding(tokens[0])
            for word in range(1, end):
                sequence[prefix + word] = official.token_embedding(tokens[word])
            sequence[prefix + end + postfix] = official.token_embedding(tokens[end])
            x = official.transformer((sequence + official.positional_embedding)[:, None])[:, 0]
            expected.append(official.ln_final(x)[prefix + end + postfix] @ official.text_projection)
        ours = LearnedPrompts(TEXTS, prefix, postfix)(tower, context)
    torch.testing.assert_close(ours, torch.stack(expected), atol=1e-4, rtol=1e-4)


def one_by_one(tower, embeddings, ends):
    """Encode each prompt on its own at its full length, padding included."""

    def causal(qkv, heads):
        return F.scaled_dot_product_attention(*split_heads(qkv, heads), is_causal=True).transpose(-3, -2).flatten(-2)

    rows = []
    for words, end in zip(embeddings, ends, strict=True):
        x = tower.transformer((words + tower.positional_embedding[: len(words)])[None], causal)
        rows.append(tower.ln_final(x[0, end]) @ tower.text_projection)
    return torch.stack(rows)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 12), st.integers(0, 3))
def test_packed_prompts_equal_single_ones(ends, shared, padding):
    tower, layout = ClipTextTower(ClipWeights(toy_state(64), "toy")).double(), PromptLayout(torch.tensor(ends), shared)
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
    assert len(layout.taken) == tokens


def test_every_form_of_a_file_gives_the_same_clip(tmp_path, state):
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    inside = {f"clipmodel.{key}": value for key, value in half.items()} | {"gc1.weight": torch.ones(2)}
    fingerprints = {load_clip("toy", 64).fingerprint}
    for content in (half, {"state_dict": half}, inside):
        torch.save(content, tmp_path / "clip.pt")
        loaded = load_clip(str(tmp_path / "clip.pt"))
        fingerprints.add(loaded.fingerprint)
        assert torch.equal(loaded.state["text_projection"], half["text_projection"])
    assert len(fingerprints) == 2  # that of the unrounded weights, and one of all files
    del inside["clipmodel.token_embedding.weight"]
    assert clip_in_checkpoint(inside, "x") is None


def huggingface_model(state):
    """The weights in HuggingFace's own model; every name must be one of its names."""
    openai_clip()
    from transformers import CLIPConfig, CLIPModel

    own, state = {"logit_scale": state["logit_scale"]}, dict(state)
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for layer in range(2):
            theirs, ours = f"{tower}.encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
            for kind in ("weight", "bias"):
                for part, rows in zip("qkv", state[f"{ours}attn.in_proj_{kind}"].chunk(3), strict=True):
                    own[f"{theirs}self_attn.{part}_proj.{kind}"] = rows
                own[f"{theirs}self_attn.out_proj.{kind}"] = state[f"{ours}attn.out_proj.{kind}"]
                for number in (1, 2):
                    own[f"{theirs}layer_norm{number}.{kind}"] = state[f"{ours}ln_{number}.{kind}"]
                own[f"{theirs}mlp.fc1.{kind}"] = state[f"{ours}mlp.c_fc.{kind}"]
                own[f"{theirs}mlp.fc2.{kind}"] = state[f"{ours}mlp.c_proj.{kind}"]
    for kind in ("weight", "bias"):
        own[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        own[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        own[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
    own["text_model.embeddings.token_embedding.weight"] = state["token_embedding.weight"]
    own["text_model.embeddings.position_embedding.weight"] = state["positional_embedding"]
    own["vision_model.embeddings.class_embedding"] = state["visual.class_embedding"]
    own["vision_model.embeddings.patch_embedding.weight"] = state["visual.conv1.weight"]
    own["vision_model.embeddings.position_embedding.weight"] = state["visual.positional_embedding"]
    own["text_projection.weight"] = state["text_projection"].T
    own["visual_projection.weight"] = state["visual.proj"].T
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    image = tower | {"image_size": 224, "patch_size": 32}
    model = CLIPModel(CLIPConfig(text_config=tower, vision_config=image, projection_dim=64))
    model.load_state_dict(own)
    return model.eval()


@pytest.fixture(scope="module")
def huggingface(state):
    return huggingface_model(state)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_huggingfaces_clip_is_openais_under_other_names(tmp_path, state, huggingface, suffix):
    path = tmp_path / f"model.{suffix}"
    # Older versions also save the numbers of the positions.
    theirs = huggingface.state_dict() | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    (torch.save if suffix == "bin" else save_file)({k: v.contiguous() for k, v in theirs.items()}, path)
    loaded = load_clip(str(path))
    assert loaded.state.keys() == state.keys()
    assert all(torch.equal(loaded.state[key], value) for key, value in state.items())
    pictures = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        text = huggingface.get_text_features(tokenize(TEXTS))
        image = huggingface.get_image_features(pictures)
        # Newer versions return more than the features.
        text, image = (getattr(found, "pooler_output", found) for found in (text, image))
        torch.testing.assert_close(FixedPrompts(TEXTS, "{}")(ClipTextTower(loaded)), text, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(image_tower(loaded)(pictures), image, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("custom_text", [False, True])
def test_open_clips_state_dicts_hold_openais_clip(tmp_path, state, suffix, wrapped, custom_text):
    """As open_clip saves a model, and as its training saves a checkpoint; CustomTextCLIP keeps the text tower apart."""
    text = "text." if custom_text else ""
    theirs = {key if key.startswith(("visual.", "logit")) else text + key: value for key, value in state.items()}
    theirs[f"{text}attn_mask"] = torch.zeros(77, 77)
    path = tmp_path / f"open_clip.{suffix}"
    if wrapped:
        theirs = {f"module.{key}": value for key, value in theirs.items()}
    if suffix == "pt":
        torch.save({"epoch": 3, "name": "run", "state_dict": theirs} if wrapped else theirs, path)
    else:
        save_file(theirs, path)
    loaded = load_clip(str(path))
    assert loaded.state.keys() == state.keys()
    assert all(torch.equal(loaded.state[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("text_projection.weight"), "no text_projection; it is .* without its projection"),
        (lambda state: [state.pop(key) for key in [*state] if key.startswith("text_")], "image tower of HuggingFace"),
        (
            lambda state: state.pop("text_model.encoder.layers.1.self_attn.k_proj.bias"),
            "not a complete.*'text_model.encoder.layers.1.self_attn.k_proj.bias'",
        ),
        (lambda state: state.update({"text_projection.weight": torch.ones(32, 16)}), "shapes"),
        (lambda state: state.update({"text_projection.weight": torch.ones(2, 2, 2)}), "not a complete"),
        (lambda state: state.update({"text_projection.weight": torch.ones(())}), "shapes"),
    ],
)
def test_what_lacks_of_huggingfaces_clip_is_named(tmp_path, huggingface, change, says):
    theirs = dict(huggingface.state_dict())
    change(theirs)
    torch.save(theirs, tmp_path / "model.bin")
    with pytest.raises(UserError, match=says):
        load_clip(str(tmp_path / "model.bin"))


def test_another_activation_beside_huggingfaces_file_is_refused(tmp_path, huggingface):
    torch.save(huggingface.state_dict(), tmp_path / "model.bin")
    for activation in ("quick_gelu", "gelu"):
        (tmp_path / "config.json").write_text(f'{{"text_config": {{"hidden_act": "{activation}"}}}}')
        if activation == "quick_gelu":
            load_clip(str(tmp_path / "model.bin"))
        else:
            with pytest.raises(UserError, match=r"computes with gelu \(.*config.json\)"):
                load_clip(str(tmp_path / "model.bin"))


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("text_model.encoder.layer.0.attention.self.query.weight", "it is a CLIP of HuggingFace with BERT"),
        ("vision_model.head.probe", "it is SigLIP"),
        ("blocks.0.attn.qkv.weight", "it is an image tower of timm"),
        ("visual.ln_pre.weight", "it is the image tower of CLIP without the text tower"),
        ("conv1.weight", "its keys are conv1.weight"),
    ],
)
def test_the_format_of_another_file_is_named(tmp_path, key, says):
    torch.save({key: torch.ones(2, 2)}, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=f"not a CLIP file of OpenAI, open_clip or HuggingFace.*{says}"):
        load_clip(str(tmp_path / "clip.pt"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("flax_model.msgpack", b"\x84", "is a file of Flax"),
        ("tf_model.h5", b"\x89HDF", "is a file of TensorFlow"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "run 'git lfs pull'"),
        ("ViT-B-16.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "run 'git lfs pull'"),
        ("snapshot", None, "is a folder: give the file of weights in it"),
    ],
)
def test_a_file_that_holds_no_weights_for_torch_is_named(tmp_path, name, content, says):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        load_clip(str(path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_torchscript_archive(tmp_path, official):
    class Archive(torch.nn.Module):
        """A scripted module whose state dict has OpenAI's names."""

        def __init__(self):
            super().__init__()
            self.token_embedding, self.ln_final = official.token_embedding, official.ln_final
            self.positional_embedding, self.text_projection = official.positional_embedding, official.text_projection
            self.transformer = official.transformer

        def forward(self, x):
            return self.ln_final(x)

    path = str(tmp_path / "archive.pt")
    torch.jit.trace(Archive(), torch.zeros(1, 64)).save(path)
    loaded = load_clip(path)
    assert torch.equal(loaded.state["text_projection"], official.text_projection)
    ClipTextTower(loaded)


def test_unusable_files_names_and_prompts(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    for name, message in (
        (str(tmp_path / "other.pt"), "not a CLIP file.*token_embedding"),
        (str(tmp_path / "tensor.pt"), "holds no state dict"),
        ("ViT-B16", "did you mean 'ViT-B/16'"),
    ):
        with pytest.raises(UserError, match=message):
            load_clip(name)
    with pytest.raises(UserError, match="too long"):
        tokenize(["word " * 100])


@pytest.mark.parametrize(
    ("module", "remedy"),
    [("torchvision", "pip install torchvision"), ("pkg_resources", "setuptools<81"), ("clip", "openai-clip")],
)
def test_a_missing_package_is_one_line(module, remedy):
    code = f"""
import sys
from clipfusionvad.io.errors import run_main
from clipfusionvad.models.clip import openai_clip
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
sys.exit(run_main(lambda: openai_clip() and 0))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and remedy in done.stderr


def test_torchvision_built_for_another_torch_is_helped(tmp_path):
    """A stand-in that dies on the missing operator, as the PyPI wheel does beside a CPU-only torch."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n"
        "torch.ops.torchvision  # the namespace is always there, its operators are not\n"
        "torch.library.register_fake('torchvision::nms')(lambda dets, scores, iou_threshold: dets)\n"
    )
    (package / "transforms.py").write_text(
        "Compose = Resize = CenterCrop = ToTensor = Normalize = object\nclass InterpolationMode:\n    BICUBIC = 3\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + (
        "from clipfusionvad.models.clip import tokenize\nprint(tuple(tokenize(['normal']).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "(1, 77)\n", done.stderr
