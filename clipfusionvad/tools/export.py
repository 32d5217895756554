"""Write a trained model in one of its forms, with its card: how to run it, how it was checked, its limits.

A graph, of torch.export or of ONNX, does all that a test does to one video, and is checked against the model.
L snippets of a video, D feature width of one stream, C classes (0 is *normal*).
"""

import contextlib
import copy
import importlib
import inspect
import io
import json
import logging
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.checkpoint import ModelFile, make_hparams, model_content, released_state, state_without_clip
from clipfusionvad.engine.config import Settings
from clipfusionvad.engine.setup import restore_model
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import atomic_write, check_writable, write_text, write_torch
from clipfusionvad.io.foreign_checkpoints import SAFETENSORS, WEIGHTS, pack_safetensors, unpack_safetensors
from clipfusionvad.io.provenance import code, short_hash
from clipfusionvad.models import Method
from clipfusionvad.models.clip import TOY
from clipfusionvad.report.table import check_metrics, metrics_table

#: Features of each stream (L, D) → arrays by the name of an output.
Run = Callable[[Sequence[np.ndarray]], dict[str, np.ndarray]]
#: Outputs: the anomaly score of the main and of the second branch, and the class probabilities.
MAIN, SECOND, CLASSES = "anomaly", "anomaly_fine", "classes"
#: The key of the metadata in a file.
ABOUT = "clipfusionvad"
#: Largest difference of a probability.
TOLERANCE = 1e-5
_LIMITS = """\
The scores rank snippets. They are not calibrated probabilities of an event. Choose a threshold on videos of the place
where the model will run. The model has learned the kinds of events of its training data and the look of its cameras;
other scenes, lenses, frame rates and compression shift its scores. Public anomaly datasets are small, old and biased
about people and places, and so is the model.

The model is for research, and for showing a person where in a recording to look. Do not use it to decide about people
without a review of the video, or to identify people.
"""


class VideoScorer(nn.Module):
    """A method, put into evaluation mode, with its text features as constants: whole videos → probabilities.

    Windows, padding, softmax and the way back to the video's snippets are inside; CLIP is not.
    """

    text: Tensor | None

    def __init__(self, method: Method):
        super().__init__()
        self.sampling = method.sampling
        with torch.no_grad():
            fixed = method.eval().fixed_inputs()
        # At most one: the text features.
        self.register_buffer("text", fixed[0] if fixed else None)
        bare = copy.copy(method)
        bare._modules = {name: module for name, module in method._modules.items() if name != "clipmodel"}
        self.method = bare

    def forward(self, *streams: Tensor) -> dict[str, Tensor]:
        """(L, D) of each stream → anomaly (L,) of each branch and, if the method has them, classes (L, C)."""
        count, restore = streams[0].shape[0], self.sampling.tensor_restore
        windows, lengths = self.sampling.tensor_windows(torch.cat(streams, dim=-1))
        fixed = () if self.text is None else (self.text,)
        scores = self.method.scores(self.method(windows, lengths, *fixed))
        classes = None if scores.classes is None else restore(scores.classes.flatten(0, 1), count)
        return _by_name([restore(branch.flatten(), count) for branch in scores.anomaly], classes)


def _by_name(branches: Sequence[Any], classes: Any) -> dict[str, Any]:
    names = (MAIN, SECOND, *(f"{MAIN}_{number}" for number in range(3, len(branches) + 1)))
    return dict(zip(names, branches, strict=False)) | ({} if classes is None else {CLASSES: classes})


