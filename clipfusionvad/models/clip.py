"""CLIP: OpenAI's weights, under its names, by name, from a local file, or a small random toy; and its tokenizer.

Files of HuggingFace and open_clip hold the same numbers under other names; they get OpenAI's when they are read.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from clipfusionvad.io.errors import UserError, nearest, warn
from clipfusionvad.io.files import hash_file
from clipfusionvad.io.foreign_checkpoints import find_state_dict, read_checkpoint, without_prefix
from clipfusionvad.io.hub import local_path, pinned

TOY = "toy"
CONTEXT_LENGTH = 77
_VOCABULARY = 49408
# Keys of CLIP in models that contain it, and of its image tower.
_PREFIX, _IMAGE_PREFIX = "clipmodel.", "visual."
# Marks CLIP's weights in the files of event-CLIP, among those of its other encoder.
_EVENT_ENCODER = "encoder_k."
_TEXT_KEYS = ["token_embedding.weight", "positional_embedding", "text_projection", "ln_final.weight", "ln_final.bias"]
# Entries that OpenAI's model makes anew and does not take.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
# Sizes of OpenAI's files, as far as several public sources agree on them.
_SIZES = {"RN50": "255,827,503 bytes", "RN101": "291,791,292 bytes", "ViT-B/32": "353,976,522 bytes"}
_SIZES |= {"ViT-B/16": "350,837,078 bytes", "ViT-L/14": "932,768,134 bytes", "ViT-L/14@336px": "934,088,680 bytes"}
# Parts of the names in HuggingFace's CLIPModel, and what OpenAI calls them.
_HUGGINGFACE = "text_model.embeddings.token_embedding.weight"
_NAMES = {
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
}
# The same for the matrices that OpenAI stores transposed.
_TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
# What other files hold, by a part of their names; the first that occurs is reported.
_OTHER_MODELS = {
    "cond_stage_model.": "a checkpoint of Stable Diffusion",
    "vision_model.head.": "SigLIP of HuggingFace",
    "text.transformer.embeddings.": "a CLIP of open_clip with a text tower of HuggingFace",
    "text_model.encoder.layer.": "a CLIP of HuggingFace with BERT as its text tower",
    "bert.": "a CLIP with BERT as its text tower",
    _HUGGINGFACE: "the text tower of HuggingFace's CLIP without its projection (CLIPTextModel)",
    "vision_model.": "the image tower of HuggingFace's CLIP without the text tower",
    ".attn.qkv.": "an image tower of timm without a text tower",
    "ln_pre.": "the image tower of CLIP without the text tower",
    "attnpool.": "the image tower of CLIP without the text tower",
}


@dataclass(frozen=True)
class ClipWeights:
    """A CLIP state dict under OpenAI's names, and where it came from."""

    state: dict[str, Tensor]
    source: str

    @property
    def text_width(self) -> int:
        return self.state["ln_final.weight"].shape[0]

    @property
    def embed_dim(self) -> int:
        return self.state["text_projection"].shape[1]

    @property
    def text_tower(self) -> ClipWeights:
        """Only the text tower, which is the smaller part: models do not use the image tower."""
        state = {key: value for key, value in self.state.items() if not key.startswith(_IMAGE_PREFIX)}
        return ClipWeights(state, self.source)

    def check_widths(self, embed_dim: int, visual_width: int) -> None:
        """Raise ``UserError`` unless the widths in the options are those of this CLIP."""
        for flag, value, own, what in (
            ("--embed-dim", embed_dim, self.text_width, f"has text width {self.text_width}"),
            ("--visual-width", visual_width, self.embed_dim, f"embeds into {self.embed_dim} dimensions"),
        ):
            if value != own:
                raise UserError(f"{flag} {value}, but CLIP {self.source} {what}; they must be equal")

    @property
    def fingerprint(self) -> str:
        """A short hash of the text tower; it depends on the weights, not on their file or precision."""
        return self._hash(_TEXT_KEYS[1:])

    @property
    def image_fingerprint(self) -> str:
        """The same for the image tower."""
        return self._hash(sorted(key for key in self.state if key.startswith(_IMAGE_PREFIX)))

    def _hash(self, keys: Iterable[str]) -> str:
        digest = hashlib.sha256()
        for key in keys:
            digest.update(self.state[key].float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def openai_files() -> dict[str, tuple[str, Path, str, str]]:
    """Return of OpenAI's models, by name: address, place in openai-clip's cache, size as text, SHA-256."""
    openai_clip()
    from clip.clip import _MODELS

    cache = Path("~/.cache/clip").expanduser()
    parts = {name: (url, *url.split("/")[-2:]) for name, url in _MODELS.items()}
    return {name: (url, cache / file, _SIZES.get(name, "? bytes"), sha) for name, (url, sha, file) in parts.items()}


def load_clip(source: str, width: int = 512) -> ClipWeights:
    """Load CLIP by OpenAI's name, from a file, here or on the Hub (``hf:…``), or ``toy`` of the given width.

    A file may be OpenAI's TorchScript archive, a state dict of OpenAI, open_clip or HuggingFace's CLIPModel, a
    checkpoint that holds CLIP under ``clipmodel.``, or one of event-CLIP (entries named ``encoder_k.``). Raises
    ``UserError`` where nothing usable is found.
    """
    if source == TOY:
        if width >= 128 and width % 64:
            raise UserError(f"--clip toy cannot be {width} wide: a multiple of 64, or less than 128")
        return ClipWeights(toy_state(width), TOY)
    source = pinned(source)
    if local_path(source).is_dir():
        raise UserError(f"--clip {source} is a folder: give the file of weights in it, such as model.safetensors")
    return ClipWeights(_read_file(source) if local_path(source).is_file() else _download(source), source)


def clip_in_checkpoint(state: dict[str, Tensor], source: str) -> ClipWeights | None:
    """Return the CLIP inside a model's state dict (keys ``clipmodel.*``), or None where it is absent or incomplete."""
    inner = {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
    return ClipWeights(inner, source) if all(key in inner for key in _TEXT_KEYS) else None


def tokenize(texts: list[str]) -> Tensor:
    """Return CLIP's byte-pair tokens of each text, (C, 77) int64: SOT, words, EOT, zeros."""
    try:
        return openai_clip().tokenize(list(texts), context_length=CONTEXT_LENGTH).long()
    except RuntimeError as error:
        raise UserError(f"a class prompt is too long for CLIP: {error}") from error


def token_words(tokens: Iterable[int]) -> list[str]:
    """Return the text of tokens of CLIP's vocabulary; a part of a word that continues ends in "…"."""
    openai_clip()
    from clip.clip import _tokenizer

    texts = [_tokenizer.decode([token]) for token in tokens]
    return [text.strip() if text.endswith(" ") or text.startswith("<|") else f"{text}…" for text in texts]


@functools.cache
def openai_clip() -> ModuleType:
    """Import openai-clip. ``UserError`` says in one line what is missing."""
    with warnings.catch_warnings():
        # openai-clip imports pkg_resources, which warns of its removal at every import.
        warnings.simplefilter("ignore")
        try:
            _import_torchvision()
            import clip
        except ModuleNotFoundError as error:
            # Later versions of setuptools do not have pkg_resources, which openai-clip imports.
            package = {"pkg_resources": "'setuptools<81'", "clip": "openai-clip"}.get(error.name or "", error.name)
            message = f"CLIP needs the Python module {error.name!r}, which is not installed: pip install {package}"
            raise UserError(message) from error
        except ImportError as error:
            raise UserError(f"openai-clip cannot be imported ({error}); reinstall requirements.txt") from error
    if not hasattr(clip, "tokenize"):
        raise UserError("the package 'clip' is not OpenAI's; run: pip uninstall clip; pip install openai-clip")
    return clip


def _import_torchvision() -> None:
    """Import torchvision, also its PyPI wheel (built for CUDA) beside a CPU-only torch.

    There the import fails on operators that do not load. CLIP uses none, so declaring their schemas is enough.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        import torchvision  # noqa: F401


# A torch.library declaration lasts as long as its object.
_DECLARED: list[torch.library.Library] = []


def _download(name: str) -> dict[str, Tensor]:
    """Return the weights of one of OpenAI's models, downloaded unless they are there with the right checksum."""
    known = [*(files := openai_files()), TOY]
    if name not in files:
        message = f"--clip {name!r} is neither a file nor a CLIP model{nearest(name, known)}"
        raise UserError(f"{message}; known: {', '.join(known)}, and hf:owner/name/file of the HuggingFace Hub")
    (url, path, size, sha256), whole, found = files[name], False, ""
    if path.is_file() and not (whole := hash_file(path) == sha256):
        found = f"{path} is not OpenAI's file or is incomplete: {path.stat().st_size:,} bytes, another SHA-256; "
        warn(f"{found}downloading it again")
    try:
        if not whole:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The file gets its name when its checksum is right.
            torch.hub.download_url_to_file(url, str(path), sha256)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{found}CLIP {name} could not be downloaded ({error}): get {url} on another machine ({size}, SHA-256 "
            f"{sha256}) and save it as {path}, or pass --clip FILE; --clip toy, of random weights, is for a try"
        ) from error
    return openai_clip().load(str(path), device="cpu")[0].state_dict()


def _read_file(path: str) -> dict[str, Tensor]:
    state = find_state_dict(read_checkpoint(path, "CLIP file"), path, "CLIP file")
    state = {key.partition(_EVENT_ENCODER)[2]: value for key, value in state.items() if _EVENT_ENCODER in key} or state
    tokens = (_TEXT_KEYS[0], _PREFIX + _TEXT_KEYS[0], f"text.{_TEXT_KEYS[0]}", _HUGGINGFACE)
    state = without_prefix(state, lambda known: not known.keys().isdisjoint(tokens))
    inside = clip_in_checkpoint(state, path)
    theirs, state = state, _with_openai_names(inside.state if inside else state, path)
    foreign = f"{path} is not a CLIP file of OpenAI, open_clip or HuggingFace: "
    missing = [key for key in _TEXT_KEYS if key not in state]
    if missing:
        other = next((what for part, what in _OTHER_MODELS.items() if any(part in key for key in theirs)), None)
        found = f"it is {other}" if other else f"its keys are {', '.join([*theirs][:4])}"
        raise UserError(f"{foreign}it has no {missing[0]}; {found}")
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path} is not a CLIP file: {key} does not hold finite numbers")
    sizes = [tuple(state[key].shape) for key in _TEXT_KEYS]
    width, dim = (*sizes[2], 0, 0)[:2]
    if sizes != [(_VOCABULARY, width), (CONTEXT_LENGTH, width), (width, dim), (width,), (width,)]:
        raise UserError(f"{foreign}its text tower has the shapes {sizes}")
    _check_layers(state, path, width)
    if _HUGGINGFACE in theirs and (config := local_path(Path(path).with_name("config.json"))).is_file():
        activation = re.search(r'"hidden_act": *"(?!quick_gelu")(\w*)"', config.read_text("utf-8", "replace"))
        if activation:
            raise UserError(f"{path} computes with {activation[1]} ({config}), OpenAI's CLIP with quick_gelu: refused")
    return state


def _check_layers(state: Mapping[str, Tensor], path: str, width: int) -> None:
    """Raise ``UserError`` unless the layers of the text tower, and the image tower if there is one, are complete."""
    layers = sorted({key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")} | {"0"})
    shapes = {"attn.in_proj": (3 * width, width), "attn.out_proj": (width, width), "ln_1": (width,), "ln_2": (width,)}
    shapes |= {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
    for layer, (part, shape) in product(layers, shapes.items()):
        for kind, wanted in (("weight", shape), ("bias", shape[:1])):
            key = f"transformer.resblocks.{layer}.{part}{'_' if part == 'attn.in_proj' else '.'}{kind}"
            if key not in state or state[key].shape != wanted:
                found = f"has the shape {tuple(state[key].shape)}" if key in state else "is missing"
                raise UserError(f"{path} is not a complete CLIP: {key}, of shape {wanted}, {found} (by OpenAI's names)")
    if any(key.startswith(_IMAGE_PREFIX) for key in state):
        image_tower(ClipWeights({key: value.to("meta") for key, value in state.items()}, path))


def _with_openai_names(state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return the weights of a CLIP of HuggingFace, open_clip or OpenAI under OpenAI's names."""
    state, renamed = dict(state), {}
    try:
        # OpenAI stores the projections to queries, keys and values as one matrix.
        for query in [key for key in state if ".self_attn.q_proj." in key]:
            parts = [state.pop(query.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
            state[query.replace(".self_attn.q_proj.", ".attn.in_proj_")] = torch.cat(parts)
        for key, value in state.items():
            key, value = (_TRANSPOSED[key], value.t().contiguous()) if key in _TRANSPOSED else (key, value)
            for theirs, ours in _NAMES.items():
                key = key.replace(theirs, ours)
            renamed[key.removeprefix("text.")] = value
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path} is not a complete CLIPModel of HuggingFace: {error}") from error
    return {key: value for key, value in renamed.items() if not key.endswith(_NOT_WEIGHTS)}


def toy_state(width: int = 64, layers: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Return a seeded random CLIP of ``width`` (a multiple of 64, or less than 128) with the real vocabulary.

    Its attention is scaled up, so that classes are apart, as they are for trained weights.
    """
    openai_clip()
    from clip.model import CLIP

    image = {"image_resolution": 224, "vision_layers": 2, "vision_width": 64, "vision_patch_size": 32}
    text = {"transformer_width": width, "transformer_heads": max(1, width // 64), "transformer_layers": layers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = CLIP(width, **image, context_length=CONTEXT_LENGTH, vocab_size=_VOCABULARY, **text).state_dict()
    state["token_embedding.weight"] *= 50
    for layer in range(layers):
        state[f"transformer.resblocks.{layer}.attn.out_proj.weight"] *= 4
    return state


def image_tower(weights: ClipWeights) -> nn.Module:
    """Return OpenAI's image tower with these weights, frozen, float32: (n, 3, R, R) → (n, D).

    R is its ``input_resolution``, D its ``output_dim``. Raises ``UserError`` for weights of an unknown kind.
    """
    state = {
        key.removeprefix(_IMAGE_PREFIX): value.float() if value.is_floating_point() else value
        for key, value in weights.state.items()
        if key.startswith(_IMAGE_PREFIX)
    }
    openai_clip()
    from clip.model import ModifiedResNet, VisionTransformer

    try:
        # Without memory and random numbers of its own: it uses the given tensors.
        with torch.device("meta"):
            if "proj" in state:
                width, _, _, patch = state["conv1.weight"].shape
                layers = sum(key.endswith(".attn.in_proj_weight") for key in state)
                resolution = math.isqrt(len(state["positional_embedding"]) - 1) * patch
                tower = VisionTransformer(resolution, patch, width, layers, width // 64, state["proj"].shape[1])
            else:
                width, dim = len(state["layer1.0.conv1.weight"]), len(state["attnpool.c_proj.weight"])
                names = [{key.split(".")[1] for key in state if key.startswith(f"layer{n}.")} for n in range(1, 5)]
                blocks = [len(own) for own in names]
                resolution = math.isqrt(len(state["attnpool.positional_embedding"]) - 1) * 32
                tower = ModifiedResNet(blocks, dim, width * 32 // 64, resolution, width)
        tower.load_state_dict(state, assign=True)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        if not state:
            raise UserError(f"CLIP {weights.source} is the text tower alone, without the image tower") from error
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"CLIP {weights.source} has no complete image tower of a known kind: {reason}") from error
    return tower.eval().requires_grad_(False)
