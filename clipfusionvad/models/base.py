"""What a method is: one class, registered under a name, in one file of this package.

B videos or windows, T snippets of an input, D feature width of one stream, C classes (0 is *normal*), E text width.
"""

from __future__ import annotations

import contextlib
import inspect
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from clipfusionvad.data.config import FRAMES_PER_SNIPPET
from clipfusionvad.data.sampling import Sampling, WindowSampling
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Declared, declared_options, size
from clipfusionvad.metrics import smooth_scores, snippet_edges
from clipfusionvad.metrics.scores import Scores
from clipfusionvad.models import register_method as register_method
from clipfusionvad.models.layers.feature_map import FeatureMap

# Snippets that are scored in one forward pass: enough to fill a GPU, few enough for a processor's cache.
SNIPPETS_AT_ONCE = {"cpu": 2048, "cuda": 65_536}

# A video's features: one array (L, D), or one per stream of the method.
Features = np.ndarray | Tensor | Sequence[np.ndarray] | Sequence[Tensor]

#: The name of the module in front of a method, in its state dict.
FEATURE_MAP = "feature_map"

# Options that most methods have.
EmbedDim = Annotated[int, size("width of CLIP's text tower")]
VisualLength = Annotated[int, size("snippets in a model input")]
VisualWidth = Annotated[int, size("width of the visual features")]


@dataclass(frozen=True)
class VADOutput:
    """Output of a forward pass: coarse_logits (B, T, 1), fine_logits (B, T, C), text_features (C, E).

    The last two are None for a method without classes (typed ``Any``, so that a method that has them need not check).
    A method whose losses need more extends this class, with ``kw_only=True``.
    """

    #: Fields that do not depend on the videos; all others have a row per video.
    replicated: ClassVar[tuple[str, ...]] = ("text_features",)

    coarse_logits: Tensor
    fine_logits: Tensor | Any = None
    text_features: Tensor | Any = None


@dataclass(frozen=True)
class Probabilities:
    """Probabilities of each snippet: ``anomaly`` (B, T) of every scoring branch, the main one first (the metrics number
    them: auc1, auc2), and ``classes`` (B, T, C), None for a method without classes."""

    anomaly: tuple[Tensor, ...]
    classes: Tensor | None = None


