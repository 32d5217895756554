"""The model card beside an exported file: what it is, how to run it, how it was checked, what it is not for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clipfusionvad.datasets import Dataset
from clipfusionvad.io.files import write_text
from clipfusionvad.io.foreign_checkpoints import SAFETENSORS
from clipfusionvad.io.provenance import code, short_hash
from clipfusionvad.models import Method
from clipfusionvad.models.clip import TOY
from clipfusionvad.report.table import metrics_table
from clipfusionvad.tools.export.check import Checked
from clipfusionvad.tools.export.forms import Form, Subject
from clipfusionvad.tools.export.scorer import CLASSES, MAIN, input_names, made_up_video, score_by_method

_LIMITS = """\
The scores rank snippets. They are not calibrated probabilities of an event, and a threshold has to be chosen on videos
of the place where the model is to run. It knows the kinds of events of its training data and the look of its cameras;
other scenes, lenses, frame rates and compression shift its scores. Public anomaly datasets are small, old and one-sided
about people and places, and the model repeats that.

Meant for research, and to show a person where in a recording to look. Not meant for decisions about people without
somebody reviewing the video, nor for telling who somebody is.
"""


def card_path(path: Path) -> Path:
    """``model.onnx`` → ``model.onnx.md``: several forms of a model can lie side by side."""
    return path.with_name(f"{path.name}.md")


def write_card(
    path: Path, subject: Subject, dataset: Dataset, checkpoint: str, form: Form, checked: Checked | None
) -> None:
    """Write the card of an exported file, which must be there."""
    model, made = subject.model, subject.made
    sections = {
        "What it is": "\n".join(_identity(path, subject, dataset, checkpoint, form)),
        "Inputs and outputs": "\n".join(_tensors(model)),
        "Features it expects": _features(model, made),
        "How to run it": _usage(path, model, dataset),
        "How it was checked": f"{_sentence(checked)}\n" if checked else _UNCHECKED.get(path.suffix.lower(), _BY_HAND),
        "Metrics": _metrics(subject, dataset),
        "Classes": "\n".join(f"- {label}: {prompt}" for label, prompt in dataset.classes.items()) + "\n",
        "Options": "\n".join(f"- {name}: {value}" for name, value in made["options"].items()) + "\n",
        "Limits and intended use": _LIMITS,
    }
    body = "\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    write_text(card_path(path), f"# {path.name}\n\n{body}")


_UNCHECKED = {SAFETENSORS: "The file was read back; all weights are the same bits.\n"}
_BY_HAND = "The file holds the model's own weights; it was not run.\n"


def _sentence(checked: Checked) -> str:
    return f"{str(checked)[0].upper()}{str(checked)[1:]}. The features were random numbers as long as CLIP's."


def _identity(path: Path, subject: Subject, dataset: Dataset, checkpoint: str, form: Form) -> Iterator[str]:
    made, version = subject.made, code()
    paper = (inspect.getdoc(inspect.getmodule(type(subject.model))) or subject.model.name).splitlines()[0]
    yield f"A detector of anomalous events in video, by the snippet. {paper}"
    yield ""
    yield f"- form: {form.title}; SHA-256 begins with {short_hash(path)}, {path.stat().st_size} bytes"
    yield f"- method: {made['method']}"
    yield f"- trained on: {dataset.title}, video labels only; the features it saw are not part of this file"
    yield f"- protocol: {made['protocol']} (`paper`: the released code's, which selects the weights on the test set)"
    yield f"- exported from: {Path(checkpoint).name}"
    commit = version["commit"] or "unknown"
    yield f"- code: clipfusionvad {version['version']}, commit {commit}, sources {version['sources']}"
    if made["clip"] == TOY:
        yield "- its CLIP is the small random one of the demo: good for trying out, not for use"
    yield ""


def _tensors(model: Method) -> Iterator[str]:
    yield "One whole video at a time, of any length L from one snippet on; windows and padding are inside. All float32."
    yield ""
    yield "| name | shape | what |"
    yield "|---|---|---|"
    for name, stream in zip(input_names(model), model.streams, strict=True):
        yield f"| `{name}` (input) | (L, {model.visual_width}) | {stream} features, a row per snippet |"
    outputs = score_by_method(model, [stream.numpy() for stream in made_up_video(model, 1)])
    meanings = {MAIN: "probability of an anomaly, 0 to 1", CLASSES: "probability of each class below, in that order"}
    for name, value in outputs.items():
        shape = f"(L, {value.shape[1]})" if value.ndim == 2 else "(L,)"
        yield f"| `{name}` | {shape} | {meanings.get(name, 'the same by another branch')} |"
    yield ""


def _features(model: Method, made: Mapping[str, Any]) -> str:
    source = f"CLIP {made['clip']}" if made["clip"] else "the CLIP of its training data, which the file does not name"
    frames = made["frames_per_snippet"]
    snippet = (
        f"{frames} frame{'s' if frames != 1 else ''} a snippet" if frames else "an unknown number of frames a snippet"
    )
    return (
        f"Image features of {source}, {snippet}, {model.visual_width} numbers each, as in the training data: released "
        f"features are the mean over the frames, not normalised. Features of another model or scale give meaningless "
        f"scores without any error.\n"
    )


def _usage(path: Path, model: Method, dataset: Dataset) -> str:
    names, shape = input_names(model), f"300, {model.visual_width}"
    match path.suffix.lower():
        case ".onnx":
            lines = ["import numpy as np", "import onnxruntime", ""]
            lines += [f'session = onnxruntime.InferenceSession("{path.name}")', "# np.load(…) of real features here"]
            lines += [f"{name} = np.random.randn({shape}).astype(np.float32)" for name in names]
            fed = ", ".join(f'"{name}": {name}' for name in names)
            lines += ["outputs = [output.name for output in session.get_outputs()]"]
            lines += [f"scores = dict(zip(outputs, session.run(outputs, {{{fed}}})))", f'print(scores["{MAIN}"].shape)']
        case ".pt2":
            lines = ["import torch", "", f'program = torch.export.load("{path.name}").module()']
            lines += [f"{name} = torch.randn({shape})" for name in names]
            lines += [f"scores = program({', '.join(names)})", f'print(scores["{MAIN}"].shape)']
        case suffix if suffix == SAFETENSORS:
            flags = f"--method {model.name} --dataset {dataset.name} --model-path {path.name}"
            return (
                f"```bash\npython -m clipfusionvad test {flags}\n```\n\nCLIP is not in the file; `--clip` finds it.\n"
            )
        case _:
            return "The original project's code loads it; all of CLIP is inside. Here: `--model-path`.\n"
    return "\n".join(["```python", *lines, "```", ""])


def _metrics(subject: Subject, dataset: Dataset) -> str:
    if not subject.metrics:
        return "Not measured: the checkpoint holds no test metrics.\n"
    table = metrics_table({"measured": subject.metrics}, {})
    return f"At the end of training, on the test set of {dataset.title}:\n\n```text\n{table}\n```\n"
