"""ReFLIP-VAD (TCSVT 2024) in two variants: the method of its paper, and what its released code was to compute.

The two share a name and the visual prompt, little else; neither can be checked against published weights. B videos,
T snippets, D feature width, C classes (0 is *normal*), E text width.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad.io.argtypes import layers, non_negative_float, positive_float, size
from clipfusionvad.io.errors import UserError, nearest
from clipfusionvad.models.base import Method, Scores, VADOutput, own_stream, register_method
from clipfusionvad.models.clip import TOY, ClipWeights
from clipfusionvad.models.layers import bag_losses
from clipfusionvad.models.layers.distilbert import DEFAULT, DistilBert
from clipfusionvad.models.layers.dual_branch import EMBEDDING_STD, TEMPERATURE, DualBranch
from clipfusionvad.models.layers.glimpse import EMPHASIZE_INPUTS, FeedForward, GlimpseEmphasize, TemporalOptions
from clipfusionvad.models.layers.prompt_encoder import MiddlePrompts, PromptEncoder, ShiftedTower
from clipfusionvad.models.layers.text import ClipTextTower, FixedPrompts, PromptLayout

RELEASED_CLIP, OWN_CLIP = "ReFLIPmodel.", "clipmodel."
DISTILBERT = "distilbert_model."
# In files that older versions of transformers wrote; no weights.
POSITION_IDS = DISTILBERT + "embeddings.position_ids"
# Options of one variant that option files or the published settings set whatever the variant is: passed over.
PASSED_OVER = {"visual_head", "visual_layers", "attn_window", "prompt_prefix", "prompt_postfix", "separation_weight"}
PASSED_OVER |= {"fine_weight", "magnitude_weight"}


@dataclass(frozen=True)
class MagnitudeOutput(VADOutput):
    """Besides the logits, the norms of the Emphasize features: magnitudes (B, T)."""

    magnitudes: Tensor


@register_method
class ReFLIPVAD(Method):
    """Calling this class makes one of its two subclasses, by ``variant``; the options are those of both."""

    name = "reflipvad"
    branches = 2
    variant: ClassVar[str]
    # Of the paper variant; for the other one a config says what its authors' options are.
    defaults = {
        "visual_length": 512,
        "max_epoch": 50,
        "batch_size": 64,
        "balanced": True,
        "optimizer": "adam",
        "lr": 3e-4,
        "weight_decay": 0.0,
        "scheduler_milestones": [],
        "eval_every": 0,
    }
    demo = {"prompt_encoder": TOY}

    def __new__(cls, *args: Any, variant: str = "paper", **options: Any) -> ReFLIPVAD:
        if variant not in VARIANTS:
            raise UserError(f"--variant {variant!r}{nearest(variant, VARIANTS)}; known: {', '.join(VARIANTS)}")
        return super().__new__(VARIANTS[variant] if cls is ReFLIPVAD else cls)

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Options of both variants; where both have one, the paper's default."""
        both: dict[str, Any] = {"variant": PaperReFLIP.variant}
        for variant in VARIANTS.values():
            both |= super(ReFLIPVAD, variant).option_defaults()
        return both | asdict(TemporalOptions())

    @classmethod
    def refuse(cls, options: Mapping[str, Any]) -> None:
        """Raise ``UserError`` for an option of the other variant that somebody has set."""
        known = cls.option_defaults()
        for name, value in options.items():
            if name != "variant" and name not in PASSED_OVER and value != known[name]:
                raise UserError(f"--{name.replace('_', '-')} is no option of --variant {cls.variant}")

    @staticmethod
    def find_distilbert(prompt_encoder: str | None, clip: ClipWeights) -> DistilBert:
        return DistilBert.find(prompt_encoder or (TOY if clip.source == TOY else DEFAULT))

    @classmethod
    def recognises(cls, state: Mapping[str, Tensor]) -> bool:
        released = "gc1.weight" in state and any(key.startswith(DISTILBERT) for key in state)
        return released or any(key.startswith("coarse_ffn.") for key in state)

    @classmethod
    def from_released(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_renamed(key, RELEASED_CLIP, OWN_CLIP): value for key, value in state.items() if key != POSITION_IDS}

    @classmethod
    def add_options(cls, group: argparse._ArgumentGroup) -> None:
        DualBranch.add_options(group)
        group.add_argument(
            "--variant",
            choices=list(VARIANTS),
            help="the paper's method, or the released code's; of the options above, paper reads only --prompts, "
            "--prompt-template and --product",
        )
        group.add_argument(
            "--prompt-encoder",
            help=f"DistilBERT: a model name to download, a folder (random weights where it has none), or 'toy'; "
            f"not given: {DEFAULT}, or toy with a toy CLIP",
        )
        group.add_argument(
            "--residual",
            action=argparse.BooleanOptionalAction,
            help="repo: add the mean DistilBERT state of a class's label to all its prompt embeddings",
        )
        _add_temporal_options(group)
        _add_prompt_options(group)
        _add_loss_options(group)


