"""The optimizer, the learning rate of each epoch, and whether the weights follow it."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR

from clipfusionvad.engine.config import TrainingConfig

# A smaller change of the weights, relative to their norm, is rounding (16 roundings of float32).
_UNCHANGED = 1e-6


class StableAdamW(torch.optim.Optimizer):
    """AdamW with the largest second moment so far and an update that shrinks where a tensor's gradient is surprising.

    Its rate rises from 0 over 100 steps, then falls by half a cosine to a tenth at ``total_steps``. Source: released
    code of DSANet.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, total_steps: int, weight_decay: float = 1e-4):
        super().__init__(parameters, {"lr": lr, "total_steps": total_steps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        (first, second), epsilon, state = (0.9, 0.999), 1e-10, self.state[parameter]
        if not state:
            state["step"] = 0
            state |= {name: torch.zeros_like(parameter) for name in ("mean", "square", "largest")}
        lr = group["lr"] * self.factor(state["step"], group["total_steps"])
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        torch.maximum(state["largest"], state["square"], out=state["largest"])
        deviation = state["largest"].sqrt() / math.sqrt(1 - second ** state["step"]) + epsilon
        surprise = (gradient / deviation).square().mean().sqrt().clamp(min=1)
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.sub_(state["mean"] / deviation / surprise * (lr / (1 - first ** state["step"])))

    @staticmethod
    def factor(step: int, total: int, warmup: int = 100) -> float:
        """Share of the rate at a step, counted from 0."""
        if step < warmup:
            return step / (warmup - 1)
        share = min((step - warmup) / max(total - warmup, 1), 1)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2


class BranchedAdamW(AdamW):
    """AdamW for most parameters and ``StableAdamW`` for those of a branch."""

    def __init__(self, parameters: Iterable[Tensor], branch: Iterable[Tensor], total_steps: int, **options: Any):
        super().__init__(parameters, **options)
        self.branch = StableAdamW(branch, options["lr"], total_steps)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        self.branch.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.branch.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"branch": self.branch.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.branch.load_state_dict(state_dict["branch"])


def make_optimizer(
    model: nn.Module, config: TrainingConfig, branch: str = "", branch_steps: int = 0
) -> torch.optim.Optimizer:
    """AdamW, or Adam or Adadelta with the weight decay added to the gradient.

    With AdamW, ``StableAdamW`` trains the parameters whose names begin with ``branch``, if given, in so many steps.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # A method may have nothing to train, but an optimizer needs a parameter.
    named = named or {"": nn.Parameter(torch.zeros(1))}
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adadelta":
        # Every released training that uses it has this epsilon, not torch's.
        return torch.optim.Adadelta(named.values(), rho=config.betas[0], eps=1e-8, **options)
    options |= {"betas": config.betas, "fused": True}
    if config.optimizer == "adam":
        return torch.optim.Adam(named.values(), **options)
    apart = [named.pop(name) for name in list(named) if branch and name.startswith(branch)]
    return BranchedAdamW(named.values(), apart, branch_steps, **options) if apart else AdamW(named.values(), **options)


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig) -> LRScheduler:
    """Learning rates by epoch: drops at milestones, or warm-up and cosine."""
    if config.lr_schedule == "cosine":
        total = config.cosine_epochs or config.max_epoch
        return LambdaLR(optimizer, lambda epoch: cosine_factor(epoch, config.warmup_epochs, total))
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
