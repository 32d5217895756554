"""Checkpoints of PyTorch Lightning: tensors come out, nothing in the file runs."""

from __future__ import annotations

import collections
import functools
import os
import pickle
import random

import numpy as np
import pytest
import torch

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.foreign_checkpoints import read_lightning
from clipfusionvad.io.torch_files import read_torch


class Foreign:
    """Stands for a class of the project that wrote the file: has a state, items and a call."""

    def __init__(self):
        self.ran = False

    def __setstate__(self, state):
        raise AssertionError("a foreign class was brought to life")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def checkpoint(tmp_path, **extra):
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state = collections.OrderedDict(
        {
            "net.weight": torch.nn.Parameter(base[:, 1:3]),  # a view: strides and an offset
            "net.half": torch.randn(2, 3).half(),
            "net.count": torch.tensor(7),
            "net.flags": torch.tensor([True, False]),
            "net.empty": torch.zeros(0, 4),
            "net.shared": base,
        }
    )
    content = {
        "pytorch-lightning_version": "1.8.3",
        "epoch": 49,
        "state_dict": state,
        "hyper_parameters": {
            "loss": Foreign(),
            "optimizer": functools.partial(torch.optim.AdamW, lr=1e-5),
            "log": collections.defaultdict(list, a=[Foreign()]),
            "seeds": {random.Random(3)},
            "array": np.arange(3),
        },
        **extra,
    }
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    return path, content


def test_tensors_come_out_unchanged(tmp_path):
    path, content = checkpoint(tmp_path)
    with pytest.raises(UserError, match="more than tensors"):
        read_torch(path, "file")
    found = read_lightning(path)
    assert found["epoch"] == 49
    assert list(found["state_dict"]) == list(content["state_dict"])
    for key, value in content["state_dict"].items():
        read = found["state_dict"][key]
        assert read.dtype == value.dtype and torch.equal(read, value.detach()), key


def test_nothing_in_the_file_runs(tmp_path):
    path, _ = checkpoint(tmp_path, callbacks=Attack(tmp_path / "attacked"))
    assert read_lightning(path)["epoch"] == 49
    assert not (tmp_path / "attacked").exists()
    with pytest.raises(AssertionError, match="brought to life"):
        torch.load(path, weights_only=False)


def test_another_kind_of_file_is_not_taken_for_one(tmp_path):
    torch.save({"weights": torch.ones(2), "more": Attack(tmp_path / "attacked")}, tmp_path / "model.pth")
    assert read_lightning(tmp_path / "model.pth") is None
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"state_dict": Attack(tmp_path / "attacked")}))
    assert read_lightning(tmp_path / "plain.pth") is None
    assert not (tmp_path / "attacked").exists()


def test_damaged_files_are_refused(tmp_path):
    path, _ = checkpoint(tmp_path)
    content = bytearray(path.read_bytes())
    rng = random.Random(0)
    for _ in range(60):
        spoiled = bytearray(content)
        for _ in range(4):
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
        (tmp_path / "spoiled.ckpt").write_bytes(spoiled)
        try:
            found = read_lightning(tmp_path / "spoiled.ckpt")
        except UserError as error:
            assert "spoiled.ckpt" in str(error) and "\n" not in str(error)
        else:
            assert found is None or isinstance(found["state_dict"], dict)
