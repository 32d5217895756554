"""What an epoch trains on and how: batches, the held-out videos, learning rates and optimizers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad.data.lists import Entry, split_holdout
from clipfusionvad.data.loaders import BagDataset, BalancedBatchSampler, ShuffledBatchSampler, load_batches
from clipfusionvad.data.sampling import WindowSampling, sample_uniform
from clipfusionvad.datasets import XD
from clipfusionvad.engine.config import TrainingConfig
from clipfusionvad.engine.optimizer import make_optimizer, make_scheduler
from clipfusionvad.io.errors import UserError

sizes = st.integers(1, 40)


def feature_path(label, number, crop):
    return Path(f"{label}{number:03d}_x264__{crop}.npy")


@given(sizes, sizes, st.integers(0, 5), st.integers(0, 3))
def test_a_shuffled_epoch_holds_every_row_once(count, batch_size, seed, epoch):
    rows = np.arange(100, 100 + count)
    batches = ShuffledBatchSampler(rows, batch_size, seed).epoch(epoch)
    assert sorted(np.concatenate(batches)) == rows.tolist()
    assert all(len(batch) == batch_size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= batch_size


@given(sizes, sizes, st.integers(1, 10), st.integers(0, 5), st.integers(0, 3))
def test_a_balanced_epoch_is_half_normal_half_anomalous(normal, anomalous, batch_size, seed, epoch):
    rows = np.arange(normal), np.arange(1000, 1000 + anomalous)
    if min(normal, anomalous) < batch_size:
        with pytest.raises(UserError, match=f"give --batch-size {min(map(len, rows))}, or --no-balanced"):
            BalancedBatchSampler(*rows, batch_size, seed)
        return
    batches = BalancedBatchSampler(*rows, batch_size, seed).epoch(epoch)
    assert len(batches) == min(normal, anomalous) // batch_size
    for batch in batches:
        assert (batch[:batch_size] < 1000).all() and (batch[batch_size:] >= 1000).all()
        assert len(batch) == 2 * batch_size
    drawn = np.concatenate(batches)
    assert len(set(drawn)) == len(drawn)


def test_plans_repeat_by_seed_and_differ_by_epoch():
    def order(seed, epoch):
        return np.concatenate(ShuffledBatchSampler(np.arange(50), 8, seed).epoch(epoch)).tolist()

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 2) != order(4, 1) != order(3, 1)


def test_batches_hold_what_the_files_hold(tmp_path):
    entries = []
    for row, (label, count) in enumerate([("A", 5), ("B1-G-0", 40), ("G-0-0", 16)]):
        path = tmp_path / f"v{row}__0.npy"
        np.save(path, np.random.default_rng(row).standard_normal((count, 4)).astype(np.float16))
        entries.append(Entry(path, label, row + 2))
    bags = BagDataset(entries, XD, WindowSampling(16), width=4)
    ((visual, lengths, targets),) = load_batches(bags, [np.array([2, 0, 1])], workers=0)
    assert lengths.tolist() == [16, 5, 16]
    for position, row in enumerate([2, 0, 1]):
        expected, _ = sample_uniform(np.load(entries[row].path), 16)
        np.testing.assert_array_equal(visual[position], expected.astype(np.float32))
        np.testing.assert_array_equal(targets[position], XD.encode(entries[row].label))


@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 4), st.floats(0.05, 0.99), st.integers(0, 3))
def test_holdout_keeps_videos_whole_and_every_label_on_both_sides(normal, abuse, crops, share, seed):
    videos = [("Normal", n) for n in range(normal)] + [("Abuse", n) for n in range(abuse)]
    entries = [Entry(feature_path(label, n, crop), label, 0) for label, n in videos for crop in range(crops)]
    train, held_out = split_holdout(entries, np.array([e.label == "Normal" for e in entries]), share, seed)
    train_videos, held_videos = ({entries[row].video for row in rows} for rows in (train, held_out))
    assert not train_videos & held_videos
    assert len(held_out) == len(held_videos)  # one crop each
    assert len(train_videos | held_videos) == normal + abuse
    for rows in (train, held_out):
        assert {entries[row].label for row in rows} == {"Normal", "Abuse"}


def test_holdout_needs_two_kinds_of_videos():
    entries = [Entry(feature_path("Abuse", n, 0), "Abuse", 0) for n in range(4)]
    entries += [Entry(feature_path("Normal", 0, crop), "Normal", 0) for crop in range(3)]
    normal = np.array([entry.label == "Normal" for entry in entries])
    with pytest.raises(UserError, match="--protocol clean.*at least two normal videos"):
        split_holdout(entries, normal, 0.3, 0)


def training_config(**options):
    needed = {"seed": 0, "max_epoch": 10, "batch_size": 2, "balanced": True, "lr": 2e-5, "eval_every": 0}
    needed |= {"select": "auc1", "scheduler_milestones": (), "scheduler_rate": 0.1}
    return TrainingConfig(**needed | options)


def rates(**options):
    config = training_config(**options)
    optimizer = make_optimizer(torch.nn.Linear(1, 1), config)
    scheduler = make_scheduler(optimizer, config)
    found = []
    for _ in range(config.max_epoch):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_milestones_drop_the_rate_at_the_end_of_their_epochs():
    assert rates(scheduler_milestones=(4, 8)) == pytest.approx([2e-5] * 4 + [2e-6] * 4 + [2e-7] * 2)


def test_cosine_is_the_released_one():
    base, warmup, total = 1e-5, 5, 50
    found = rates(lr=base, lr_schedule="cosine", warmup_epochs=warmup, max_epoch=total)
    expected = [base * epoch / warmup for epoch in range(warmup)]
    expected += [base * (1 + math.cos(math.pi * n / (total - warmup))) / 2 for n in range(total - warmup)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-20)
    assert found[0] == 0 and found[warmup] == base


@pytest.mark.parametrize("name", ["adamw", "adam", "adadelta"])
def test_gradients_can_be_clipped_and_weights_decay_by_the_optimizer(name):
    """One step from the same gradient: Adam and Adadelta add the decay to it, AdamW shrinks the weight itself."""
    options = training_config(optimizer=name, weight_decay=0.5, lr=0.1)
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(2.0)
    optimizer = make_optimizer(layer, options)
    layer.weight.grad = torch.full((1, 1), 0.25)
    optimizer.step()
    rho, square = options.betas[0], (0.25 + 0.5 * 2) ** 2
    expected = {
        "adamw": 2 * (1 - 0.1 * 0.5) - 0.1,
        "adam": 2 - 0.1,
        "adadelta": 2 - 0.1 * math.sqrt(1e-8) / math.sqrt((1 - rho) * square + 1e-8) * math.sqrt(square),
    }
    assert layer.weight.item() == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_optimizer_is_that_of_the_options(name, kind):
    options = training_config(optimizer=name, betas=(0.9, 0.98), weight_decay=0.2)
    optimizer = make_optimizer(torch.nn.Linear(1, 1), options)
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-5, (0.9, 0.98), 0.2)
