"""How long, how fast and how often a training goes: its schedule, optimizer and learning rates."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR

#: The value of ``Schedule.select`` that takes the last weights instead of the best ones.
LAST_WEIGHTS = "last"


@dataclass(frozen=True)
class Schedule:
    """What the training loop goes by.

    ``eval_every`` counts samples anew in each epoch, from the index of the batch (released code): an evaluation
    follows batch i where i · samples is a multiple of it and i > 0. An epoch without any such batch, or with
    ``eval_every`` 0, is followed by an evaluation.
    ``select`` names the metric that picks the best weights; with "last" those after the last epoch are taken.
    ``paper`` keeps two habits of the released loop: the rest of an epoch after an evaluation in it trains in
    eval mode (so BatchNorm uses and keeps its running statistics), and every epoch ends by loading the best
    weights so far, while the optimizer goes on.
    """

    max_epoch: int
    lr: float
    eval_every: int
    select: str
    paper: bool
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    lr_schedule: str = "milestones"
    milestones: tuple[int, ...] = ()
    rate: float = 0.1
    warmup_epochs: int = 0


def make_optimizer(parameters: Iterable[nn.Parameter], schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW, or Adam with the weight decay added to the gradient."""
    kind = torch.optim.AdamW if schedule.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=schedule.lr, betas=schedule.betas, weight_decay=schedule.weight_decay, fused=True)


def make_scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule) -> LRScheduler:
    """Learning rates by epoch: drops at milestones, or warm-up and cosine."""
    if schedule.lr_schedule == "cosine":
        return LambdaLR(optimizer, lambda epoch: cosine_factor(epoch, schedule.warmup_epochs, schedule.max_epoch))
    return MultiStepLR(optimizer, schedule.milestones, schedule.rate)


def cosine_factor(epoch: int, warmup: int, total: int) -> float:
    """Share of the base rate in an epoch: e/w rising from 0 during w epochs, then half a cosine down to 0 at E.

    Source: released code of AnomalyCLIP. Its first epoch has rate 0 and only moves BatchNorm's statistics.
    """
    if epoch < warmup:
        return epoch / warmup
    return (1 + math.cos(math.pi * (epoch - warmup) / max(total - warmup, 1))) / 2
