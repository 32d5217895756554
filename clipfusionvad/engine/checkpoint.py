"""Model files: ours, and those that the original projects released, in both directions."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfusionvad.datasets import DATASETS, Dataset, find_dataset, own_dataset
from clipfusionvad.engine.config import AUTO
from clipfusionvad.engine.run_folder import BEST, LAST, which_run
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import must_exist
from clipfusionvad.io.foreign_checkpoints import find_state_dict, is_plain_tensor, read_checkpoint, without_prefix
from clipfusionvad.io.hub import local_path, pinned
from clipfusionvad.models import Method, TextMethod, current_options, find_method, method_names
from clipfusionvad.models.clip import ClipWeights

FORMAT = "clipfusionvad-1"
CLIP_PREFIX = "clipmodel."
TEXT_FEATURES = "text_features"


@dataclass(frozen=True)
class ModelFile:
    """The content of a model file: weights and, in our own files, the hyper-parameters (``make_hparams``)."""

    path: str
    state: dict[str, Tensor]
    method: str | None = None
    hparams: Mapping[str, Any] = field(default_factory=dict)
    #: The test metrics in the file, not checked.
    metrics: Any = None
    #: The text features (C, E) of its classes; None in older files, and for methods without texts.
    text_features: Tensor | None = None


def read_model_file(path: str | Path) -> ModelFile:
    """Read a model file, or the best weights in the folder of a run, without running code in it.

    Reads torch's files, and safetensors by their suffix. Our files name their method. Other files hold a state dict,
    bare or wrapped: its keys, without a common prefix, show the method, and are converted to those of our model.
    """
    path = model_file_in(pinned(str(path)))
    try:
        must_exist(local_path(path), "model file")
    except UserError as error:
        raise UserError(f"{error}; training writes it, and best.pt into the folder of its run") from None
    content = read_checkpoint(path, "model file")
    state = find_state_dict(content, path, "model file")
    if content.get("format") == FORMAT:
        # Files of older versions call them "made".
        hparams = content.get("hparams", content.get("made"))
        if not isinstance(hparams, dict) or not _are_hparams(hparams):
            raise UserError(f"model file {path} holds no valid hyper-parameters: it is damaged")
        hparams = current_hparams(hparams)
        text = _text_features(content, path)
        return ModelFile(str(path), state, hparams["method"], hparams, content.get("metrics"), text)
    state = without_prefix(state, lambda known: _method_of(known) is not None)
    method = _method_of(state)
    try:
        return ModelFile(str(path), find_method(method).from_released(state) if method else state, method)
    except (LookupError, ValueError, RuntimeError) as error:
        raise UserError(f"model file {path} looks like one of {method}, but lacks a part of it ({error})") from error


def _text_features(content: Mapping[str, Any], path: Path) -> Tensor | None:
    """Return the text features in a file's content; a safetensors file holds them as lists."""
    if (text := content.get(TEXT_FEATURES)) is None:
        return None
    try:
        features = torch.as_tensor(text, dtype=torch.float32).reshape(len(text), -1)
        if features.isfinite().all():
            return features
    except (TypeError, ValueError, RuntimeError):
        pass
    raise UserError(f"model file {path} holds no valid text features: it is damaged")


def encode_text(model: TextMethod) -> Tensor:
    """Return the text features (C, E) with which a model scores, on the CPU."""
    was_training = model.training
    with torch.no_grad():
        text = model.eval().encode_text().cpu()
    model.train(was_training)
    return text


def model_file_in(path: str | Path) -> Path:
    """Return a path itself, or the best weights in the folder of a run: the last ones where it kept no others."""
    path = Path(path)
    if not path.is_dir():
        return path
    best = next((path / name for name in (BEST, LAST) if (path / name).is_file()), None)
    if best is None:
        hint = which_run(path) or "give the folder of a run, or a file"
        raise UserError(f"{path} holds no weights, neither {BEST} nor {LAST}: {hint}")
    return best


def check_replaceable(path: str | Path, flag: str) -> None:
    """Raise ``UserError`` for a file that this program did not write; ``flag`` is the option that names it."""
    if Path(path).is_file() and not is_ours(path):
        raise UserError(
            f"{path} was not written by this program, or is damaged, and is not replaced: delete it, or name another "
            f"file with {flag}"
        )


