"""The scorer as a graph of torch.export and of ONNX, and the check that it gives what the model gives."""

import contextlib
import importlib
import io
import json
import logging
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from clipfusionvad.io.errors import UserError
from clipfusionvad.models import Method
from clipfusionvad.tools.export.scorer import VideoScorer, random_video, score_by_method

#: Arrays by the name of an input → arrays by the name of an output.
Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
SNIPPETS = "snippets"
#: The key of the metadata in a file.
ABOUT = "clipfusionvad"
#: Largest difference of a probability.
TOLERANCE = 1e-5


def export_program(scorer: VideoScorer) -> ExportedProgram:
    """Return the graph for videos of any length; each use needs a new one, because exporting it further changes it."""
    streams = random_video(scorer.method, 2 * scorer.sampling.length + 1)
    shapes = ({0: Dim(SNIPPETS, min=1)},) * len(streams)
    fast = torch.backends.mha.get_fastpath_enabled()
    # ONNX does not know torch's fused attention for inference.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return torch.export.export(scorer, streams, dynamic_shapes=(shapes,), strict=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def pt2_bytes(program: ExportedProgram, scorer: VideoScorer, about: Mapping[str, Any]) -> bytes:
    """Return a file that ``torch.export.load`` reads; ``about`` is among its extra files."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={ABOUT: json.dumps(about)})
    return buffer.getvalue()


def run_pt2(content: bytes, scorer: VideoScorer) -> Run:
    """Return the scoring path in such a file."""
    module = torch.export.load(io.BytesIO(content)).module()

    def run(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(features[name]) for name in scorer.inputs))
        return {name: value.numpy() for name, value in outputs.items()}

    return run


def onnx_bytes(program: ExportedProgram, scorer: VideoScorer, about: Mapping[str, Any]) -> bytes:
    """Return an ONNX model with named inputs and outputs; ``about`` is in its metadata."""
    onnx = require_package("onnx")
    require_package("onnxscript")
    names = {"input_names": list(scorer.inputs), "output_names": list(scorer(*random_video(scorer.method, 1)))}
    model = torch.onnx.export(program, (), dynamo=True, verbose=False, **names).model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = SNIPPETS
    onnx.helper.set_model_props(model, {ABOUT: json.dumps(about)})
    return model.SerializeToString()


def run_onnx(content: bytes, scorer: VideoScorer) -> Run:
    """Return the model in onnxruntime, on the CPU."""
    session = require_package("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return lambda features: dict(zip(names, session.run(names, dict(features)), strict=True))


@dataclass(frozen=True)
class Checked:
    """The largest difference of each output on random videos of these numbers of snippets."""

    lengths: tuple[int, ...]
    largest: dict[str, float]

    def __str__(self) -> str:
        found = ", ".join(f"{name} {value:.1e}" for name, value in self.largest.items())
        return f"largest difference from PyTorch on videos of {', '.join(map(str, self.lengths))} snippets: {found}"


def check_graph(run: Run, scorer: VideoScorer, method: Method) -> Checked:
    """Compare a graph with the model on videos shorter and longer than one and two windows.

    Raises ``UserError`` if an output has another shape or differs by more than ``TOLERANCE``.
    """
    window = scorer.sampling.length
    lengths = tuple(sorted({1, window - 1, window, window + 1, 2 * window, 2 * window + 3} - {0}))
    largest: dict[str, float] = {}
    for count in lengths:
        streams = [stream.numpy() for stream in random_video(method, count, seed=count)]
        found, wanted = run(dict(zip(scorer.inputs, streams, strict=True))), score_by_method(method, streams)
        shapes = [{name: value.shape for name, value in outputs.items()} for outputs in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise UserError(f"the exported graph gives {shapes[0]} for {count} snippets, not {shapes[1]}; not written")
        for name, value in wanted.items():
            difference = float(np.abs(found[name] - value).max())
            # Written so that NaN is refused.
            if not difference <= TOLERANCE:
                raise UserError(
                    f"the exported graph's {name} differs from PyTorch's by {difference:.1e} on a video of {count} "
                    f"snippets, more than {TOLERANCE:.0e}; not written"
                )
            largest[name] = max(largest.get(name, 0.0), difference)
    return Checked(lengths, largest)


@contextlib.contextmanager
def clear_errors(method: Method) -> Iterator[None]:
    """Turn what torch, ONNX or onnxruntime cannot export of a method into a ``UserError`` that says what and where."""
    try:
        # torch.export prints the whole graph to stderr if it fails.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), _quiet_loggers():
            warnings.simplefilter("ignore")
            yield
    except (UserError, MemoryError):
        raise
    # The libraries raise errors of many classes for this.
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next(iter(str(cause).splitlines()), "").rstrip(". ") or type(cause).__name__
        raise UserError(
            f"{method.name} cannot be exported as a graph{_place(cause)}: {reason}. Export it as .safetensors, or "
            f"replace this operation in its forward or scores"
        ) from error


def _place(error: BaseException) -> str:
    """Return the last line of code in a traceback that is not a library's, if it is a line of a method."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    frames = [(Path(frame.filename), frame) for frame in traceback.extract_tb(error.__traceback__) if frame.line]
    frames = [(file, frame) for file, frame in frames if not any(map(file.is_relative_to, libraries))]
    if not frames or frames[-1][0].parent == Path(__file__).parent:
        return ""
    file, frame = frames[-1]
    return f", because of line {frame.lineno} of {file.name} ({frame.line})"


def require_package(name: str) -> ModuleType:
    """Import a package that only exporting needs; ``UserError`` if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        packages = "onnx onnxscript onnxruntime safetensors"
        raise UserError(f"this export needs {name}, which cannot be imported: pip install {packages}") from error


@contextlib.contextmanager
def _quiet_loggers() -> Iterator[None]:
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torch", "onnxscript", "onnx_ir"))}
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
