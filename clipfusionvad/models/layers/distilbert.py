"""DistilBERT by name, from a local folder, or a small random toy; and its tokenizer (``transformers`` is optional)."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
from torch import Tensor

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_json
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.io.option import Option
from clipfusionvad.models.clip import CONTEXT_LENGTH, TOY, ClipWeights, openai_clip

DEFAULT = "distilbert-base-uncased"
_HELP = "DistilBERT: a model name to download, a folder (random weights where it has none), or 'toy'"
DistilBertName = Annotated[str | None, Option(f"{_HELP} (default: {DEFAULT}, or toy with a toy CLIP)")]
CONFIG, SAFETENSORS, TORCH = "config.json", "model.safetensors", "pytorch_model.bin"
VOCABULARIES = ("vocab.txt", "tokenizer.json")
_TOY_SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128, "max_position_embeddings": CONTEXT_LENGTH}
_LETTERS = string.ascii_lowercase + string.digits
_TOY_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]


@dataclass(frozen=True)
class DistilBert:
    """Where a DistilBERT comes from: a folder with its files, or None for the toy, which spells words in letters."""

    source: str
    folder: Path | None

    @classmethod
    def find(cls, source: str | None, clip: ClipWeights | None = None) -> DistilBert:
        """Find "toy", a folder, or a model to download once; None is the toy with a toy CLIP, else the default."""
        source = source or (TOY if clip and clip.source == TOY else DEFAULT)
        if source == TOY:
            return cls(source, None)
        return cls(source, Path(source) if Path(source).is_dir() else _download(source))

    def build(self) -> Any:
        """Return a ``DistilBertModel`` with the folder's weights, read without running code, or random ones."""
        if self.folder is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return self._model({**_TOY_SHAPE, "vocab_size": len(_TOY_WORDS)})
        config = read_json(self.folder / CONFIG, "DistilBERT's config")
        if config.get("model_type") != "distilbert":
            raise UserError(f"{self.folder / CONFIG} does not describe a DistilBERT (model_type: distilbert)")
        model = self._model(config)
        path = next((self.folder / name for name in (SAFETENSORS, TORCH) if (self.folder / name).is_file()), None)
        if path is None:
            return model
        state = read_checkpoint(path, "DistilBERT's weights")
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(f"{path} holds no state dict of tensors")
        # A file of a whole language model has DistilBERT under a prefix, and a head that is not read.
        state = {key.removeprefix("distilbert."): value for key, value in state.items()}
        own = model.state_dict()
        misfit = [key for key in own if key not in state or state[key].shape != own[key].shape]
        if misfit:
            raise UserError(f"the weights in {self.folder} do not fit its {CONFIG} at {misfit[0]}")
        model.load_state_dict({key: state[key] for key in own})
        return model

    def tokens(self, texts: list[str]) -> Tensor:
        """Return the word pieces of each text, (C, n) int64: [CLS], pieces, [SEP], and [PAD] up to the longest."""
        tokenizer = _transformers().DistilBertTokenizerFast
        if self.folder is None:
            built = tokenizer(vocab={word: number for number, word in enumerate(_TOY_WORDS)})
        elif any((self.folder / name).is_file() for name in VOCABULARIES):
            built = tokenizer.from_pretrained(self.folder, local_files_only=True)
        else:
            raise UserError(f"--prompt-encoder {self.source} has no {VOCABULARIES[0]}, which the tokenizer needs")
        return torch.tensor(built(list(texts), padding=True)["input_ids"])

    def _model(self, config: dict[str, Any]) -> Any:
        transformers = _transformers()
        from huggingface_hub.errors import StrictDataclassError

        try:
            return transformers.DistilBertModel(transformers.DistilBertConfig.from_dict(config))
        except (StrictDataclassError, TypeError, ValueError, LookupError, RuntimeError) as error:
            raise UserError(f"--prompt-encoder {self.source}: its {CONFIG} makes no DistilBERT: {error}") from error


def _download(name: str) -> Path:
    """Return the folder of the hub's cache with the named model, downloaded unless it is there."""
    _transformers()
    from huggingface_hub import snapshot_download

    wanted = [CONFIG, SAFETENSORS, *VOCABULARIES, "tokenizer_config.json"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = f"is neither a folder nor a model that could be downloaded ({str(error).splitlines()[0]})"
        hint = "check the network, or fetch the model's folder elsewhere and pass it"
        raise UserError(f"--prompt-encoder {name!r} {reason}: {hint}") from error
    if not (folder / SAFETENSORS).is_file():
        raise UserError(f"--prompt-encoder {name}: that model has no {SAFETENSORS}")
    return folder


def _transformers() -> ModuleType:
    """Import transformers' DistilBERT. ``UserError`` says in one line what is missing."""
    # It imports torchvision, which beside a CPU-only torch works only after openai_clip.
    openai_clip()
    try:
        import transformers

        # These names are imported at first use, and what they need may be missing too.
        _ = transformers.DistilBertModel, transformers.DistilBertTokenizerFast
    except ImportError as error:
        reason = f"which cannot be imported ({str(error).splitlines()[0]})"
        needed = f"DistilBERT needs the Python module 'transformers', {reason}"
        raise UserError(f"{needed}: pip install transformers") from error
    return transformers
