"""DistilBERT by name, from a local folder, or a small random toy; and its tokens.

The package ``transformers`` is optional: it is imported only when one of these is built.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
from torch import Tensor

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_text
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.io.option import Option
from clipfusionvad.models.clip import CONTEXT_LENGTH, TOY, ClipWeights, openai_clip

DEFAULT = "distilbert-base-uncased"
DistilBertName = Annotated[
    str | None,
    Option(
        f"DistilBERT: a model name to download, a folder (random weights where it has none), or 'toy' "
        f"(default: {DEFAULT}, or toy with a toy CLIP)"
    ),
]
CONFIG, SAFETENSORS, TORCH = "config.json", "model.safetensors", "pytorch_model.bin"
VOCABULARIES = ("vocab.txt", "tokenizer.json")
_TOY_SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128, "max_position_embeddings": CONTEXT_LENGTH}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = string.ascii_lowercase + string.digits


@dataclass(frozen=True)
class DistilBert:
    """Where a DistilBERT comes from: a folder with its files, or None for the toy, which spells words in letters."""

    source: str
    folder: Path | None

    @classmethod
    def find(cls, source: str | None, clip: ClipWeights | None = None) -> DistilBert:
        """``source``: "toy", a folder, or a model name, which is downloaded once; None: a toy with a toy CLIP, else
        the default model."""
        source = source or (TOY if clip and clip.source == TOY else DEFAULT)
        if source == TOY:
            return cls(source, None)
        folder = Path(source)
        return cls(source, folder if folder.is_dir() else _download(source))

    def build(self) -> Any:
        """A ``DistilBertModel`` with the folder's weights, random ones (torch's seed) where it has none.

        Weights are read from ``model.safetensors`` or ``pytorch_model.bin``, without running code in them.
        """
        if self.folder is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return self._model({**_TOY_SHAPE, "vocab_size": len(_toy_vocabulary())})
        model = self._model(self._config(self.folder))
        state = self._weights(self.folder)
        if state is not None:
            # A file of a whole language model has DistilBERT under a prefix, and a head that is not read.
            state = {key.removeprefix("distilbert."): value for key, value in state.items()}
            own = model.state_dict()
            misfit = [key for key in own if key not in state or state[key].shape != own[key].shape]
            if misfit:
                raise UserError(f"the weights in {self.folder} do not fit its {CONFIG} at {misfit[0]}")
            model.load_state_dict({key: state[key] for key in own})
        return model

    def tokens(self, texts: list[str]) -> Tensor:
        """Word pieces of each text, (C, n) int64: [CLS], pieces, [SEP], and [PAD] up to the longest."""
        tokenizer = _transformers().DistilBertTokenizerFast
        if self.folder is None:
            made = tokenizer(vocab=_toy_vocabulary())
        elif any((self.folder / name).is_file() for name in VOCABULARIES):
            made = tokenizer.from_pretrained(self.folder, local_files_only=True)
        else:
            raise UserError(f"--prompt-encoder {self.source} has no {VOCABULARIES[0]}, which word pieces come from")
        return torch.tensor(made(list(texts), padding=True)["input_ids"])

    def _config(self, folder: Path) -> dict[str, Any]:
        path = folder / CONFIG
        try:
            content = json.loads(read_text(path, "DistilBERT's config"))
        except ValueError as error:
            raise UserError(f"{path} is not readable JSON: {error}") from error
        if not isinstance(content, dict) or content.get("model_type") != "distilbert":
            raise UserError(f"{path} does not describe a DistilBERT (model_type: distilbert)")
        return content

    def _model(self, config: dict[str, Any]) -> Any:
        transformers = _transformers()
        from huggingface_hub.errors import StrictDataclassError

        try:
            return transformers.DistilBertModel(transformers.DistilBertConfig.from_dict(config))
        except (StrictDataclassError, TypeError, ValueError, LookupError, RuntimeError) as error:
            raise UserError(f"--prompt-encoder {self.source}: its {CONFIG} makes no DistilBERT: {error}") from error

    def _weights(self, folder: Path) -> dict[str, Tensor] | None:
        path = next((folder / name for name in (SAFETENSORS, TORCH) if (folder / name).is_file()), None)
        if path is None:
            return None
        state = read_checkpoint(path, "DistilBERT's weights")
        if isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()):
            return state
        raise UserError(f"{path} holds no state dict of tensors")


def _toy_vocabulary() -> dict[str, int]:
    words = [*_SPECIAL, *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    return {word: number for number, word in enumerate(words)}


def _download(name: str) -> Path:
    """The folder of the hub's cache that holds the named model, fetched where it is not there yet."""
    _transformers()
    from huggingface_hub import snapshot_download

    wanted = [CONFIG, SAFETENSORS, *VOCABULARIES, "tokenizer_config.json"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    # OSError: no network, no such model; ValueError: no possible name of one.
    except (OSError, ValueError) as error:
        raise UserError(
            f"--prompt-encoder {name!r} is neither a folder nor a model that could be downloaded "
            f"({str(error).splitlines()[0]}): check the network, or fetch the model's folder elsewhere and name it"
        ) from error
    if not (folder / SAFETENSORS).is_file():
        raise UserError(f"--prompt-encoder {name}: that model has no {SAFETENSORS}")
    return folder


def _transformers() -> ModuleType:
    """Import transformers' DistilBERT, or say in one line what is missing."""
    # It imports torchvision, which beside a CPU-only torch works only after CLIP's import has mended it.
    openai_clip()
    try:
        import transformers

        # Its names are filled in at first use; what they need may be missing, too.
        _ = transformers.DistilBertModel, transformers.DistilBertTokenizerFast
    except ImportError as error:
        raise UserError(
            f"DistilBERT needs the Python module 'transformers', which cannot be imported "
            f"({str(error).splitlines()[0]}): pip install transformers"
        ) from error
    return transformers
