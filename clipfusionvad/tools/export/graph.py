"""The scorer as a graph: torch.export's, and from that ONNX."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from clipfusionvad.io.errors import UserError
from clipfusionvad.models import Method
from clipfusionvad.tools.export.scorer import VideoScorer, made_up_video

#: Arrays by the name of an input → arrays by the name of an output.
Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
SNIPPETS = "snippets"
#: Under which a file keeps what ``about`` says.
ABOUT = "clipfusionvad"


def export_program(scorer: VideoScorer) -> ExportedProgram:
    """The graph for videos of any length; made anew for each use, as exporting it on changes it."""
    streams = made_up_video(scorer.method, 2 * scorer.sampling.length + 1)
    shapes = ({0: Dim(SNIPPETS, min=1)},) * len(streams)
    with torch.no_grad(), _plain_attention():
        return torch.export.export(scorer, streams, dynamic_shapes=(shapes,), strict=False)


def pt2_bytes(program: ExportedProgram, about: Mapping[str, Any]) -> bytes:
    """A file that ``torch.export.load`` reads; ``about`` is among its extra files."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={ABOUT: json.dumps(about)})
    return buffer.getvalue()


def run_pt2(content: bytes, scorer: VideoScorer) -> Run:
    """The scoring path in such a file."""
    module = torch.export.load(io.BytesIO(content)).module()

    def run(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            found = module(*(torch.from_numpy(features[name]) for name in scorer.inputs))
        return {name: value.numpy() for name, value in found.items()}

    return run


def onnx_bytes(program: ExportedProgram, scorer: VideoScorer, about: Mapping[str, Any]) -> bytes:
    """An ONNX model with named inputs and outputs; ``about`` is in its metadata."""
    onnx = need("onnx")
    need("onnxscript")
    outputs = list(scorer(*made_up_video(scorer.method, 1)))
    made = torch.onnx.export(
        program, (), dynamo=True, verbose=False, input_names=list(scorer.inputs), output_names=outputs
    )
    model = made.model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = SNIPPETS
    onnx.helper.set_model_props(model, {ABOUT: json.dumps(about)})
    return model.SerializeToString()


def run_onnx(content: bytes) -> Run:
    """The model in onnxruntime, on the CPU."""
    runtime = need("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return lambda features: dict(zip(names, session.run(names, dict(features)), strict=True))


@contextlib.contextmanager
def followed(method: Method) -> Iterator[None]:
    """Within, what torch, ONNX or onnxruntime cannot follow in a method is a ``UserError`` that says what and where."""
    try:
        with _quiet():
            yield
    except (UserError, MemoryError):
        raise
    # The libraries have errors of their own for this, with nothing in common.
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        cause = _root(error)
        reason = next(iter(str(cause).splitlines()), "").rstrip(". ") or type(cause).__name__
        raise UserError(
            f"{method.name} cannot be exported as a graph{_place(cause)}: {reason}. Export it as .safetensors, or have "
            f"its forward and scores do without this operation"
        ) from error


def _root(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root(error.__cause__)


def _place(error: BaseException) -> str:
    """The last line of code that went wrong and is not a library's, where that is a line of a method."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    frames = [(Path(frame.filename), frame) for frame in traceback.extract_tb(error.__traceback__) if frame.line]
    own = [(file, frame) for file, frame in frames if not any(map(file.is_relative_to, libraries))]
    if not own or own[-1][0].parent == Path(__file__).parent:
        return ""
    file, frame = own[-1]
    return f", because of line {frame.lineno} of {file.name} ({frame.line})"


def need(package: str) -> ModuleType:
    """A package that only exporting takes; ``UserError`` where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"this export needs {package}, which cannot be imported here: pip install onnx onnxscript onnxruntime "
            f"safetensors"
        ) from error


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Within, attention is made of operations that ONNX knows, not of torch's one for inference."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, the exporters keep their remarks to themselves; what fails still raises."""
    names = ("torch", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        # torch.export prints the whole graph to stderr where it cannot go on.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