class ReleasedReFLIP(ReFLIPVAD, DualBranch):
    """The released code, which does not run, mended: VadCLIP whose prompts are shifted by a DistilBERT.

    DistilBERT reads the plain labels without an attention mask, so [PAD] is attended to and counted in the mean.
    Our completion: a linear layer to CLIP's width where the two differ. DistilBERT is trained along.
    """

    variant = "repo"

    def __init__(
        self,
        class_prompts: list[str],
        clip: ClipWeights,
        *,
        prompt_encoder: str | None = None,
        residual: bool = True,
        **options: Any,
    ):
        shared = DualBranch.option_defaults()
        self.refuse({name: value for name, value in options.items() if name not in shared})
        super().__init__(class_prompts, clip, **{name: options[name] for name in shared if name in options})
        self.residual = residual
        if residual:
            # The shift of a class reaches its very first token.
            self.prompts.layout = PromptLayout(self.prompts.layout.ends)
        distilbert = self.find_distilbert(prompt_encoder, clip)
        with own_stream("distilbert"):
            self.distilbert_model = distilbert.build()
            own, wanted = self.distilbert_model.config.dim, clip.text_width
            self.distilbert_projection = nn.Linear(own, wanted) if own != wanted else nn.Identity()
        self.register_buffer("label_ids", distilbert.tokens(class_prompts), persistent=False)

    def encode_labels(self) -> Tensor:
        """The mean of DistilBERT's last states over all positions of each label: (C, its width)."""
        return self.distilbert_model(self.label_ids).last_hidden_state.mean(dim=1)

    def encode_text(self) -> Tensor:
        if not self.residual:
            return super().encode_text()
        tower = ShiftedTower(self.clipmodel, self.distilbert_projection(self.encode_labels()))
        learned = self.text_prompt_embeddings
        return self.prompts(tower) if learned is None else self.prompts(tower, learned.weight)

    def to_released(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_renamed(key, OWN_CLIP, RELEASED_CLIP): value for key, value in state.items()}