class Method(nn.Module, ABC):
    """A detector that does not encode text; ``TextMethod`` is one that does.

    A method is decorated with ``@register_method`` and has a ``name``, ``forward``, ``losses`` and ``scores``. Its
    ``__init__(self, classes, *, ...)`` (``TextMethod``: ``class_prompts, clip, *, ...``) sets ``visual_length`` (T) and
    ``visual_width`` (D). Each keyword-only argument of the form ``name: Annotated[type, Option("help")] = default`` is
    an option; ``**shared``, passed on, adds those of the base class. docs/methods.md ("Add a method") has an example.
    """

    name: ClassVar[str]
    #: Feature streams of a snippet, side by side in the last dim of an input; lists name the files of the first.
    streams: ClassVar[tuple[str, ...]] = ("rgb",)
    #: How many branches ``scores`` returns an anomaly probability of.
    branches: ClassVar[int] = 1
    #: Whether the method is built from CLIP's weights.
    needs_clip: ClassVar[bool] = False
    #: Whether its published lists leave out videos of several classes.
    single_label: ClassVar[bool] = False
    #: Whether there is something to train.
    trained: ClassVar[bool] = True
    #: Whether its losses pair the rows of a batch's normal first half with those of the anomalous second half.
    paired: ClassVar[bool] = False
    #: How the names of parameters begin that ``engine.optimizer.StableAdamW`` trains, in ``stable_steps`` steps.
    stable_branch: ClassVar[str] = ""
    #: Buffers that ``set_normal_centroid`` fills; NaN until then.
    centroid_buffers: ClassVar[tuple[str, ...]] = ()

    visual_length: int
    visual_width: int
    stable_steps: int = 0
    #: The names of the classes in scores: the prompts; ``load_model`` puts the labels of the dataset in their place.
    labels: tuple[str, ...] = ()
    #: How ``score_video`` reads features, as a test does: the frames that a row covers (None: an equal part of the
    #: video), and how far it smooths scores, in rows. ``load_model`` takes both from the file.
    frames_per_snippet: int | None = FRAMES_PER_SNIPPET
    smooth: float = 0.0
    _centroid_set = False

    @classmethod
    def declared_options(cls) -> dict[str, Declared]:
        """Return the options by name: those that ``__init__`` declares and those of the classes it passes them to."""
        declared: dict[str, Declared] = {}
        for base in cls.__mro__:
            if issubclass(base, Method) and "__init__" in vars(base):
                declared = declared_options(base) | declared
                parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
                if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
                    break
        return declared | declared_options(FeatureMap)

    @classmethod
    def option_names(cls) -> list[str]:
        return list(cls.declared_options())

    @classmethod
    def matches_state_dict(cls, state: Mapping[str, Tensor]) -> bool | None:
        """Whether a state dict without a name looks like one that the method's authors released; None: unknown."""
        return None

    @classmethod
    def from_released(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a released state dict under the names of this class, CLIP's weights under ``clipmodel.``."""
        return dict(state)

    def to_released(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this model's state, with all of CLIP under ``clipmodel.``, under the names of its authors."""
        return dict(state)

    @classmethod
    def sampling_of(cls, options: Mapping[str, Any]) -> Sampling:
        """Return how videos become inputs of a model with these options; needs no model."""
        return WindowSampling(options["visual_length"])

    @property
    def sampling(self) -> Sampling:
        """How videos become inputs of this model."""
        return self.sampling_of(vars(self))

    @property
    def windows_at_once(self) -> int:
        """How many test inputs are scored in one forward pass."""
        if self.sampling.is_whole:
            return 1
        device = next(self.parameters()).device.type
        return max(1, SNIPPETS_AT_ONCE.get(device, SNIPPETS_AT_ONCE["cuda"]) // self.sampling.length)

    def map_features(self, feature_dim: int | None, feature_norm: str | None) -> None:
        """Put a ``FeatureMap`` in front of ``forward``; ``UserError`` if the method could not learn it."""
        if feature_dim is not None and not self.trained:
            raise UserError(f"{self.name} has nothing to train, so no map of features of width {feature_dim} either")
        with isolated_rng("feature map"):
            streams = len(self.streams)
            module = FeatureMap(self.visual_width, streams, feature_dim=feature_dim, feature_norm=feature_norm)
        setattr(self, FEATURE_MAP, module)
        self.register_forward_pre_hook(_map_input, with_kwargs=True)

    @property
    def feature_map(self) -> FeatureMap | None:
        """What ``map_features`` put in front, or None."""
        return cast(FeatureMap | None, self._modules.get(FEATURE_MAP))

    @property
    def data_buffers(self) -> tuple[str, ...]:
        """The buffers that hold statistics of the training features."""
        own = self.feature_map.named_buffers() if self.feature_map else ()
        return (*self.centroid_buffers, *(f"{FEATURE_MAP}.{name}" for name, _ in own))

    @property
    def feature_width(self) -> int:
        """The width of the features of a stream, as files hold them."""
        return self.feature_map.feature_dim if self.feature_map else self.visual_width

    def set_normal_centroid(self, normal_videos: Iterable[np.ndarray]) -> None:
        """Fill the buffers in ``centroid_buffers`` from the normal training videos, (L, D) each, before training."""

    @property
    def has_normal_centroid(self) -> bool:
        """Whether the buffers in ``centroid_buffers``, if any, are filled."""
        # Read in every forward pass: once it is True, the GPU is not synchronised again.
        if not self._centroid_set:
            self._centroid_set = all(bool(self.get_buffer(name).isfinite().all()) for name in self.centroid_buffers)
        return self._centroid_set

    def fixed_inputs(self) -> tuple[Any, ...]:
        """What ``forward`` takes after ``lengths`` that does not depend on the videos: computed once per evaluation."""
        return ()

    @abstractmethod
    def forward(self, visual: Tensor, lengths: Tensor | None = None) -> VADOutput:
        """visual (B, T, D), lengths (B,) valid snippets (None: all) → output."""

    @abstractmethod
    def losses(self, output: Any, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms, whose sum is minimised; output of ``forward``, targets (B, C) multi-hot."""

    def scores(self, output: VADOutput) -> Probabilities:
        """Turn logits into probabilities; here only those of the coarse branch."""
        return Probabilities((torch.sigmoid(output.coarse_logits.float()).squeeze(-1),))

    def score_video(self, features: Features, frames: int | None = None, fps: float | None = None) -> Scores:
        """Score one whole video: features (L, D) → anomaly probability (L,) of the main branch, classes (L, C) or None.

        ``frames``, the number of frames of the video, and ``fps`` set the times of the scores. Without ``frames``, the
        last snippet is complete. A method of several streams takes a sequence with one array (L, D) for each, or all
        side by side. Raises ``UserError`` for other shapes, for values that are not floats, and for NaN and infinity,
        except for rows all NaN of further streams, which become zeros as those of files do.
        """
        if frames is not None and not (isinstance(frames, int | np.integer) and frames > 0):
            raise UserError(f"frames is the number of frames of the video, not {frames!r}")
        if fps is not None and not 0 < fps < float("inf"):
            raise UserError(f"fps is the frame rate of the video, not {fps!r}")
        joined = self._join_streams(features)
        count, stride = len(joined), self.frames_per_snippet
        if frames and stride and abs(frames - count * stride) > stride:
            raise UserError(f"{count} rows of {stride} frames each do not belong to a video of {frames} frames")
        windows, lengths = self.sampling.windows(joined)
        was_training = self.training
        self.eval()
        with torch.inference_mode():
            fixed = self.fixed_inputs()
        anomaly, classes = self.score_windows(windows, lengths, *fixed)
        self.train(was_training)
        length = frames or count * (stride or 0)
        edges = snippet_edges(count, int(length), stride) if length else np.full(count + 1, np.nan)
        curve = smooth_scores(self.sampling.restore(anomaly[0], count), self.smooth)
        found = None if classes is None else smooth_scores(self.sampling.restore(classes, count), self.smooth)
        return Scores(curve, found, edges, fps, self.labels)

    def score_frames(self, features: Features, frames: int | None = None, fps: float | None = None) -> Scores:
        """Return what ``score_video`` does with a row for each frame, for ``metrics.frame_metrics`` and others."""
        if not (frames or self.frames_per_snippet):
            raise UserError("the rows of these features are equal parts of a video: pass the number of its frames")
        return self.score_video(features, frames, fps).per_frame()

    def _join_streams(self, features: Features) -> np.ndarray:
        """Return the checked features of ``score_video`` side by side, (L, streams · D) float32."""
        arrays = []
        for stream in [features] if isinstance(features, np.ndarray | Tensor) else features:
            if isinstance(stream, Tensor):
                # numpy has no bfloat16.
                stream = stream.detach().cpu()
                stream = stream.float() if stream.is_floating_point() else stream
            arrays.append(np.asarray(stream))
            if arrays[-1].dtype.kind != "f":
                raise UserError(f"{self.name} scores features of float16, float32 or float64, not {arrays[-1].dtype}")
        shapes = [array.shape for array in arrays]
        fits = all(len(shape) == 2 and shape[0] == shapes[0][0] > 0 for shape in shapes)
        if not fits or sum(shape[1] for shape in shapes) != len(self.streams) * self.feature_width:
            wanted = " and ".join(f"{name} (snippets, {self.feature_width})" for name in self.streams)
            raise UserError(f"{self.name} scores {wanted}, not {', '.join(dict.fromkeys(map(str, shapes)))}")
        with np.errstate(over="ignore"):
            joined = np.concatenate(arrays, axis=1, dtype=np.float32, casting="same_kind")
        for number, name in enumerate(self.streams):
            own = joined[:, number * self.feature_width : (number + 1) * self.feature_width]
            if number:
                own[np.isnan(own).all(axis=1)] = 0
            finite = np.isfinite(own).all(axis=1)
            if not finite.all():
                where = f"snippet {int(np.argmin(finite))} (counted from 0) of the {name} features"
                raise UserError(f"{where} holds NaN or infinity, as do {int((~finite).sum()) - 1} others")
        return joined

    def check_visual(self, visual: Tensor, any_length: bool = False) -> None:
        """Raise ``UserError`` unless an input of ``forward`` is (B, T, D), with the model's T if it needs just that."""
        length = self.sampling.length
        if visual.dim() != 3 or visual.shape[2] != self.visual_width or not (any_length or visual.shape[1] == length):
            wanted = f"(batch, {'snippets' if any_length else length}, {self.visual_width})"
            hint = "" if any_length else "; score_video takes a video of any length"
            raise UserError(f"{self.name} takes inputs of shape {wanted}, not {tuple(visual.shape)}{hint}")

    @torch.inference_mode()
    def score_windows(
        self, windows: np.ndarray, lengths: np.ndarray, *fixed: Any
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Score windows (N, T, D) of ``lengths`` (N,) in bounded memory: anomaly (branches, N·T), classes (N·T, C)."""
        device, at_once = next(chain(self.parameters(), self.buffers())).device, self.windows_at_once
        anomaly, classes = [], []
        for start in range(0, len(windows), at_once):
            chosen = slice(start, start + at_once)
            visual = torch.from_numpy(windows[chosen]).to(device, torch.float32)
            scores = self.scores(self(visual, torch.from_numpy(lengths[chosen]).to(device), *fixed))
            anomaly.append(torch.stack([branch.flatten() for branch in scores.anomaly]).float().cpu().numpy())
            if scores.classes is not None:
                classes.append(scores.classes.flatten(0, 1).float().cpu().numpy())
        return np.concatenate(anomaly, axis=1), np.concatenate(classes) if classes else None


class TextMethod(Method):
    """A detector that encodes class prompts with CLIP's text tower; it scores by a coarse and a fine branch."""

    needs_clip = True
    branches = 2
    #: The text features (C, E) of a model that only scores (``store_text``).
    stored_text: Tensor
    _uncompiled_text: Callable[[], Tensor] | None = None

    @abstractmethod
    def encode_text(self) -> Tensor:
        """Return the text features (C, E) of the class prompts."""

    @abstractmethod
    def forward(self, visual: Tensor, lengths: Tensor | None = None, text: Tensor | None = None) -> VADOutput:
        """visual (B, T, D), lengths (B,) valid snippets (None: all), text from ``encode_text`` → output."""

    def fixed_inputs(self) -> tuple[Any, ...]:
        return (self.encode_text(),)

    def store_text(self, text: Tensor) -> None:
        """Score with these text features (C, E) from now on, without CLIP's text tower; the model cannot train then."""
        if len(text) != self.text_count:
            raise UserError(f"{self.name} reads the features of {self.text_count} texts, but {len(text)} are stored")
        self.eval().register_buffer("stored_text", text, persistent=False)
        self._modules.pop("clipmodel", None)
        setattr(self, "encode_text", self._give_stored_text)  # noqa: B010

    @property
    def text_count(self) -> int:
        """How many texts ``encode_text`` encodes."""
        return len(self.labels)

    def _give_stored_text(self) -> Tensor:
        return self.stored_text

    def train(self, mode: bool = True) -> TextMethod:
        if mode and "stored_text" in self._buffers:
            hint = "to train it or to encode other classes, use create_model and load_weights"
            raise UserError(f"this {self.name} was loaded to score, without CLIP: {hint}")
        return super().train(mode)

    def scores(self, output: VADOutput) -> Probabilities:
        """The sigmoid of the coarse logits, and 1 − P(normal) of the softmax over classes."""
        classes = output.fine_logits.float().softmax(dim=-1)
        return Probabilities((*super().scores(output).anomaly, 1 - classes[..., 0]), classes)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model, except for the text encoder where no gradients are needed: an evaluation encodes once."""
        self._uncompiled_text = torch.compiler.disable(self.encode_text)
        super().compile(*args, **kwargs)

    def encode_once(self) -> Tensor:
        """``encode_text``, for a ``forward`` that is given no text."""
        uncompiled = None if torch.is_grad_enabled() else self._uncompiled_text
        return (uncompiled or self.encode_text)()

    def context_vectors(self) -> Tensor | None:
        """Return the learned embeddings in place of prompt words: (n, W), (C, n, W) per class, or None."""
        return None


def _map_input(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The hook of ``map_features``: replace ``visual``, the first argument of ``forward``."""
    visual, lengths = args[0], args[1] if len(args) > 1 else kwargs.get("lengths")
    assert isinstance(model, Method) and model.feature_map
    return (model.feature_map(visual, lengths), *args[1:]), kwargs


@contextlib.contextmanager
def isolated_rng(part: str) -> Iterator[None]:
    """Draw the initial weights of an optional part from its own generator, so that the others' do not depend on it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((torch.initial_seed() + zlib.crc32(part.encode())) % 2**63)
        yield
