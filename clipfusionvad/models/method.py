"""What a method is: one class, registered under a name, in one file of this package.

B videos or windows, T snippets (``visual_length``), D feature width, C classes (0 is *normal*), E text width.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from clipfusionvad.clip import ClipWeights
from clipfusionvad.data.sampling import split_windows, window_lengths
from clipfusionvad.errors import UserError, nearest

# Windows, of one long or of many short videos, that are scored in one forward pass.
WINDOWS_AT_ONCE = 64


@dataclass(frozen=True)
class VADOutput:
    """What a forward pass gives: coarse_logits (B, T, 1), fine_logits (B, T, C), text_features (C, E).

    The last two are None for a method that does not tell classes apart.
    """

    coarse_logits: Tensor
    fine_logits: Tensor | None
    text_features: Tensor | None


@dataclass(frozen=True)
class Scores:
    """Probabilities of each snippet.

    ``anomaly`` holds one (B, T) tensor per scoring branch, the main one first: the metrics number them
    (auc1, auc2). ``classes`` (B, T, C) is None for a method that does not tell classes apart.
    """

    anomaly: tuple[Tensor, ...]
    classes: Tensor | None


class Method(nn.Module, ABC):
    """A detector. Its options are the keyword-only arguments of ``__init__``."""

    name: ClassVar[str]
    visual_length: int
    visual_width: int

    @classmethod
    @abstractmethod
    def add_options(cls, group: argparse._ArgumentGroup) -> None:
        """Add a flag for every option of the method."""

    @classmethod
    def recognises(cls, state: dict[str, Tensor]) -> bool:
        """Whether a state dict without a name looks like one of this method."""
        return False

    @abstractmethod
    def encode_text(self) -> Any:
        """What depends on the class prompts alone; evaluation computes it once and hands it to ``forward``."""

    @abstractmethod
    def forward(self, visual: Tensor, lengths: Tensor | None = None, text: Any = None) -> VADOutput:
        """visual (B, T, D), lengths (B,) valid snippets (None: all) → output."""

    @abstractmethod
    def losses(self, output: VADOutput, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The terms whose sum is trained on, each already weighted; targets (B, C) multi-hot."""

    @abstractmethod
    def scores(self, output: VADOutput) -> Scores:
        """Turn logits into probabilities."""

    @classmethod
    def option_names(cls) -> list[str]:
        """Keyword-only arguments of the method's own ``__init__`` and of those it passes them on to."""
        initialisers = [base.__init__ for base in cls.__mro__ if "__init__" in vars(base) and issubclass(base, Method)]
        parameters = [p for init in initialisers for p in inspect.signature(init).parameters.values()]
        return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]

    def score_video(self, features: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Score one whole video: features (L, D) → anomaly probability (L,) and class probabilities (L, C) or None.

        The anomaly probability is that of the main branch.
        """
        windows, count = split_windows(np.asarray(features), self.visual_length)
        was_training = self.training
        self.eval()
        with torch.inference_mode():
            text = self.encode_text()
        anomaly, classes = self.score_windows(windows, window_lengths(count, self.visual_length), text)
        self.train(was_training)
        return anomaly[0, :count], None if classes is None else classes[:count]

    @torch.inference_mode()
    def score_windows(
        self, windows: np.ndarray, lengths: np.ndarray, text: Any
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Score windows (N, T, D) in bounded memory: anomaly (branches, N·T), classes (N·T, C) or None.

        ``lengths`` (N,) valid snippets, ``text`` from ``encode_text``.
        """
        device = next(self.parameters()).device
        anomaly, classes = [], []
        for start in range(0, len(windows), WINDOWS_AT_ONCE):
            chosen = slice(start, start + WINDOWS_AT_ONCE)
            visual = torch.from_numpy(windows[chosen]).to(device, torch.float32)
            scores = self.scores(self(visual, torch.from_numpy(lengths[chosen]).to(device), text))
            anomaly.append(torch.stack([branch.flatten() for branch in scores.anomaly]).float().cpu().numpy())
            if scores.classes is not None:
                classes.append(scores.classes.flatten(0, 1).float().cpu().numpy())
        return np.concatenate(anomaly, axis=1), np.concatenate(classes) if classes else None


@contextlib.contextmanager
def own_stream(part: str) -> Iterator[None]:
    """Draw the initial weights of an optional part apart, so that without it all others start the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((torch.initial_seed() + zlib.crc32(part.encode())) % 2**63)
        yield


_METHODS: dict[str, type[Method]] = {}


def register_method(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known under its ``name``."""
    _METHODS[cls.name] = cls
    return cls


def method_names() -> list[str]:
    return sorted(_METHODS)


def find_method(name: str) -> type[Method]:
    if name not in _METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, _METHODS)}; known: {', '.join(method_names())}")
    return _METHODS[name]


def build_method(name: str, class_prompts: Sequence[str], clip: ClipWeights, **options: Any) -> Method:
    """Instantiate a method; an option that it does not have is an error that names the nearest one."""
    cls = find_method(name)
    known = cls.option_names()
    for option in options:
        if option not in known:
            raise UserError(f"{name} has no option {option!r}{nearest(option, known)}; it has: {', '.join(known)}")
    return cls(list(class_prompts), clip, **options)
