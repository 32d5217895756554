"""IEF-VAD (arXiv 2505.02393): image and event features fused by the uncertainty that is predicted of each.

Formulas and parameter names are those of the released code. B videos, T snippets, D width of one stream.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad import losses
from clipfusionvad.io.argtypes import layers, non_negative_float, positive_float, rate, size
from clipfusionvad.io.errors import UserError, check_choice
from clipfusionvad.models.base import Method, Scores, VADOutput, own_stream, register_method
from clipfusionvad.models.clip import ClipWeights

NOISE_MODELS = ("student_t", "gaussian")
FUSIONS = ("uncertainty", "mean", "rgb", "event")


@dataclass(frozen=True)
class UncertaintyOutput(VADOutput):
    """Besides the logits, what the two modalities say and how far each is trusted, all (B, T, D).

    ``fused`` is the refined state that is classified. The weights of the two modalities sum to one (up to the
    epsilon of the fusion).
    """

    fused: Tensor
    image_mu: Tensor
    event_mu: Tensor
    image_logvar: Tensor
    event_logvar: Tensor
    image_weight: Tensor
    event_weight: Tensor


@register_method
class IEFVAD(Method):
    """Two encoders without position, one Gaussian or Student-t per dimension and modality, residual refinement.

    Frames are fused each by itself: nothing is carried along time but by the encoders' attention. Padded snippets
    take part in attention and in the regularisers, as in the released code, unless ``mask_padding``.
    """

    name = "iefvad"
    streams = ("rgb", "event")
    needs_clip = False
    defaults = {"visual_width": 768, "visual_head": 8, "visual_layers": 2, "select": "auc1"}
    demo = {
        "visual_head": 4,
        "visual_layers": 1,
        "num_refinement_steps": 3,
        "max_epoch": 8,
        "lr": 1e-3,
        "scheduler_milestones": [6],
    }

    def __init__(
        self,
        class_prompts: Sequence[str],
        clip: ClipWeights | None,
        *,
        visual_length: int = 256,
        visual_width: int = 768,
        visual_head: int = 8,
        visual_layers: int = 2,
        dropout: float = 0.1,
        noise_model: str = "student_t",
        kl_noise_model: str | None = None,
        nu: float = 8,
        lambda_ref: float = 0.5,
        num_refinement_steps: int = 10,
        epsilon: float = 1e-8,
        fusion: str = "uncertainty",
        reg_weight: float = 1.0,
        kl_weight: float = 1.0,
        mask_padding: bool = False,
    ):
        super().__init__()
        if visual_width % visual_head:
            raise UserError(f"--visual-width {visual_width} is not a multiple of --visual-head {visual_head}")
        check_choice("--noise-model", noise_model, NOISE_MODELS)
        check_choice("--kl-noise-model", kl_noise_model or noise_model, NOISE_MODELS)
        check_choice("--fusion", fusion, FUSIONS)
        self.visual_length, self.visual_width = visual_length, visual_width
        self.reg_weight, self.kl_weight, self.mask_padding = reg_weight, kl_weight, mask_padding
        self.kl_shift = -math.log(_precision_factor(kl_noise_model or noise_model, nu))
        log_epsilon = math.log(epsilon) - math.log(_precision_factor(noise_model, nu))
        encoder = {"heads": visual_head, "layers": visual_layers, "dropout": dropout}
        self.temporal = UncertaintyFusion(
            visual_width, encoder, fusion, log_epsilon, steps=num_refinement_steps, step_size=lambda_ref
        )

    def encode_text(self) -> None:
        return None

    def forward(
        self, visual: Tensor | Sequence[Tensor], lengths: Tensor | None = None, text: None = None
    ) -> UncertaintyOutput:
        """RGB and event features side by side, (B, T, 2·D), or as a pair of (B, T, D); lengths (B,) → output."""
        image, event = self._pair(visual)
        valid = self._valid(image.shape[1], lengths) if lengths is not None else None
        return self.temporal(image, event, valid)

    def _pair(self, visual: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        parts = visual.chunk(2, dim=-1) if isinstance(visual, Tensor) else tuple(visual)
        if len(parts) != 2 or parts[0].shape != parts[1].shape or parts[0].shape[-1] != self.visual_width:
            found = ", ".join(str(tuple(part.shape)) for part in ([visual] if isinstance(visual, Tensor) else parts))
            raise UserError(
                f"{self.name} takes {' and '.join(self.streams)} features of width {self.visual_width} each, side by "
                f"side or as a pair, not {found}"
            )
        return parts

    def _valid(self, steps: int, lengths: Tensor) -> Tensor | None:
        """Which snippets are no padding, (B, T) bool; None where padding is not told apart."""
        return torch.arange(steps, device=lengths.device) < lengths[:, None] if self.mask_padding else None

    def losses(self, output: UncertaintyOutput, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        valid = self._valid(output.fused.shape[1], lengths)
        image_mu, event_mu = _rows(output.image_mu, valid), _rows(output.event_mu, valid)
        kl = gaussian_kl(image_mu, _rows(output.image_logvar, valid) + self.kl_shift)
        kl = kl + gaussian_kl(event_mu, _rows(output.event_logvar, valid) + self.kl_shift)
        return {
            "coarse": losses.coarse_mil_loss(output.coarse_logits, targets, lengths),
            "reg": self.reg_weight * agreement_loss(image_mu, event_mu),
            "kl": self.kl_weight * kl,
        }

    def scores(self, output: VADOutput) -> Scores:
        return Scores((torch.sigmoid(output.coarse_logits.float()).squeeze(-1),), None)

    @classmethod
    def recognises(cls, state: Mapping[str, Tensor]) -> bool:
        return "temporal.image_mu.weight" in state

    @classmethod
    def add_options(cls, group: argparse._ArgumentGroup) -> None:
        switch = argparse.BooleanOptionalAction
        add = group.add_argument
        add("--visual-head", type=size, help="attention heads of both encoders")
        add("--visual-layers", type=layers, help="attention layers of both encoders; 0: none")
        add("--dropout", type=rate, help="dropout of attention")
        add("--noise-model", choices=NOISE_MODELS, help="noise of a modality, and so its KL")
        add("--kl-noise-model", choices=NOISE_MODELS, help="noise that the KL assumes, if another one")
        add("--nu", type=positive_float, help="degrees of freedom of the Student-t")
        add("--lambda-ref", type=non_negative_float, help="size of a refinement step")
        add("--num-refinement-steps", type=layers, help="refinement steps; 0: none")
        add("--epsilon", type=positive_float, help="added where the weights are normalised")
        add("--fusion", choices=FUSIONS, help="how modalities are weighed; rgb, event: that one alone")
        add("--reg-weight", type=non_negative_float, help="weight of the agreement of the modalities")
        add("--kl-weight", type=non_negative_float, help="weight of the divergence from a unit Gaussian")
        add("--mask-padding", action=switch, help="keep padding out of attention and regularisers")


class UncertaintyFusion(nn.Module):
    """The network: two encoders, a mean and a log variance of each, weighted fusion, refinement, classifier.

    ``encoder`` holds heads, layers and dropout of an encoder.
    """

    def __init__(
        self,
        width: int,
        encoder: Mapping[str, Any],
        fusion: str,
        log_epsilon: float,
        steps: int,
        step_size: float,
    ):
        super().__init__()
        self.fusion, self.log_epsilon, self.step_size = fusion, log_epsilon, step_size
        with own_stream("image attention"):
            self.image_attn_layers, self.image_norms = _attention_layers(width, **encoder)
        with own_stream("event attention"):
            self.event_attn_layers, self.event_norms = _attention_layers(width, **encoder)
        self.whiten_image, self.whiten_event = nn.LayerNorm(width), nn.LayerNorm(width)
        self.image_mu, self.event_mu = nn.Linear(width, width), nn.Linear(width, width)
        self.image_logvar, self.event_logvar = nn.Linear(width, width), nn.Linear(width, width)
        with own_stream("refinement"):
            blocks = [nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(steps)]
        self.refinement_blocks = nn.ModuleList(blocks)
        self.classifier = nn.Linear(width, 1)

    def forward(self, image: Tensor, event: Tensor, valid: Tensor | None = None) -> UncertaintyOutput:
        """image, event (B, T, D), valid (B, T) bool (None: attend to all) → output."""
        image = self.whiten_image(_attend(image, self.image_attn_layers, self.image_norms, valid))
        event = self.whiten_event(_attend(event, self.event_attn_layers, self.event_norms, valid))
        # Variances span many orders of magnitude, which autocast's short floats do not resolve.
        means = _wide(self.image_mu(image)), _wide(self.event_mu(event))
        log_variances = _wide(self.image_logvar(image)), _wide(self.event_logvar(event))
        weights = self._weights(*log_variances)
        fused = weights[0] * means[0] + weights[1] * means[1]
        for block in self.refinement_blocks:
            fused = fused - self.step_size * block(fused)
        return UncertaintyOutput(self.classifier(fused), None, None, fused, *means, *log_variances, *weights)

    def _weights(self, image_logvar: Tensor, event_logvar: Tensor) -> tuple[Tensor, Tensor]:
        """w_m / (w_I + w_E + epsilon) with the precisions w_m = c · exp(-logvar_m), computed without overflow.

        The factor c of the noise model is the same for both, so it only scales epsilon, which holds it already.
        """
        if self.fusion == "uncertainty":
            log_sum = torch.logaddexp(-image_logvar, -event_logvar)
            log_sum = torch.logaddexp(log_sum, torch.full_like(log_sum, self.log_epsilon))
            return torch.exp(-image_logvar - log_sum), torch.exp(-event_logvar - log_sum)
        share = {"mean": 0.5, "rgb": 1.0, "event": 0.0}[self.fusion]
        return torch.full_like(image_logvar, share), torch.full_like(event_logvar, 1 - share)


def agreement_loss(image_mu: Tensor, event_mu: Tensor) -> Tensor:
    """Mean over snippets of 1 - cos(μ_I, μ_E), plus that of | ‖μ_I‖ - ‖μ_E‖ |; (…, D) each → scalar."""
    cosine = F.cosine_similarity(image_mu, event_mu, dim=-1)
    gap = image_mu.norm(dim=-1) - event_mu.norm(dim=-1)
    return (1 - cosine).mean() + gap.abs().mean()


def gaussian_kl(mu: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(μ, σ²) from N(0, 1), the mean over all entries; any equal shapes → scalar."""
    return -0.5 * (1 + log_variance - mu.square() - log_variance.exp()).mean()


def _precision_factor(noise_model: str, nu: float) -> float:
    """c of the precision c · exp(-logvar): that of a Student-t is (ν + 1) / ν times a Gaussian's."""
    return (nu + 1) / nu if noise_model == "student_t" else 1.0


def _attention_layers(width: int, heads: int, layers: int, dropout: float) -> tuple[nn.ModuleList, nn.ModuleList]:
    attention = [nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True) for _ in range(layers)]
    return nn.ModuleList(attention), nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))


def _attend(x: Tensor, attention: nn.ModuleList, norms: nn.ModuleList, valid: Tensor | None) -> Tensor:
    """Layers of norm(x + attention(x)), (B, T, D) → (B, T, D)."""
    padding = None if valid is None else ~valid
    for attend, norm in zip(attention, norms, strict=True):
        x = norm(x + attend(x, x, x, key_padding_mask=padding, need_weights=False)[0])
    return x


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _rows(values: Tensor, valid: Tensor | None) -> Tensor:
    """The entries of valid snippets."""
    return values if valid is None else values[valid]