def is_ours(path: str | Path) -> bool:
    """Return whether a file is a model file or a training state that this program wrote."""
    try:
        content = read_checkpoint(path, "file")
    except UserError:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def _method_of(state: Mapping[str, Tensor]) -> str | None:
    """The method whose keys these are."""
    return next((name for name in method_names() if find_method(name).matches_state_dict(state)), None)


def current_hparams(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's hyper-parameters with the present names of methods and options."""
    options = current_options({**hparams["options"], "method": hparams["method"]})
    return {**hparams, "method": options.pop("method"), "options": options}


def completed(saved: Mapping[str, Any], now: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was saved, with what the program has recorded only since then; ``later`` are its defaults."""
    return {key: later.get(key) for key in now} | dict(saved)


#: The keys of ``make_hparams`` and the types of their values. Older files have fewer keys.
_HPARAMS: dict[str, Any] = {"method": str, "dataset": str, "options": dict, "frames_per_snippet": int | None}
_HPARAMS |= {
    "parts": int | None,
    "classes": dict | None,
    "protocol": str | None,
    "smooth": int | float | None,
    "clip": str | None,
    "clip_fingerprint": str | None,
}


def _are_hparams(content: dict[Any, Any]) -> bool:
    if not all(isinstance(content.get(key), kind) for key, kind in _HPARAMS.items()):
        return False
    classes = content.get("classes") or {}
    words = [*content["options"], *classes, *classes.values()]
    # The dataset becomes part of options and file names.
    named = content["method"] in method_names() and re.fullmatch(r"[\w-]+", content["dataset"])
    return bool(named) and all(isinstance(word, str) for word in words)


def make_hparams(
    model: Method, clip: ClipWeights | None, dataset: Dataset, options: dict[str, Any], parts: int | None = None
) -> dict[str, Any]:
    """Return the hyper-parameters that our model files hold; plain values only.

    ``parts`` is the number of equal parts that the features have of every training video, 0 where it differs, and None
    where a snippet has a fixed number of frames. ``smooth``, where scores are smoothed, is the sigma that a test uses.
    """
    smooth = options.get("smooth")
    # Files of models without them are as before.
    unset = {key for key in ("feature_dim", "feature_norm") if options.get(key) is None}
    return {
        "method": model.name,
        "dataset": dataset.name,
        "classes": dict(dataset.classes),
        "options": {key: options[key] for key in model.option_names() if key in options and key not in unset},
        "protocol": options.get("protocol", "paper"),
        "frames_per_snippet": options.get("frames_per_snippet"),
        "clip": clip.source if clip else None,
        "clip_fingerprint": clip.fingerprint if clip else None,
        **({} if parts is None else {"parts": parts}),
        # That of "auto" is known when the training ends.
        **({} if smooth in (None, 0, AUTO) else {"smooth": smooth}),
    }


def dataset_of(file: ModelFile, name: str | None = None) -> Dataset:
    """Return the dataset ``name``, else the one that the file names: a benchmark, or the classes that it holds."""
    if name:
        return find_dataset(name)
    if not file.hparams:
        known = ", ".join(DATASETS)
        raise UserError(f"{file.path} does not name its dataset: pass --dataset (in Python dataset=), one of {known}")
    name, classes = file.hparams["dataset"], file.hparams.get("classes")
    if name in DATASETS:
        return DATASETS[name]
    if not classes or len(classes) < 2:
        raise UserError(f"{file.path} was trained on {name!r}, which is unknown here, and does not hold its classes")
    return own_dataset(name, classes)


def state_without_clip(model: Method) -> dict[str, Tensor]:
    """Copy to the CPU the weights of a model without frozen CLIP, which ``--clip`` loads again."""
    state = model.state_dict().items()
    return {key: value.detach().cpu().clone() for key, value in state if not key.startswith(CLIP_PREFIX)}


def model_content(
    hparams: Mapping[str, Any], state: Mapping[str, Tensor], model: Method | None = None, **extra: Any
) -> dict[str, Any]:
    """Return the content of one of our model files; ``model``, with these weights, encodes the texts beside them."""
    text = {TEXT_FEATURES: encode_text(model)} if isinstance(model, TextMethod) else {}
    return {"format": FORMAT, "hparams": dict(hparams), **extra, **text, "model_state_dict": dict(state)}


def load_weights(model: Method, path: str | Path) -> None:
    """Load a released model file, or one of ours, into a model.

    CLIP inside the file replaces that of the model. Raises ``UserError`` for a file of another method, and for keys
    that are missing, unknown or of another shape, and then loads nothing.
    """
    load_model_file(model, read_model_file(path))


def load_model_file(model: Method, file: ModelFile, left: Collection[str] = ()) -> None:
    """Do the same as ``load_weights`` with a file that has been read. Weights named in ``left`` stay as they are."""
    check_method(file, model.name)
    own = model.state_dict()
    state = without_prefix(file.state, lambda known: not own.keys().isdisjoint(known))
    given = {key: value for key, value in state.items() if key in own or not key.startswith(CLIP_PREFIX)}
    given = {key: value for key, value in given.items() if key not in left}
    unneeded = {*left, *model.centroid_buffers}
    needed = [key for key in own if not key.startswith(CLIP_PREFIX) and key not in unneeded]
    both = [key for key in given if key in own]
    reshaped = [key for key in both if given[key].shape != own[key].shape]
    misfits = {
        "missing": [key for key in needed if key not in given],
        "unknown": [key for key in given if key not in own],
        "another dtype in": [k for k in both if given[k].is_floating_point() != own[k].is_floating_point()],
    }
    parts = []
    for what, keys in misfits.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            parts.append(f"{what} {', '.join(keys[:3])}{more}")
    if reshaped:
        key, more = reshaped[0], f" (and {len(reshaped) - 1} more)" if len(reshaped) > 1 else ""
        shapes = f"{tuple(given[key].shape)} in the file, but {tuple(own[key].shape)} with these options"
        parts.append(f"other shapes: {key} is {shapes}{more}")
    if parts:
        raise UserError(
            f"{file.path} does not fit {model.name}: {'; '.join(parts)}. "
            f"Do the options (layers, widths, switches, --feature-dim, --feature-norm) match those it was trained with?"
        )
    weights = {key: value for key, value in given.items() if key not in model.centroid_buffers}
    bad = [key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise UserError(f"{file.path} holds values that are not finite, first in {bad[0]}")
    model.load_state_dict(given, strict=False)


def centroid_content(model: Method) -> dict[str, Tensor]:
    """What a model has taken from normal training videos, to be written with ``files.write_torch``."""
    return copy_buffers(model, model.centroid_buffers)


def copy_buffers(model: Method, names: Iterable[str]) -> dict[str, Tensor]:
    """Copy some buffers of a model to the CPU."""
    return {name: model.get_buffer(name).detach().cpu().clone() for name in names}


def load_centroid(model: Method, path: str | Path) -> None:
    """Read ``centroid_content`` from its file, or from one that holds the one tensor alone, as released."""
    content = read_checkpoint(path, "normal centroid file")
    if isinstance(content, Tensor) and len(model.centroid_buffers) == 1:
        content = {model.centroid_buffers[0]: content}
    for name in model.centroid_buffers:
        wanted, found = model.get_buffer(name), content.get(name) if isinstance(content, dict) else None
        if not is_plain_tensor(found) or found.shape != wanted.shape or not found.isfinite().all():
            raise UserError(f"normal centroid file {path} holds no finite {name} of shape {tuple(wanted.shape)}")
        wanted.copy_(found)


def check_method(file: ModelFile, method: str) -> None:
    """Raise ``UserError`` for a file of another method."""
    # Bare weights of a method that extends another one look like those of either.
    may_fit = not file.hparams and find_method(method).matches_state_dict(file.state) in (True, None)
    if file.method not in (None, method) and not may_fit:
        raise UserError(f"{file.path} is a checkpoint of {file.method}, not of {method}: use --method {file.method}")


def check_clip(file: ModelFile, clip: ClipWeights | None) -> None:
    """Raise ``UserError`` for another CLIP than the one that a model of ours was trained with."""
    if clip and file.hparams.get("clip_fingerprint", clip.fingerprint) != clip.fingerprint:
        raise UserError(
            f"{file.path} was trained with CLIP {file.hparams['clip']}, whose text tower differs from that of "
            f"{clip.source}: pass the same --clip"
        )


def released_state(model: Method, clip: ClipWeights | None) -> dict[str, Tensor]:
    """Return the bare state dict that the original code loads: the weights of the model and the whole of CLIP."""
    whole = {CLIP_PREFIX + key: value for key, value in clip.state.items()} if clip else {}
    # The text tower of the model replaces that of the CLIP file, which may differ.
    tower = {key: value.to(whole[key].dtype) for key, value in model.state_dict().items() if key in whole}
    frozen = {key: value.detach().cpu().contiguous() for key, value in (whole | tower).items()}
    return model.to_released(state_without_clip(model) | frozen)
