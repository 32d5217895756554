"""IEF-VAD (arXiv 2505.02393): image and event features fused by their predicted uncertainty.

Formulas and parameter names are those of the released code. B videos, T snippets, D width of one stream.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from clipfusionvad import losses
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option, layers, non_negative, size
from clipfusionvad.models.base import Method, VADOutput, VisualLength, VisualWidth, isolated_rng, register_method

NOISE_MODELS = ("student_t", "gaussian")
FUSIONS = ("uncertainty", "mean", "rgb", "event")


@dataclass(frozen=True, kw_only=True)
class UncertaintyOutput(VADOutput):
    """Besides the logits, mean, log variance and weight of both modalities, and the refined state, all (B, T, D)."""

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

    Each frame is fused separately: only the encoders' attention looks along time. Padded snippets take part in
    attention and in the regularisers, as in the released code, unless ``mask_padding``.
    """

    name = "iefvad"
    streams = ("rgb", "event")

    def __init__(
        self,
        classes: int,
        *,
        visual_length: VisualLength = 256,
        visual_width: VisualWidth = 768,
        visual_head: Annotated[int, size("attention heads of both encoders")] = 8,
        visual_layers: Annotated[int, layers("attention layers of both encoders; 0: none")] = 2,
        dropout: Annotated[float, Option("dropout of attention", minimum=0, below=1)] = 0.1,
        noise_model: Annotated[str, Option("noise of a modality", choices=NOISE_MODELS)] = "student_t",
        kl_noise_model: Annotated[
            str | None, Option("noise that the KL assumes (default: --noise-model)", choices=NOISE_MODELS)
        ] = None,
        nu: Annotated[float, Option("degrees of freedom of the Student-t", above=0)] = 8,
        lambda_ref: Annotated[float, non_negative("size of a refinement step")] = 0.5,
        num_refinement_steps: Annotated[int, layers("refinement steps; 0: none")] = 10,
        epsilon: Annotated[float, Option("added where the weights are normalised", above=0)] = 1e-8,
        fusion: Annotated[
            str, Option("how modalities are weighted; rgb, event: only that one", choices=FUSIONS)
        ] = "uncertainty",
        reg_weight: Annotated[float, non_negative("weight of the agreement of the modalities")] = 1.0,
        kl_weight: Annotated[float, non_negative("weight of the divergence from a unit Gaussian")] = 1.0,
        mask_padding: Annotated[bool, Option("keep padding out of attention and regularisers")] = False,
    ):
        super().__init__()
        if visual_width % visual_head:
            raise UserError(f"--visual-width {visual_width} is not a multiple of --visual-head {visual_head}")
        self.visual_length, self.visual_width = visual_length, visual_width
        self.reg_weight, self.kl_weight, self.mask_padding = reg_weight, kl_weight, mask_padding
        # c of the precision c · exp(-logvar): that of a Student-t is (ν + 1) / ν times a Gaussian's.
        factor = {"student_t": math.log((nu + 1) / nu), "gaussian": 0.0}
        self.kl_shift = -factor[kl_noise_model or noise_model]
        log_epsilon = math.log(epsilon) - factor[noise_model]
        attention = partial(nn.MultiheadAttention, visual_width, visual_head, dropout=dropout, batch_first=True)
        refinement = (num_refinement_steps, lambda_ref)
        self.temporal = UncertaintyFusion(visual_width, visual_layers, attention, fusion, log_epsilon, *refinement)

    def forward(self, visual: Tensor | Sequence[Tensor], lengths: Tensor | None = None) -> UncertaintyOutput:
        """RGB and event features side by side, (B, T, 2·D), or as a pair of (B, T, D); lengths (B,) → output."""
        parts = visual.chunk(2, dim=-1) if isinstance(visual, Tensor) else tuple(visual)
        if len(parts) != 2 or parts[0].shape != parts[1].shape or parts[0].shape[-1] != self.visual_width:
            found = ", ".join(str(tuple(part.shape)) for part in ([visual] if isinstance(visual, Tensor) else parts))
            wanted = f"{' and '.join(self.streams)} features of width {self.visual_width} each"
            raise UserError(f"{self.name} takes {wanted}, side by side or as a pair, not {found}")
        image, event = parts
        valid = losses.valid_mask(lengths, image.shape[1]) if self.mask_padding and lengths is not None else None
        return self.temporal(image, event, valid)

    def losses(self, output: UncertaintyOutput, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        moments = [output.image_mu, output.event_mu, output.image_logvar, output.event_logvar]
        if self.mask_padding:
            moments = [values[losses.valid_mask(lengths, values.shape[1])] for values in moments]
        image_mu, event_mu, image_logvar, event_logvar = moments
        kl = losses.gaussian_kl(image_mu, image_logvar + self.kl_shift)
        kl = kl + losses.gaussian_kl(event_mu, event_logvar + self.kl_shift)
        return {
            "coarse": losses.coarse_mil_loss(output.coarse_logits, targets, lengths),
            "reg": self.reg_weight * losses.agreement_loss(image_mu, event_mu),
            "kl": self.kl_weight * kl,
        }

    @classmethod
    def matches_state_dict(cls, state: Mapping[str, Tensor]) -> bool:
        return "temporal.image_mu.weight" in state


class UncertaintyFusion(nn.Module):
    """Two encoders of ``layers`` × ``attention()``, mean and log variance of each, fusion, refinement, classifier."""

    def __init__(
        self, width: int, layers: int, attention: Any, fusion: str, log_epsilon: float, steps: int, step_size: float
    ):
        super().__init__()
        self.fusion, self.log_epsilon, self.step_size = fusion, log_epsilon, step_size
        with isolated_rng("image attention"):
            self.image_attn_layers = nn.ModuleList(attention() for _ in range(layers))
        self.image_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        with isolated_rng("event attention"):
            self.event_attn_layers = nn.ModuleList(attention() for _ in range(layers))
        self.event_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.whiten_image, self.whiten_event = nn.LayerNorm(width), nn.LayerNorm(width)
        self.image_mu, self.event_mu = nn.Linear(width, width), nn.Linear(width, width)
        self.image_logvar, self.event_logvar = nn.Linear(width, width), nn.Linear(width, width)
        with isolated_rng("refinement"):
            blocks = [nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(steps)]
        self.refinement_blocks = nn.ModuleList(blocks)
        self.classifier = nn.Linear(width, 1)

    def forward(self, image: Tensor, event: Tensor, valid: Tensor | None = None) -> UncertaintyOutput:
        """image, event (B, T, D), valid (B, T) bool (None: attend to all) → output."""
        image = self.whiten_image(_attend(image, self.image_attn_layers, self.image_norms, valid))
        event = self.whiten_event(_attend(event, self.event_attn_layers, self.event_norms, valid))
        # Variances span many orders of magnitude, which autocast's short floats do not resolve.
        estimates = {"image_mu": self.image_mu(image), "event_mu": self.event_mu(event)}
        estimates |= {"image_logvar": self.image_logvar(image), "event_logvar": self.event_logvar(event)}
        wide = {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in estimates.items()}
        image_weight, event_weight = self.weights(wide["image_logvar"], wide["event_logvar"])
        fused = image_weight * wide["image_mu"] + event_weight * wide["event_mu"]
        for block in self.refinement_blocks:
            fused = fused - self.step_size * block(fused)
        wide |= {"fused": fused, "image_weight": image_weight, "event_weight": event_weight}
        return UncertaintyOutput(self.classifier(fused), **wide)

    def weights(self, image_logvar: Tensor, event_logvar: Tensor) -> tuple[Tensor, Tensor]:
        """w_m / (w_I + w_E + epsilon) with w_m = c · exp(-logvar_m), without overflow; epsilon is divided by c."""
        if self.fusion == "uncertainty":
            log_sum = torch.logaddexp(-image_logvar, -event_logvar)
            log_sum = torch.logaddexp(log_sum, torch.full_like(log_sum, self.log_epsilon))
            return torch.exp(-image_logvar - log_sum), torch.exp(-event_logvar - log_sum)
        share = {"mean": 0.5, "rgb": 1.0, "event": 0.0}[self.fusion]
        return torch.full_like(image_logvar, share), torch.full_like(event_logvar, 1 - share)


def _attend(x: Tensor, attention: nn.ModuleList, norms: nn.ModuleList, valid: Tensor | None) -> Tensor:
    """Layers of norm(x + attention(x)), (B, T, D) → (B, T, D)."""
    padding = None if valid is None else ~valid
    for attend, norm in zip(attention, norms, strict=True):
        x = norm(x + attend(x, x, x, key_padding_mask=padding, need_weights=False)[0])
    return x
