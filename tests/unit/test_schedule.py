"""Learning rates by epoch, optimizers, and which weights are taken."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad.engine.optim import Schedule, cosine_factor, make_optimizer, make_scheduler


def rates(schedule):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer([weight], schedule)
    scheduler = make_scheduler(optimizer, schedule)
    found = []
    for _ in range(schedule.max_epoch):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def schedule(**other):
    return Schedule(**{"max_epoch": 10, "lr": 2e-5, "eval_every": 0, "select": "auc1", "paper": True} | other)


def test_milestones_drop_the_rate_at_the_end_of_their_epochs():
    found = rates(schedule(milestones=(4, 8), rate=0.1))
    assert found == pytest.approx([2e-5] * 4 + [2e-6] * 4 + [2e-7] * 2)


def test_cosine_is_the_released_one():
    base, warmup, total = 1e-5, 5, 50
    found = rates(schedule(lr=base, lr_schedule="cosine", warmup_epochs=warmup, max_epoch=total))
    for epoch, rate in enumerate(found):
        if epoch < warmup:
            expected = base * epoch / warmup
        else:
            expected = base * (1 + math.cos(math.pi * (epoch - warmup) / (total - warmup))) / 2
        assert rate == pytest.approx(expected, rel=1e-9, abs=1e-20)
    assert found[0] == 0 and found[warmup] == base


@given(st.integers(0, 20), st.integers(1, 100))
def test_cosine_rises_then_falls(warmup, total):
    factors = [cosine_factor(epoch, warmup, total) for epoch in range(total)]
    assert all(0 <= factor <= 1 for factor in factors)
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_optimizer_has_what_the_schedule_says(name, kind):
    optimizer = make_optimizer(
        [torch.nn.Parameter(torch.ones(1))], schedule(optimizer=name, betas=(0.9, 0.98), weight_decay=0.2)
    )
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-5, (0.9, 0.98), 0.2)
