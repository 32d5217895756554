"""Find the parity cases (numbers measured on the original systems), build our model for one, compare up to rounding."""

import contextlib
import copy
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipfusionvad import create_model
from clipfusionvad.datasets import DATASETS, Dataset, multi_hot
from clipfusionvad.engine.checkpoint import ModelFile, load_model_file
from clipfusionvad.engine.device import compile_model
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.models import Method

Results = dict[str, Any]
METHODS = {"ClipFusionVAD": "clipfusionvad", "CLIPVAD": "vadclip"}


def parity_dir() -> Path:
    """The folder named by PARITY_DIR, else ``shared/parity`` beside the repository."""
    return Path(os.environ.get("PARITY_DIR") or Path(__file__).parents[3] / "shared" / "parity")


def cases(prefix: str, holding: str = "config.json") -> list[Path]:
    """Case folders whose name starts with ``prefix`` and that hold the file ``holding``, by name."""
    return sorted(path.parent for path in parity_dir().glob(f"{prefix}*/{holding}"))


def each_case(*prefixes: str, holding: str = "config.json") -> pytest.MarkDecorator:
    """Run a test with every such folder as ``case``; where there is none, one skipped test says so."""
    reason = f"no {' or '.join(prefixes)}*/{holding} in {parity_dir()}; name the folder of parity cases in PARITY_DIR"
    nothing = pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))
    found = [pytest.param(path, id=path.name) for prefix in prefixes for path in cases(prefix, holding)]
    return pytest.mark.parametrize("case", found or [nothing], scope="module")


def read_config(case: Path) -> dict[str, Any]:
    return json.loads((case / "config.json").read_text())


def dataset_of(config: dict[str, Any]) -> Dataset:
    labels = [label for label, _ in config["label_map"]]
    return next(dataset for dataset in DATASETS.values() if dataset.labels == labels)


def targets_of(config: dict[str, Any], labels: list[str]) -> torch.Tensor:
    """Multi-hot labels; the released code splits them at "-" for exactly seven classes."""
    classes = [label for label, _ in config["label_map"]]
    return torch.from_numpy(multi_hot(labels, classes, multi_label=len(classes) == 7))


def model_options(config: dict[str, Any]) -> dict[str, Any]:
    args = config.get("model_args", config["args"])
    return {key: value for key, value in args.items() if key != "num_class"}


def separation(config: dict[str, Any]) -> tuple[float, bool]:
    """Weight of the separation loss, and whether the recorded loss3 contains it.

    The cases say so in words: "loss3 = sum/13*1e-1 (weight included …)", "loss3*1e-4; … (weight not included …)".
    """
    text = config["loss"].lower()
    return float(re.search(r"\*\s*([\d.e+-]+)", text).group(1)), "not included" not in text


def original_losses(losses: Mapping[str, torch.Tensor], config: dict[str, Any]) -> Results:
    """Our losses under the original's names; loss3 has its weight only where the case recorded it so."""
    weight, included = separation(config)
    third = losses["separation"] / (1 if included else weight)
    return {"loss1": losses["coarse"], "loss2": losses["fine"], "loss3": third, "loss": sum(losses.values())}


def gradients_of(model: Method, recorded: list[str]) -> Results:
    """Return the gradients of the parameters named after the slash of each recorded array."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name.partition("/")[2]].grad for name in recorded}


def load_original(case: Path, config: dict[str, Any], checkpoint: Path) -> Method:
    """Our model with the original's weights."""
    clip = checkpoint if config["clip"] is None else case / config["clip"]
    weight, _ = separation(config) if "loss" in config else (0.1, True)
    prompts, options = [prompt for _, prompt in config["label_map"]], model_options(config)
    model = create_model(METHODS[config["model_class"]], prompts, str(clip), separation_weight=weight, **options)
    load_model_file(model, ModelFile(str(checkpoint), read_checkpoint(checkpoint, "checkpoint")))
    return compiled(model)


def compiled(model: Method) -> Method:
    """The model; made by torch.compile, which takes minutes, where the environment has COMPILE=default."""
    compile_model(model, os.environ.get("COMPILE"))
    return model


@contextlib.contextmanager
def float64(model: Method) -> Iterator[Method]:
    """Yield a copy of a model that computes in float64 everywhere, also where our code says ``.float()``."""
    exact = copy.deepcopy(model).double()
    # A compiled model keeps its text encoder beside it, bound to the original.
    vars(exact).pop("_uncompiled_text", None)
    exact.register_forward_pre_hook(lambda _, inputs: tuple(map(widened, inputs)))
    to_float = torch.Tensor.float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else to_float(self))
        yield exact


def widened(value: Any) -> Any:
    """Return tensors of floats, also in tuples, as float64."""
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def compute_twice(model: Method, compute: Callable[[Method], Any]) -> tuple[Any, Any]:
    """Return what ``compute`` gives for a model in float32 and in float64."""
    with float64(model) as exact:
        return compute(model), compute(exact)


def tolerance(noise: float, theirs: Any, relative: float = 1e-5, floor: float = 0.0) -> float:
    """Return the largest difference that rounding explains: ``relative`` times the scale (the largest true value, at
    least ``floor``), or four times our own noise, the difference between our float32 and float64 results."""
    return max(relative * max(float(np.abs(as_array(theirs)).max(initial=0)), floor), 4 * noise)


def assert_close(
    ours: Any, exact: Any, theirs: Any, name: str = "", relative: float = 1e-5, floor: float = 0.0
) -> None:
    """Assert that our float32 result equals the recorded one up to rounding; ``exact`` is our float64 result."""
    allowed = tolerance(difference(ours, exact), theirs, relative, floor)
    off = difference(ours, theirs)
    assert off <= allowed, f"{name} is off by {off:.2e}, rounding explains {allowed:.2e}"


def assert_all_close(
    results: tuple[Results, Results], recorded: Mapping[str, Any], relative: float = 1e-5, floor: float = 0.0
) -> None:
    """``assert_close`` for each name in the results of ``compute_twice``.

    With the strictest tolerance it must also refuse each result if one of its numbers is off by 1e-4 of the largest.
    """
    ours, exact = results
    for name, value in ours.items():
        assert_close(value, exact[name], recorded[name], name, relative, floor)
        if relative == 1e-5:
            wrong = as_array(recorded[name]).astype(np.float64)
            largest = np.unravel_index(np.abs(wrong).argmax(), wrong.shape)
            wrong[largest] *= 1 + 1e-4
            with pytest.raises(AssertionError, match=name):
                assert_close(value, exact[name], wrong, name)


def as_array(values: Any) -> np.ndarray:
    return (values.detach().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)).squeeze()


def difference(ours: Any, theirs: Any) -> float:
    """Return the largest absolute difference of two arrays or tensors of one shape, axes of length 1 aside."""
    ours, theirs = as_array(ours), as_array(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max(initial=0))