class PaperReFLIP(ReFLIPVAD):
    """The paper's method; every point that it leaves open is an option, with our reading as its default.

    Intensified, glimpsed and emphasized features give a coarse score A per snippet; V, the features weighed by A,
    is added to the class text, with which the features are aligned. Padded snippets change nothing in evaluation.
    """

    variant = "paper"

    def __init__(
        self,
        class_prompts: list[str],
        clip: ClipWeights,
        *,
        embed_dim: int = 512,
        visual_length: int = 512,
        visual_width: int = 512,
        prompts: str = "learned",
        prompt_template: str = "{}",
        prompt_length: int = 24,
        class_contexts: bool = False,
        reparameterise: bool = True,
        prompt_encoder: str | None = None,
        train_prompt_encoder: bool = False,
        product: bool = True,
        temperature: float = TEMPERATURE,
        coarse_weight: float = 1.0,
        fine_weight: float = 1e-2,
        magnitude_weight: float = 1e-3,
        margin: float = 1.0,
        magnitude_distance: str = "mean_topk",
        single_normal: bool = True,
        **options: Any,
    ):
        temporal = {name: options.pop(name) for name in asdict(TemporalOptions()) if name in options}
        self.refuse(options)
        super().__init__()
        clip.check_widths(embed_dim, visual_width)
        if magnitude_distance not in bag_losses.DISTANCES:
            raise UserError(f"--magnitude-distance {magnitude_distance!r}; known: {', '.join(bag_losses.DISTANCES)}")
        self.visual_length, self.visual_width = visual_length, visual_width
        self.temperature = temperature
        self.weights = {"coarse": coarse_weight, "fine": fine_weight, "magnitude": magnitude_weight}
        if not any(self.weights.values()):
            raise UserError("every loss weight is 0: there is nothing to train on")
        self.margin, self.magnitude_distance, self.single_normal = margin, magnitude_distance, single_normal

        settings = TemporalOptions(**temporal)
        self.temporal = GlimpseEmphasize(visual_width, settings)
        with own_stream("coarse"):
            self.coarse_ffn = FeedForward(visual_width, settings.ffn_expansion)
            self.classifier = nn.Linear(visual_width, 1)
        with own_stream("product"):
            self.prompt_ffn = FeedForward(visual_width, settings.ffn_expansion) if product else None

        self.clipmodel = ClipTextTower(clip)
        self.prompt_embeddings = self.prompt_encoder = None
        self.prompts: FixedPrompts | MiddlePrompts
        if prompts == "fixed":
            self.prompts = FixedPrompts(class_prompts, prompt_template)
            return
        self.prompts = MiddlePrompts(class_prompts, prompt_length, shared=not class_contexts)
        shape = (len(class_prompts),) * class_contexts + (prompt_length, embed_dim)
        with own_stream("prompts"):
            self.prompt_embeddings = nn.Parameter(nn.init.normal_(torch.empty(shape), std=EMBEDDING_STD))
        if reparameterise:
            distilbert = self.find_distilbert(prompt_encoder, clip)
            with own_stream("distilbert"):
                built = distilbert.build()
                self.prompt_encoder = PromptEncoder(built, embed_dim, prompt_length, train_prompt_encoder)

    def encode_text(self) -> Tensor:
        """Text features of the class prompts, not normalised: (C, E)."""
        if self.prompt_embeddings is None:
            return self.prompts(self.clipmodel)
        return self.prompts(self.clipmodel, self.context_vectors())

    def context_vectors(self) -> Tensor | None:
        """The prompt tokens as the prompt encoder gives them."""
        learned = self.prompt_embeddings
        return learned if learned is None or self.prompt_encoder is None else self.prompt_encoder(learned)

    def forward(self, visual: Tensor, lengths: Tensor | None = None, text: Tensor | None = None) -> MagnitudeOutput:
        text = self.encode_once() if text is None else text
        steps = torch.arange(visual.shape[1], device=visual.device).expand(visual.shape[0], -1)
        valid = steps < (visual.shape[1] if lengths is None else lengths[:, None])
        features, magnitudes = self.temporal(visual, valid)
        coarse = self.classifier(self.coarse_ffn(features) + features)
        classes = text
        if self.prompt_ffn is not None:
            weights = coarse.sigmoid() * valid[..., None]
            classes = self.prompt_ffn(text + F.normalize(weights.transpose(1, 2) @ features, dim=-1)) + text
        cosine = F.normalize(features, dim=-1) @ F.normalize(classes, dim=-1).transpose(-1, -2)
        return MagnitudeOutput(coarse, cosine / self.temperature, text, magnitudes)

    def losses(self, output: MagnitudeOutput, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        bag = (targets, lengths, self.single_normal)
        apart = bag_losses.magnitude_loss(output.magnitudes, *bag, self.margin, self.magnitude_distance)
        terms = {
            "coarse": bag_losses.coarse_loss(output.coarse_logits, *bag),
            "fine": bag_losses.fine_loss(output.fine_logits, *bag),
            "magnitude": apart,
        }
        return {name: weight * terms[name] for name, weight in self.weights.items()}

    def scores(self, output: VADOutput) -> Scores:
        classes = output.fine_logits.float().softmax(dim=-1)
        return Scores((torch.sigmoid(output.coarse_logits.float()).squeeze(-1), 1 - classes[..., 0]), classes)


VARIANTS: dict[str, type[ReFLIPVAD]] = {cls.variant: cls for cls in (ReleasedReFLIP, PaperReFLIP)}


def _renamed(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old) if key.startswith(old) else key


def _add_temporal_options(group: argparse._ArgumentGroup) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--fim", action=switch, help="paper: feature intensify module")
    group.add_argument("--fim-alpha", type=non_negative_float, help="paper: its factor (not published)")
    group.add_argument("--fim-kernel", type=size, help="paper: snippets that its convolution sees (not published)")
    group.add_argument("--glimpse", action=switch, help="paper: attention along time")
    group.add_argument(
        "--glimpse-window",
        type=layers,
        help="paper: snippets that see each other in Glimpse, our reading of its window length; 0: all",
    )
    group.add_argument("--glimpse-scale", action=switch, help="paper: scale the dot products (its equation does not)")
    group.add_argument("--emphasize", action=switch, help="paper: self product of the channels")
    group.add_argument(
        "--emphasize-input",
        choices=EMPHASIZE_INPUTS,
        help="paper: what Emphasize reads, Glimpse projected back to D and added to its input, or its D/32 channels",
    )
    group.add_argument("--sam-mean", action=switch, help="paper: self product over the mean channel, or over their sum")
    group.add_argument("--squeeze-kernel", type=size, help="paper: kernel of both squeezers (not published)")
    group.add_argument("--ffn-expansion", type=size, help="paper: hidden over outer width (not published)")
    group.add_argument("--block-residual", action=switch, help="paper: residuals in Glimpse and Emphasize (not said)")


def _add_prompt_options(group: argparse._ArgumentGroup) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--prompt-length", type=size, help="paper: learned tokens around the class name")
    group.add_argument("--class-contexts", action=switch, help="paper: learned tokens for each class (not said)")
    group.add_argument("--reparameterise", action=switch, help="paper: send the learned tokens through DistilBERT")
    group.add_argument("--train-prompt-encoder", action=switch, help="paper: train DistilBERT (not said)")
    group.add_argument("--temperature", type=positive_float, help="paper: of the alignment")


def _add_loss_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--coarse-weight", type=non_negative_float, help="paper: weight of the coarse loss, 1 there")
    group.add_argument("--fine-weight", type=non_negative_float, help="paper: weight l1 of the alignment loss")
    group.add_argument("--magnitude-weight", type=non_negative_float, help="paper: weight l2 of the magnitude loss")
    group.add_argument(
        "--margin",
        type=non_negative_float,
        help="paper: by which magnitudes of the two kinds shall differ (not published)",
    )
    group.add_argument(
        "--magnitude-distance",
        choices=bag_losses.DISTANCES,
        help="paper: between two videos' mean highest magnitudes, or least and greatest difference (as printed)",
    )
    group.add_argument(
        "--single-normal",
        action=argparse.BooleanOptionalAction,
        help="paper: a normal video counts by its highest snippet alone",
    )
