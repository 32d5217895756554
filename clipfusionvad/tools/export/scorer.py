"""All that a test does to one video, as a module of tensors that can be exported.

L snippets of a video, D feature width of one stream, C classes (0 is *normal*).
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from clipfusionvad.models import Method

#: Outputs: the anomaly score of the main and of the second branch, and the class probabilities.
MAIN, SECOND, CLASSES = "anomaly", "anomaly_fine", "classes"


class VideoScorer(nn.Module):
    """A method with its text features as constants: whole videos → probabilities.

    Windows, padding, softmax and the way back to the video's snippets are inside; weights that scoring does not read,
    such as CLIP's, are not. The method itself does not change, except that it is put into evaluation mode.
    """

    text: Tensor | None

    def __init__(self, method: Method):
        super().__init__()
        self.inputs = input_names(method)
        self.sampling = method.sampling
        with torch.no_grad():
            fixed = method.eval().fixed_inputs()
        # At most one: the text features.
        self.register_buffer("text", fixed[0] if fixed else None)
        self.method = method
        with torch.no_grad(), _TensorsRead() as read:
            self(*random_video(method, 1))
        self.method = _without_others(method, read.ids)

    def forward(self, *streams: Tensor) -> dict[str, Tensor]:
        """(L, D) of each stream → anomaly (L,) of each branch and, if the method has them, classes (L, C)."""
        count = streams[0].shape[0]
        windows, lengths = self.sampling.tensor_windows(torch.cat(streams, dim=-1))
        fixed = () if self.text is None else (self.text,)
        scores = self.method.scores(self.method(windows, lengths, *fixed))
        branches = [self.sampling.tensor_restore(branch.flatten(), count) for branch in scores.anomaly]
        outputs = {branch_name(number): branch for number, branch in enumerate(branches)}
        if scores.classes is not None:
            outputs[CLASSES] = self.sampling.tensor_restore(scores.classes.flatten(0, 1), count)
        return outputs


def input_names(method: Method) -> tuple[str, ...]:
    """Return the names of the inputs: "features" for a method of one stream, else the streams' names."""
    return ("features",) if len(method.streams) == 1 else method.streams


def random_video(method: Method, count: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return random features of ``count`` snippets with the norm of CLIP's: (L, D) of each stream."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(method.streams), count, method.visual_width)
    return (10 / method.visual_width**0.5 * torch.randn(shape, generator=generator)).unbind(0)


def branch_name(number: int) -> str:
    """Return the name of the output of a scoring branch, counted from 0."""
    return (MAIN, SECOND)[number] if number < 2 else f"{MAIN}_{number + 1}"


def score_by_method(method: Method, streams: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return what the exported graph must give, computed as in a test: (L, D) of each stream → arrays by name."""
    joined = np.concatenate(streams, axis=-1)
    windows, lengths = method.sampling.windows(joined)
    with torch.inference_mode():
        fixed = method.eval().fixed_inputs()
    anomaly, classes = method.score_windows(windows, lengths, *fixed)
    outputs = {branch_name(n): method.sampling.restore(branch, len(joined)) for n, branch in enumerate(anomaly)}
    return outputs if classes is None else outputs | {CLASSES: method.sampling.restore(classes, len(joined))}


class _TensorsRead(TorchFunctionMode):
    """Collects the ``id`` of every tensor that an operation reads."""

    def __init__(self) -> None:
        self.ids: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ids |= {id(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        return func(*args, **(kwargs or {}))


def _without_others(method: Method, kept: set[int]) -> Method:
    """Return a copy of a method, on the same tensors, that has only those whose ``id`` is in ``kept``."""
    tensors = [*method.parameters(), *method.buffers()]
    bare = copy.deepcopy(method, {id(tensor): tensor for tensor in tensors})
    for module in bare.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: None for name, tensor in held.items() if id(tensor) not in kept})
    return bare
