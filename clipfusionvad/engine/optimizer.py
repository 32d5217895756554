"""The optimizer, the learning rate of each epoch, and whether the weights follow it."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR

from clipfusionvad.engine.config import TrainingConfig

# A smaller change of the weights, relative to their norm, is rounding (16 roundings of float32).
_UNCHANGED = 1e-6


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, or Adam with the weight decay added to the gradient."""
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig) -> LRScheduler:
    """Learning rates by epoch: drops at milestones, or warm-up and cosine."""
    if config.lr_schedule == "cosine":
        return LambdaLR(optimizer, lambda epoch: cosine_factor(epoch, config.warmup_epochs, config.max_epoch))
    return MultiStepLR(optimizer, config.scheduler_milestones, config.scheduler_rate)


def cosine_factor(epoch: int, warmup: int, total: int) -> float:
    """Share of the base rate in an epoch: e/w rising from 0 during w epochs, then half a cosine down to 0 at E.

    Source: released code of AnomalyCLIP. Its first epoch has rate 0 and only moves BatchNorm's statistics.
    """
    if epoch < warmup:
        return epoch / warmup
    return (1 + math.cos(math.pi * (epoch - warmup) / max(total - warmup, 1))) / 2


def trained_weights(model: nn.Module) -> list[Tensor]:
    """Return a copy of the weights that are trained."""
    return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]


def have_moved(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Return whether the weights differ by more than rounding."""
    moved = torch.nn.utils.get_total_norm([new - old for old, new in zip(before, after, strict=True)])
    return bool(moved > _UNCHANGED * torch.nn.utils.get_total_norm(before))
