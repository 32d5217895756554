"""Write an exported model in one of its forms, and its model card: how to run it, how it was checked, its limits."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.checkpoint import ModelFile, make_hparams, model_content, released_state, state_without_clip
from clipfusionvad.engine.config import Settings
from clipfusionvad.engine.setup import load_model
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import atomic_write, check_writable, write_text, write_torch
from clipfusionvad.io.foreign_checkpoints import SAFETENSORS, WEIGHTS, pack_safetensors, unpack_safetensors
from clipfusionvad.io.provenance import code, short_hash
from clipfusionvad.models import Method
from clipfusionvad.models.clip import TOY
from clipfusionvad.report.table import check_metrics, metrics_table
from clipfusionvad.tools.export import FORMS, RELEASED, graph

_LIMITS = """\
The scores rank snippets. They are not calibrated probabilities of an event. Choose a threshold on videos of the place
where the model will run. The model has learned the kinds of events of its training data and the look of its cameras;
other scenes, lenses, frame rates and compression shift its scores. Public anomaly datasets are small, old and biased
about people and places, and so is the model.

The model is for research, and for showing a person where in a recording to look. Do not use it to decide about people
without a review of the video, or to identify people.
"""


def export_model(path: Path, settings: Settings, file: ModelFile) -> tuple[Method, Path, str]:
    """Write the model of a checkpoint in the form of the path's suffix, checked or not at all, and its card.

    Return the model, the path of the card (``model.onnx.md``), and the result of a graph's check.
    """
    suffix, card, checked = path.suffix.lower(), path.with_name(f"{path.name}.md"), ""
    if file.metrics is not None:
        check_metrics(file.metrics, f"metrics in {file.path}")
    model, clip = load_model(settings, file)
    hparams = make_hparams(model, clip, settings.dataset, settings.options())
    for written in (path, card):
        check_writable(written)
    if FORMS[suffix] == RELEASED:
        write_torch(path, released_state(model, clip))
        note = "The file holds the model's weights; it was not run."
    else:
        if suffix in graph.GRAPHS:
            content, checked = graph.export_graph(model, suffix, {**hparams, "metrics": file.metrics, "code": code()})
            note = f"{checked[0].upper()}{checked[1:]}. The features were random vectors of the norm of CLIP's."
        else:
            state = state_without_clip(model)
            content = pack_safetensors(model_content(hparams, state, metrics=file.metrics))
            read = unpack_safetensors(content, path)[WEIGHTS]
            if read.keys() != state.keys() or not all(torch.equal(read[key], state[key]) for key in state):
                raise UserError(f"safetensors changes the weights: {path} not written")
            note = "The file was read back; all weights are the same bits."
        with atomic_write(path) as stream:
            stream.write(content)
    write_text(card, _card(path, model, hparams, settings.dataset, file, note))
    return model, card, checked


def _card(
    path: Path, model: Method, hparams: Mapping[str, Any], dataset: Dataset, file: ModelFile, checked: str
) -> str:
    version = code()
    paper = (inspect.getdoc(inspect.getmodule(type(model))) or model.name).splitlines()[0]
    toy = "\n- its CLIP is the small random one of the demo: only for trying out" if hparams["clip"] == TOY else ""
    clip = (
        f"CLIP {hparams['clip']}" if hparams["clip"] else "the CLIP of its training data, which the file does not name"
    )
    frames = hparams["frames_per_snippet"]
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

- form: {FORMS[path.suffix.lower()]}; SHA-256 begins with {short_hash(path)}, {path.stat().st_size} bytes
- method: {hparams["method"]}
- trained on: {dataset.title}, video labels only; the training features are not in this file
- protocol: {hparams["protocol"]} (`paper`: the released code's, which selects the weights on the test set)
- exported from: {Path(file.path).name}
- code: clipfusionvad {version["version"]}, commit {version["commit"] or "unknown"}, sources {version["sources"]}{toy}

## Inputs and outputs

One whole video at a time, of any length L ≥ 1; windows and padding are inside. All values are float32.

{_tensors(model)}

## Features it expects

Image features of {clip}, {frames or "an unknown number of"} frame{"s" if frames != 1 else ""} per snippet, \
{model.visual_width} values each, as in the training data: released features are the mean over the frames, not \
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
    for name, stream in zip(graph.input_names(model), model.streams, strict=True):
        lines.append(f"| `{name}` (input) | (L, {model.visual_width}) | {stream} features, a row per snippet |")
    meanings = {graph.MAIN: "probability of an anomaly, 0 to 1", graph.SECOND: "the same of another branch"}
    meanings[graph.CLASSES] = "probability of each class below, in that order"
    outputs = graph.score_by_method(model, [stream.numpy() for stream in graph.random_video(model, 1)])
    for name, value in outputs.items():
        shape = f"(L, {value.shape[1]})" if value.ndim == 2 else "(L,)"
        lines.append(f"| `{name}` | {shape} | {meanings.get(name, meanings[graph.SECOND])} |")
    return "\n".join(lines)


def _usage(path: Path, model: Method, dataset: Dataset) -> str:
    names, shape, suffix = graph.input_names(model), f"300, {model.visual_width}", path.suffix.lower()
    if suffix == SAFETENSORS:
        flags = f"--method {model.name} --dataset {dataset.name} --model-path {path.name}"
        return f"```bash\npython -m clipfusionvad test {flags}\n```\n\nCLIP is not in the file; `--clip` names it."
    if suffix not in graph.GRAPHS:
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
    return "\n".join(["```python", *lines, f'print(scores["{graph.MAIN}"].shape)', "```"])
