"""The model card beside an exported file: what it is, how to run it, how it was checked, and its limits."""

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
from clipfusionvad.tools.export.forms import Form, TrainedModel
from clipfusionvad.tools.export.graph import Checked
from clipfusionvad.tools.export.scorer import CLASSES, MAIN, input_names, random_video, score_by_method

_LIMITS = """\
The scores rank snippets. They are not calibrated probabilities of an event. Choose a threshold on videos of the place
where the model will run. The model has learned the kinds of events of its training data and the look of its cameras;
other scenes, lenses, frame rates and compression shift its scores. Public anomaly datasets are small, old and biased
about people and places, and so is the model.

The model is for research, and for showing a person where in a recording to look. Do not use it to decide about people
without a review of the video, or to identify people.
"""


def card_path(path: Path) -> Path:
    """Return the path of a card: ``model.onnx`` → ``model.onnx.md``."""
    return path.with_name(f"{path.name}.md")


def write_card(
    path: Path, trained: TrainedModel, dataset: Dataset, checkpoint: str, form: Form, checked: Checked | None
) -> None:
    """Write the card of an exported file, which must exist."""
    model, hparams = trained.model, trained.hparams
    sections = {
        "What it is": "\n".join(_identity(path, trained, dataset, checkpoint, form)),
        "Inputs and outputs": "\n".join(_tensors(model)),
        "Features it expects": _features(model, hparams),
        "How to run it": _usage(path, model, dataset),
        "How it was checked": _check(path, checked),
        "Metrics": _metrics(trained, dataset),
        "Classes": "\n".join(f"- {label}: {prompt}" for label, prompt in dataset.classes.items()) + "\n",
        "Options": "\n".join(f"- {name}: {value}" for name, value in hparams["options"].items()) + "\n",
        "Limits and intended use": _LIMITS,
    }
    body = "\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    write_text(card_path(path), f"# {path.name}\n\n{body}")


def _check(path: Path, checked: Checked | None) -> str:
    if checked:
        return f"{str(checked)[0].upper()}{str(checked)[1:]}. The features were random vectors of the norm of CLIP's.\n"
    if path.suffix.lower() == SAFETENSORS:
        return "The file was read back; all weights are the same bits.\n"
    return "The file holds the model's weights; it was not run.\n"


def _identity(path: Path, trained: TrainedModel, dataset: Dataset, checkpoint: str, form: Form) -> Iterator[str]:
    hparams, version = trained.hparams, code()
    paper = (inspect.getdoc(inspect.getmodule(type(trained.model))) or trained.model.name).splitlines()[0]
    yield f"A detector of anomalous events in video, snippet by snippet. {paper}"
    yield ""
    yield f"- form: {form.title}; SHA-256 begins with {short_hash(path)}, {path.stat().st_size} bytes"
    yield f"- method: {hparams['method']}"
    yield f"- trained on: {dataset.title}, video labels only; the training features are not in this file"
    yield f"- protocol: {hparams['protocol']} (`paper`: the released code's, which selects the weights on the test set)"
    yield f"- exported from: {Path(checkpoint).name}"
    commit = version["commit"] or "unknown"
    yield f"- code: clipfusionvad {version['version']}, commit {commit}, sources {version['sources']}"
    if hparams["clip"] == TOY:
        yield "- its CLIP is the small random one of the demo: only for trying out"
    yield ""


def _tensors(model: Method) -> Iterator[str]:
    yield "One whole video at a time, of any length L ≥ 1; windows and padding are inside. All values are float32."
    yield ""
    yield "| name | shape | what |"
    yield "|---|---|---|"
    for name, stream in zip(input_names(model), model.streams, strict=True):
        yield f"| `{name}` (input) | (L, {model.visual_width}) | {stream} features, a row per snippet |"
    outputs = score_by_method(model, [stream.numpy() for stream in random_video(model, 1)])
    meanings = {MAIN: "probability of an anomaly, 0 to 1", CLASSES: "probability of each class below, in that order"}
    for name, value in outputs.items():
        shape = f"(L, {value.shape[1]})" if value.ndim == 2 else "(L,)"
        yield f"| `{name}` | {shape} | {meanings.get(name, 'the same of another branch')} |"
    yield ""


def _features(model: Method, hparams: Mapping[str, Any]) -> str:
    clip, frames = hparams["clip"], hparams["frames_per_snippet"]
    source = f"CLIP {clip}" if clip else "the CLIP of its training data, which the file does not name"
    snippet = f"{frames or 'an unknown number of'} frame{'s' if frames != 1 else ''} per snippet"
    return (
        f"Image features of {source}, {snippet}, {model.visual_width} values each, as in the training data: released "
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
                f"```bash\npython -m clipfusionvad test {flags}\n```\n\nCLIP is not in the file; `--clip` names it.\n"
            )
        case _:
            return "The original project's code loads it; all of CLIP is inside. In this repository: `--model-path`.\n"
    return "\n".join(["```python", *lines, "```", ""])


def _metrics(trained: TrainedModel, dataset: Dataset) -> str:
    if not trained.metrics:
        return "Not measured: the checkpoint holds no test metrics.\n"
    table = metrics_table({"measured": trained.metrics}, {})
    return f"At the end of training, on the test set of {dataset.title}:\n\n```text\n{table}\n```\n"
