"""What a method is: one class, registered under a name, in one file of this package.

B videos or windows, T snippets of an input, D feature width of one stream, C classes (0 is *normal*), E text width.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from clipfusionvad.data.sampling import Sampling, WindowSampling
from clipfusionvad.io.errors import UserError
from clipfusionvad.models import register_method as register_method

# Snippets, of one long or of many short videos, that are scored in one forward pass: enough to fill a GPU, few
# enough for a processor's cache.
SNIPPETS_AT_ONCE = {"cpu": 2048, "cuda": 65_536}

# A video's features: one array (L, D), or one per stream of the method.
Features = np.ndarray | Tensor | Sequence[np.ndarray] | Sequence[Tensor]


@dataclass(frozen=True)
class VADOutput:
    """What a forward pass gives: coarse_logits (B, T, 1), fine_logits (B, T, C), text_features (C, E).

    The last two are None for a method that does not tell classes apart (``Any``: whoever reads them knows that it
    does). A method whose losses need more
    extends this class. Tensors have a row per video, but for those in ``replicated``.
    """

    #: Fields that do not depend on the videos.
    replicated: ClassVar[tuple[str, ...]] = ("text_features",)

    coarse_logits: Tensor
    fine_logits: Tensor | Any
    text_features: Tensor | Any


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
    #: Feature streams of a snippet, side by side in the last dim of an input; lists name the files of the first.
    streams: ClassVar[tuple[str, ...]] = ("rgb",)
    #: How many branches ``scores`` gives an anomaly probability of.
    branches: ClassVar[int] = 1
    #: Whether the method encodes class prompts with CLIP; a method that does not gets None for ``clip``.
    needs_clip: ClassVar[bool] = True
    #: What the method sets differently from an option file, whatever the dataset.
    defaults: ClassVar[Mapping[str, Any]] = {}
    #: What it sets for the small data of ``--demo``.
    demo: ClassVar[Mapping[str, Any]] = {}
    #: Buffers that ``calibrate`` fills; NaN until then.
    calibration: ClassVar[tuple[str, ...]] = ()

    visual_length: int
    visual_width: int
    _calibrated = False
    _uncompiled_text: Callable[[], Any] | None = None

    @classmethod
    @abstractmethod
    def add_options(cls, group: argparse._ArgumentGroup) -> None:
        """Add a flag for every option of the method."""

    @classmethod
    def recognises(cls, state: Mapping[str, Tensor]) -> bool:
        """Whether a state dict without a name looks like one that the method's authors released."""
        return False

    @classmethod
    def from_released(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A released state dict under the names of this class, CLIP in it under ``clipmodel.``."""
        return dict(state)

    def to_released(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back: this model's own state and the whole of CLIP under ``clipmodel.``, as its authors name them."""
        return dict(state)

    @classmethod
    def sampling_of(cls, options: Mapping[str, Any]) -> Sampling:
        """How videos become inputs of a model with these options; there need not be one."""
        return WindowSampling(options["visual_length"])

    @property
    def sampling(self) -> Sampling:
        """How videos become inputs of this model: as its options say."""
        return self.sampling_of(vars(self))

    @property
    def windows_at_once(self) -> int:
        """How many test inputs are scored in one forward pass."""
        device = next(self.parameters()).device.type
        return max(1, SNIPPETS_AT_ONCE.get(device, SNIPPETS_AT_ONCE["cuda"]) // self.sampling.length)

    def calibrate(self, normal_videos: Iterable[np.ndarray]) -> None:
        """Before training, fill the buffers in ``calibration`` from the normal training videos, (L, D) each."""

    @property
    def calibrated(self) -> bool:
        # Asked in every forward pass: once it is so, a GPU is not waited for again.
        if not self._calibrated:
            self._calibrated = all(bool(self.get_buffer(name).isfinite().all()) for name in self.calibration)
        return self._calibrated

    @abstractmethod
    def encode_text(self) -> Any:
        """What depends on the class prompts alone; evaluation computes it once and hands it to ``forward``."""

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As of every module, but for the text where no gradients are wanted.

        In inference text is encoded once for all videos, which pays for no compiling, and comes out with the very
        numbers that an evaluation hands to ``forward``.
        """
        self._uncompiled_text = torch.compiler.disable(self.encode_text)
        super().compile(*args, **kwargs)

    def encode_once(self) -> Any:
        """``encode_text``, for a ``forward`` that is given no text."""
        uncompiled = None if torch.is_grad_enabled() else self._uncompiled_text
        return (uncompiled or self.encode_text)()

    def context_vectors(self) -> Tensor | None:
        """What the method has learned in place of words of a prompt, as CLIP reads it: (n, W), or (C, n, W) of each
        class; None where it has learned nothing of the kind."""
        return None

    @abstractmethod
    def forward(self, visual: Tensor, lengths: Tensor | None = None, text: Any = None) -> VADOutput:
        """visual (B, T, D), lengths (B,) valid snippets (None: all) → output."""

    @abstractmethod
    def losses(self, output: Any, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The terms whose sum is trained on, each already weighted; output of ``forward``, targets (B, C) multi-hot."""

    @abstractmethod
    def scores(self, output: VADOutput) -> Scores:
        """Turn logits into probabilities."""

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Keyword-only arguments of the method's own ``__init__`` and of those it passes them on to."""
        initialisers = [base.__init__ for base in cls.__mro__ if "__init__" in vars(base) and issubclass(base, Method)]
        parameters = [p for init in reversed(initialisers) for p in inspect.signature(init).parameters.values()]
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @classmethod
    def option_names(cls) -> list[str]:
        return list(cls.option_defaults())

    def score_video(self, features: Features) -> tuple[np.ndarray, np.ndarray | None]:
        """Score one whole video: features (L, D) → anomaly probability (L,) and class probabilities (L, C) or None.

        A method of several streams takes a sequence with one array (L, D) for each, or all side by side. The
        anomaly probability is that of the main branch.
        """
        joined = self._join(features)
        windows, lengths = self.sampling.windows(joined)
        was_training = self.training
        self.eval()
        with torch.inference_mode():
            text = self.encode_text()
        anomaly, classes = self.score_windows(windows, lengths, text)
        self.train(was_training)
        count = len(joined)
        scores = self.sampling.restore(anomaly[0], count)
        return scores, None if classes is None else self.sampling.restore(classes, count)

    def _join(self, features: Features) -> np.ndarray:
        """A video's streams side by side, (L, streams · D)."""
        streams = [features] if isinstance(features, np.ndarray | Tensor) else list(features)
        arrays = [np.asarray(stream.detach().cpu() if isinstance(stream, Tensor) else stream) for stream in streams]
        joined = np.concatenate(arrays, axis=-1) if len({len(array) for array in arrays}) == 1 else None
        width = len(self.streams) * self.visual_width
        if joined is None or joined.ndim != 2 or joined.shape[1] != width:
            wanted = " and ".join(f"{name} (snippets, {self.visual_width})" for name in self.streams)
            raise UserError(f"{self.name} scores {wanted}, not {', '.join(str(array.shape) for array in arrays)}")
        return joined

    @torch.inference_mode()
    def score_windows(
        self, windows: np.ndarray, lengths: np.ndarray, text: Any
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Score windows (N, T, D) in bounded memory: anomaly (branches, N·T), classes (N·T, C) or None.

        ``lengths`` (N,) valid snippets, ``text`` from ``encode_text``.
        """
        device, at_once = next(self.parameters()).device, self.windows_at_once
        anomaly, classes = [], []
        for start in range(0, len(windows), at_once):
            chosen = slice(start, start + at_once)
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