def score_by_method(method: Method, streams: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return what the exported graph must give, computed as in a test: (L, D) of each stream → arrays by name."""
    joined, restore = np.concatenate(streams, axis=-1), method.sampling.restore
    with torch.inference_mode():
        fixed = method.eval().fixed_inputs()
    anomaly, classes = method.score_windows(*method.sampling.windows(joined), *fixed)
    classes = None if classes is None else restore(classes, len(joined))
    return _by_name([restore(branch, len(joined)) for branch in anomaly], classes)


def input_names(method: Method) -> tuple[str, ...]:
    """Return the names of the inputs: "features" for a method of one stream, else the streams' names."""
    return ("features",) if len(method.streams) == 1 else method.streams


def random_video(method: Method, count: int) -> tuple[Tensor, ...]:
    """Return random features of ``count`` snippets with the norm of CLIP's: (L, D) of each stream."""
    shape = (len(method.streams), count, method.feature_width)
    generator = torch.Generator().manual_seed(count)
    return (10 / method.feature_width**0.5 * torch.randn(shape, generator=generator)).unbind(0)


def export_program(scorer: VideoScorer) -> torch.export.ExportedProgram:
    """Return the graph for videos of any length."""
    streams = random_video(scorer.method, 2 * scorer.sampling.length + 1)
    shapes = ({0: Dim("snippets", min=1)},) * len(streams)
    fast = torch.backends.mha.get_fastpath_enabled()
    # ONNX does not know torch's fused attention for inference.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return torch.export.export(scorer, streams, dynamic_shapes=(shapes,), strict=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def pt2_bytes(scorer: VideoScorer, about: Mapping[str, Any]) -> bytes:
    """Return a file that ``torch.export.load`` reads; ``about`` is among its extra files."""
    buffer = io.BytesIO()
    torch.export.save(export_program(scorer), buffer, extra_files={ABOUT: json.dumps(about)})
    return buffer.getvalue()


def run_pt2(content: bytes) -> Run:
    """Return the scoring path in such a file."""
    module = torch.export.load(io.BytesIO(content)).module()

    @torch.inference_mode()
    def run(streams: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in module(*map(torch.from_numpy, streams)).items()}

    return run


def onnx_bytes(scorer: VideoScorer, about: Mapping[str, Any]) -> bytes:
    """Return an ONNX model with named inputs and outputs; ``about`` is in its metadata."""
    onnx, _ = require_package("onnx"), require_package("onnxscript")
    names = {"input_names": input_names(scorer.method), "output_names": list(scorer(*random_video(scorer.method, 1)))}
    model = torch.onnx.export(export_program(scorer), (), dynamo=True, verbose=False, **names).model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "snippets"
    onnx.helper.set_model_props(model, {ABOUT: json.dumps(about)})
    return model.SerializeToString()


def run_onnx(content: bytes) -> Run:
    """Return the model in onnxruntime, on the CPU."""
    session = require_package("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])
    inputs, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
    return lambda arrays: dict(zip(outputs, session.run(outputs, dict(zip(inputs, arrays, strict=True))), strict=True))


#: By suffix: the bytes of a file, and the scoring path in them.
GRAPHS = {".onnx": (onnx_bytes, run_onnx), ".pt2": (pt2_bytes, run_pt2)}


def export_graph(method: Method, suffix: str, about: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return a graph file's content and the result of its check; ``UserError`` says what and where if that fails."""
    (to_bytes, load), disabled = GRAPHS[suffix], logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # torch.export prints the whole graph to stderr if it fails.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            content = to_bytes(VideoScorer(method), about)
            return content, check_graph(load(content), method)
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
    finally:
        logging.disable(disabled)


def check_graph(run: Run, method: Method) -> str:
    """Compare with the model on videos around one and two windows; ``UserError`` for other shapes or numbers."""
    window = method.sampling.length
    lengths = sorted({1, window - 1, window, window + 1, 2 * window, 2 * window + 3} - {0})
    largest: dict[str, float] = {}
    for count in lengths:
        streams = [stream.numpy() for stream in random_video(method, count)]
        found, wanted = run(streams), score_by_method(method, streams)
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
    differences = ", ".join(f"{name} {value:.1e}" for name, value in largest.items())
    return f"largest difference from PyTorch on videos of {', '.join(map(str, lengths))} snippets: {differences}"


def _place(error: BaseException) -> str:
    """Return the last line of code in a traceback that is not a library's, if it is a line of a method."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    frames = [(Path(frame.filename), frame) for frame in traceback.extract_tb(error.__traceback__) if frame.line]
    own = [(file, frame) for file, frame in frames if not any(map(file.is_relative_to, libraries))]
    if not own or own[-1][0] == Path(__file__):
        return ""
    file, frame = own[-1]
    return f", because of line {frame.lineno} of {file.name} ({frame.line})"


def require_package(name: str) -> ModuleType:
    """Import a package that only exporting needs; ``UserError`` if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        packages = "onnx onnxscript onnxruntime safetensors"
        raise UserError(f"this export needs {name}, which cannot be imported: pip install {packages}") from error


def export_model(path: Path, settings: Settings, file: ModelFile, form: str) -> tuple[Method, Path, str]:
    """Write the model of a checkpoint in the form of the path's suffix, checked or not at all, and its card.

    ``form`` names it. Return the model, the path of the card (``model.onnx.md``), and the result of a graph's check.
    """
    suffix, card, checked = path.suffix.lower(), path.with_name(f"{path.name}.md"), ""
    if path.is_file() and not card.is_file():
        raise UserError(f"{path} was not written by 'export' and is not replaced: delete it, or name another --output")
    if file.metrics is not None:
        check_metrics(file.metrics, f"metrics in {file.path}")
    model, clip = restore_model(settings, file)
    if model.feature_map and suffix not in (*GRAPHS, SAFETENSORS):
        raise UserError("the original code has no --feature-dim and no --feature-norm: export another form")
    hparams = make_hparams(model, clip, settings.dataset, settings.options(), file.hparams.get("parts"))
    for written in (path, card):
        check_writable(written)
    if suffix in GRAPHS:
        content, checked = export_graph(model, suffix, {**hparams, "metrics": file.metrics, "code": code()})
        note = f"{checked[0].upper()}{checked[1:]}. The features were random vectors of the norm of CLIP's."
    elif suffix == SAFETENSORS:
        state = state_without_clip(model)
        content = pack_safetensors(model_content(hparams, state, model, metrics=file.metrics))
        read = unpack_safetensors(content, path)[WEIGHTS]
        if read.keys() != state.keys() or not all(torch.equal(read[key], state[key]) for key in state):
            raise UserError(f"safetensors changes the weights: {path} not written")
        note = "The file was read back; all weights are the same bits."
    else:
        write_torch(path, released_state(model, clip))
        note = "The file holds the model's weights; it was not run."
    if suffix in (*GRAPHS, SAFETENSORS):
        with atomic_write(path) as stream:
            stream.write(content)
    write_text(card, _card(path, form, model, hparams, settings.dataset, file, note))
    return model, card, checked


def _card(
    path: Path, form: str, model: Method, hparams: Mapping[str, Any], dataset: Dataset, file: ModelFile, checked: str
) -> str:
    version = code()
    paper = (inspect.getdoc(inspect.getmodule(type(model))) or model.name).splitlines()[0]
    known = hparams["clip"]
    toy = "\n- its CLIP is the small random one of the demo: only for trying out" if known == TOY else ""
    clip = f"CLIP {known}" if known else "the CLIP of its training data, which the file does not name"
    frames = hparams["frames_per_snippet"] or "an unknown number of"
    snippet = f"{frames} frame{'s' if frames != 1 else ''} per snippet"
    if "parts" in hparams:
        snippet = f"{hparams['parts'] or 'any number of'} snippets per video, each an equal part of its frames"
    metrics = "Not measured: the checkpoint holds no test metrics."
    if file.metrics:
        table = metrics_table({"measured": file.metrics}, {})
        metrics = f"At the end of training, on the test set of {dataset.title}:\n\n```text\n{table}\n```"
    classes, options = (
        "\n".join(f"- {name}: {value}" for name, value in pairs.items())
        for pairs in (dataset.classes, hparams["options"])
    )
    return f"""\
# {path.name}

## What it is

A detector of anomalous events in video, snippet by snippet. {paper}

- form: {form}; SHA-256 begins with {short_hash(path)}, {path.stat().st_size} bytes
- method: {hparams["method"]}
- trained on: {dataset.title}, video labels only; the training features are not in this file
- protocol: {hparams["protocol"]} (`paper`: the released code's, which selects the weights on the test set)
- exported from: {Path(file.path).name}
- code: clipfusionvad {version["version"]}, commit {version["commit"] or "unknown"}, sources {version["sources"]}{toy}

## Inputs and outputs

One whole video at a time, of any length L ≥ 1; windows and padding are inside. All values are float32.

{_tensors(model)}

## Features it expects

Image features of {clip}, {snippet}, \
{model.feature_width} values each, as in the training data: released features are the mean over the frames, not \
normalised. Features of another model or scale give meaningless scores without any error.

## How to run it

{_usage(path, model, dataset)}

## How it was checked

{checked}

## Metrics

{metrics}

## Classes

{classes}

## Options

{options}

## Limits and intended use

{_LIMITS}"""


def _tensors(model: Method) -> str:
    lines = ["| name | shape | what |", "|---|---|---|"]
    for name, stream in zip(input_names(model), model.streams, strict=True):
        lines.append(f"| `{name}` (input) | (L, {model.feature_width}) | {stream} features, a row per snippet |")
    meanings = {MAIN: "probability of an anomaly, 0 to 1", SECOND: "the same of another branch"}
    meanings[CLASSES] = "probability of each class below, in that order"
    outputs = score_by_method(model, [stream.numpy() for stream in random_video(model, 1)])
    for name, value in outputs.items():
        shape = f"(L, {value.shape[1]})" if value.ndim == 2 else "(L,)"
        lines.append(f"| `{name}` | {shape} | {meanings.get(name, meanings[SECOND])} |")
    return "\n".join(lines)


def _usage(path: Path, model: Method, dataset: Dataset) -> str:
    names, shape, suffix = input_names(model), f"300, {model.feature_width}", path.suffix.lower()
    if suffix == SAFETENSORS:
        flags = f"--method {model.name} --dataset {dataset.name} --model-path {path.name}"
        return f"```bash\npython -m clipfusionvad test {flags}\n```\n\nCLIP is not in the file; `--clip` names it."
    if suffix not in GRAPHS:
        return "The original project's code loads it; all of CLIP is inside. In this repository: `--model-path`."
    if suffix == ".onnx":
        lines = ["import numpy as np", "import onnxruntime", ""]
        lines += [f'session = onnxruntime.InferenceSession("{path.name}")', "# np.load(…) of real features here"]
        lines += [f"{name} = np.random.randn({shape}).astype(np.float32)" for name in names]
        fed = ", ".join(f'"{name}": {name}' for name in names)
        lines += ["outputs = [output.name for output in session.get_outputs()]"]
        lines += [f"scores = dict(zip(outputs, session.run(outputs, {{{fed}}})))"]
    else:
        lines = ["import torch", "", f'program = torch.export.load("{path.name}").module()']
        lines += [f"{name} = torch.randn({shape})" for name in names]
        lines += [f"scores = program({', '.join(names)})"]
    return "\n".join(["```python", *lines, f'print(scores["{MAIN}"].shape)', "```"])
